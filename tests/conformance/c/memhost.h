/*
 * A host in memory: disks, sidecars, timers, work, and guests as threads. It follows the contract of
 * iofilter.h to the letter and counts what the filter does against it.
 */
#ifndef MEMHOST_H
#define MEMHOST_H

#include <pthread.h>
#include <stdbool.h>
#include <time.h>

#include "iofilter.h"

#define MAX_SIDECARS 4
#define MAX_PROPERTIES 16

struct jio_sidecar {
    uint64_t key, len_bytes;
    uint8_t *bytes;
    bool exists, open;
};

/* A disk. Everything the filter left behind at close is found by these counts. */
struct jio_disk {
    const jio_filter_t *filter;
    void *instance;
    const char *label, *run_dir;
    uint8_t uuid[16];
    uint64_t capacity_bytes;
    uint64_t openings; /* each changes the content id, as of a host that can tell */
    uint8_t *data;
    uint64_t fail_writes_from, fail_writes_to; /* writes that touch this range fail */
    jio_property_t properties[MAX_PROPERTIES];
    uint64_t property_count;

    pthread_mutex_t lock; /* what follows */
    pthread_cond_t changed;
    struct jio_sidecar sidecars[MAX_SIDECARS];
    uint64_t heap_blocks, work_pending, requests_pending, timers_pending, running;
    bool may_submit, may_time, may_work;
    uint64_t next_io, deferred, held, aborted;
};

/* Which size the host's table and the disk's info have. */
enum table_kind { TABLE_FULL, TABLE_REQUIRED, TABLE_LARGER };

/* Starts the host's threads. The table of the kind asked for; ends at a page that cannot be read. */
jio_host_t *host_start(enum table_kind kind);
/* A copy of len bytes that ends at a page that cannot be read: reading past it crashes. */
void *at_the_edge(const void *from, size_t len);

/* Things that the filter did against the contract, each told on stderr. */
unsigned host_violations(void);
void host_violation(const struct jio_disk *disk, const char *what);

void disk_make(struct jio_disk *disk, const jio_filter_t *filter, const char *label,
               const char *run_dir, uint64_t capacity_bytes);
void disk_free(struct jio_disk *disk);
void disk_property(struct jio_disk *disk, const char *key, const char *value);
unsigned disk_sidecars(struct jio_disk *disk, bool only_open);

jio_status_t disk_attach(struct jio_disk *disk, enum table_kind kind);
jio_status_t disk_detach(struct jio_disk *disk, enum table_kind kind);
jio_status_t disk_open(struct jio_disk *disk, enum table_kind kind);
/* Closes it and looks for what is left behind. */
jio_status_t disk_close(struct jio_disk *disk, uint32_t how);

/* One I/O of a guest, in `pieces` buffers; returns when it has ended. abort_after_ns > 0: the guest gives up
 * on it when it is still held after that time. */
jio_status_t guest_io(struct jio_disk *disk, uint32_t kind, uint32_t flags, uint64_t offset_bytes,
                      uint64_t len_bytes, uint8_t *buffer, unsigned pieces, uint64_t abort_after_ns);

/* Marks this thread's context while control calls run, so that services can check it. */
void in_control(bool entered);

/* ---- between the files of the host ---- */

enum host_context { NO_CONTEXT, IO, CALLBACK, WORK, CONTROL };
extern _Thread_local enum host_context host_context;

jio_status_t guest_continue(jio_disk_t *disk, jio_io_t *io);
jio_status_t guest_complete(jio_disk_t *disk, jio_io_t *io, jio_status_t status);
jio_status_t guest_release(jio_disk_t *disk, jio_io_t *io);
jio_status_t disk_execute(struct jio_disk *disk, uint32_t kind, uint64_t offset, uint64_t len,
                          const jio_iovec_t *iov, uint32_t iov_count);
void disk_count(struct jio_disk *disk, uint64_t *counter, int change);
struct timespec host_wall_after(uint64_t delay_ns);
void *host_must(void *memory);

#endif
