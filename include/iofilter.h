/*
 * iofilter.h: the contract between a host and an I/O filter of its disks.
 *
 * The host is any process that opens a virtual disk: the process of a running VM, or an offline tool
 * that copies or repairs a disk. The filter is a shared library with one exported symbol,
 * jio_filter_entry(). The host calls the filter through jio_filter_t; the filter calls the host
 * through jio_host_t. Nothing else crosses.
 *
 * This is our own interface, made from public descriptions of what such filters do. It claims no
 * source or binary compatibility with any product. CONVENTIONS.md beside this file has the rules that
 * hold for every function: results, ownership, threads, life cycle, versions. Read it first.
 *
 * Marks used below, each explained in CONVENTIONS.md:
 *   [io]       I/O context: any host thread, any number at once for one disk. Must not block.
 *   [callback] timer context: a host thread. Must not block.
 *   [work]     work context: a host thread. May block.
 *   [control]  control context: one call at a time for one disk. May block.
 *   [any]      may be called in each of these contexts.
 *   [optional] the slot may be NULL, or lie beyond the `size` of the table.
 */
#ifndef JIO_IOFILTER_H
#define JIO_IOFILTER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------------------------------------
 * Versions
 *
 * The major number changes when an old binary cannot work any more; sides with different majors refuse
 * each other. The minor number changes when something was appended. What is really there is told by
 * `size` alone: a reader uses a member only if JIO_HAS() says that its maker knew it.
 */
#define JIO_ABI_MAJOR 1u
#define JIO_ABI_MINOR 1u
#define JIO_ABI_VERSION 0x00010001u /* major << 16 | minor */
#define JIO_ABI_MAJOR_OF(version) ((uint32_t)(version) >> 16)

/* Whether the maker of *ptr, a struct of type `type` that starts with `uint32_t size`, set `member`. */
#define JIO_HAS(type, ptr, member) \
    ((size_t)(ptr)->size >= offsetof(type, member) + sizeof(((const type *)0)->member))

/* Limits. A side that is handed more refuses with JIO_E_RANGE; it never truncates. */
#define JIO_PROPERTY_KEY_MAX 64u      /* bytes of a property's name, with the final NUL */
#define JIO_PROPERTY_VALUE_MAX 1024u  /* bytes of a property's value, with the final NUL */
#define JIO_PROPERTIES_MAX 256u       /* properties of one disk */
#define JIO_IOV_MAX 1024u             /* buffers of one I/O */
#define JIO_IO_LEN_MAX 0x02000000u    /* bytes of one READ or WRITE: 32 MiB */
#define JIO_LOG_MESSAGE_MAX 4096u     /* bytes of one log or event message */
#define JIO_SIDECAR_UNIT_BYTES 4096u  /* sidecar lengths and offsets are multiples of this */
#define JIO_SIDECAR_MAX_BYTES 0x10000000u /* bytes of one sidecar: 256 MiB */

/* ------------------------------------------------------------------------------------------------
 * Result codes: 0 is success, every failure is negative. A code that a reader does not know is a
 * failure like JIO_E_INTERNAL.
 */
typedef int32_t jio_status_t;

#define JIO_OK 0
/* The call itself could not be carried out. */
#define JIO_E_INVALID (-1)       /* an argument is NULL, malformed or contradicts another */
#define JIO_E_NOT_SUPPORTED (-2) /* this side does not have the function or the property */
#define JIO_E_NO_MEMORY (-3)     /* memory, or a slot of a bounded table, ran out */
#define JIO_E_NOT_FOUND (-4)     /* no such sidecar, property, timer or I/O */
#define JIO_E_EXISTS (-5)        /* it is there already */
#define JIO_E_BUSY (-6)          /* not now; trying again later may succeed */
#define JIO_E_CLOSED (-7)        /* the disk or the instance is closed */
#define JIO_E_ABI (-8)           /* the other side's table is too old, too small or of another major */
#define JIO_E_RANGE (-9)         /* beyond a limit, a buffer's end or the disk's end */
#define JIO_E_TIMED_OUT (-10)    /* the time allowed has passed */
#define JIO_E_CANCELLED (-11)    /* ended by a cancel or an abort */
#define JIO_E_DENIED (-12)       /* not allowed here: wrong context, wrong owner */
#define JIO_E_INTERNAL (-13)     /* a defect: an invariant failed, or a panic was stopped at the border */
/* The outcome of an I/O. */
#define JIO_E_IO (-32)           /* the storage failed; what the range holds now is unknown */
#define JIO_E_NO_SPACE (-33)     /* the storage is full; what the range holds now is unknown */
#define JIO_E_READ_ONLY (-34)    /* the disk cannot be written */

/* ------------------------------------------------------------------------------------------------
 * I/O
 */

/* What an I/O does (jio_io_t.kind, jio_request_t.kind). */
#define JIO_IO_READ 1u  /* fills the buffers */
#define JIO_IO_WRITE 2u /* takes the buffers' bytes */
#define JIO_IO_ZERO 3u  /* the range reads as zeros afterwards; no buffers */
#define JIO_IO_UNMAP 4u /* the range's content is of no interest any more; no buffers */
#define JIO_IO_FLUSH 5u /* what was completed before is made durable; no range, no buffers */

/* jio_io_t.flags, jio_request_t.flags. A flag that is not known is ignored. */
#define JIO_IO_FUA 0x1u       /* WRITE, ZERO, UNMAP: durable before it completes */
#define JIO_IO_MAY_UNMAP 0x2u /* ZERO: the space may be given back */

/*
 * What the filter wants to happen to an I/O. Exactly one verdict per call.
 *
 *              from io_start                                 from io_done
 * PASS         to the layers below; io_done follows           the completion goes up, with its status
 * COMPLETE     done by the filter: the guest sees JIO_OK      not allowed
 * FAIL         the guest sees *out_status                     not allowed
 * DEFER        the filter holds it: later io_continue or      the filter holds the completion: later
 *              io_complete, exactly one, exactly once         io_release, exactly once
 */
typedef uint32_t jio_verdict_t;
#define JIO_PASS 1u
#define JIO_COMPLETE 2u
#define JIO_FAIL 3u
#define JIO_DEFER 4u

/* A buffer of an I/O. Frozen: no size in front, never grows. */
typedef struct jio_iovec {
    void *base;
    uint64_t len_bytes;
} jio_iovec_t;

/*
 * One I/O of the guest. Owned by the host; the filter reads it, and writes filter_word only.
 *
 * Life: from the call of io_start until the first of these:
 *   io_start has returned COMPLETE or FAIL; io_done has returned PASS; the filter has called
 *   io_complete or io_release for it; io_abort has returned JIO_OK for it.
 * While a call of the filter with this I/O runs it stays alive in any case.
 *
 * The guest may change a WRITE's buffers while it is in flight: a filter copies first and computes
 * checksums over its copy, never over the buffer.
 */
typedef struct jio_io {
    uint32_t size;             /* bytes of this struct, set by the host */
    uint32_t kind;             /* JIO_IO_* */
    uint32_t flags;            /* JIO_IO_FUA ... */
    uint32_t iov_count;        /* 0 for ZERO, UNMAP and FLUSH; at most JIO_IOV_MAX */
    uint64_t id;               /* unique among the I/Os of this open disk; for logs */
    uint64_t offset_bytes;     /* multiple of the disk's block_bytes; 0 for FLUSH */
    uint64_t len_bytes;        /* multiple of block_bytes, > 0; the sum of the buffers; 0 for FLUSH */
    const jio_iovec_t *iov;    /* NULL if iov_count is 0 */
    uint64_t filter_word[2];   /* the filter's own, zero at io_start, kept until the I/O's end */
    uint64_t reserved[3];      /* zero */
} jio_io_t;

/*
 * An I/O of the filter itself, handed to submit(): it goes to the layers below this filter only, and
 * this filter never sees it in io_start.
 *
 * Owned by the filter, which keeps it and its buffers alive and unchanged until `done` is called.
 * `done` is called exactly once if submit returned JIO_OK, never otherwise; [callback]: it must not
 * block; never from inside submit, perhaps before submit has returned (on another thread). Once `done`
 * is entered the host does not touch the request any more: `done` may free or resubmit it.
 */
typedef struct jio_request {
    uint32_t size;             /* bytes of this struct, set by the filter */
    uint32_t kind;
    uint32_t flags;
    uint32_t iov_count;
    uint64_t offset_bytes;     /* as in jio_io_t */
    uint64_t len_bytes;
    const jio_iovec_t *iov;
    void (*done)(void *userdata, struct jio_request *request, jio_status_t status);
    void *userdata;
    uint64_t host_word[4];     /* the host's own while the request is submitted */
    uint64_t reserved[2];      /* zero */
} jio_request_t;

/* ------------------------------------------------------------------------------------------------
 * Disks
 */

/* The host's handle of a disk. Valid from the call that hands it over (attach, open, detach) until that
 * call returns (attach, detach, an open that failed) or close returns (an open that succeeded). */
typedef struct jio_disk jio_disk_t;

/* An open sidecar: valid until sidecar_close, at the longest until the disk's close returns. */
typedef struct jio_sidecar jio_sidecar_t;

/* A property of a disk: two NUL-terminated UTF-8 strings. Frozen: never grows. */
typedef struct jio_property {
    const char *key;
    const char *value;
} jio_property_t;

/* Who opens the disk (jio_disk_info_t.purpose). */
#define JIO_PURPOSE_VM 1u      /* the process of a running VM: the guest will issue I/O */
#define JIO_PURPOSE_OFFLINE 2u /* a tool; there is no guest, and perhaps no daemon */

/* jio_disk_info_t.flags */
#define JIO_DISK_READ_ONLY 0x1u /* nothing will be written through this open */
#define JIO_DISK_MIGRATED 0x2u  /* opened as the destination of a migration */
#define JIO_DISK_CREATED 0x4u   /* the disk was just made: it reads as zeros everywhere */

/*
 * What the host knows of a disk. The struct and all it points to are the host's, and valid during the
 * call only. Strings are NUL-terminated UTF-8 and never NULL (empty if not known).
 */
typedef struct jio_disk_info {
    uint32_t size;             /* bytes of this struct, set by the host */
    uint32_t purpose;          /* JIO_PURPOSE_* */
    uint32_t flags;            /* JIO_DISK_* */
    uint32_t block_bytes;      /* power of two: every I/O's offset and length are multiples of it */
    uint64_t capacity_bytes;
    uint8_t disk_uuid[16];     /* changes when the disk is copied, if the host can tell; else zeros */
    uint8_t vm_uuid[16];       /* zeros if no VM is known (offline) */
    const char *label;         /* short name of the disk in its VM, for example "disk0" */
    const char *path;          /* where the disk is, for messages; not to be opened by the filter */
    const char *vm_name;
    const char *run_dir;       /* folder for shared mappings and sockets; emptied at the host's boot */
    const char *boot_id;       /* changes at every boot of the host */
    const jio_property_t *properties;
    uint64_t property_count;   /* at most JIO_PROPERTIES_MAX */
    uint64_t content_id;        /* of this opening: the host changes it at every opening for writing,
                                   through a filter or not; 0: the host cannot tell */
    uint64_t content_id_before; /* what it was before this opening; another one than was seen last: the
                                   disk was written, or may have been, without the filter; 0 as above */
    uint64_t reserved[2];      /* zero */
} jio_disk_info_t;

/* How a disk is closed. */
#define JIO_CLOSE_CLEAN 1u   /* orderly: the filter writes down that nothing is missing */
#define JIO_CLOSE_HANDOFF 2u /* another host opens it next (migration): as clean, and state is left for it */
#define JIO_CLOSE_LOST 3u    /* the disk is gone from under the host: do not touch the sidecar */

/* Events that come in steps (jio_snapshot_t.phase, jio_clone_t.phase). */
#define JIO_PHASE_PRE 1u    /* about to happen; a negative answer forbids it */
#define JIO_PHASE_POST 2u   /* has happened */
#define JIO_PHASE_CANCEL 3u /* did not happen after PRE; nothing changed */

#define JIO_SNAPSHOT_CREATE 1u      /* later writes go to a new layer; the content stays as it is */
#define JIO_SNAPSHOT_REVERT 2u      /* the content becomes that of the snapshot */
#define JIO_SNAPSHOT_CONSOLIDATE 3u /* layers are merged; the content stays as it is */

typedef struct jio_snapshot {
    uint32_t size;
    uint32_t event;            /* JIO_SNAPSHOT_* */
    uint32_t phase;            /* JIO_PHASE_* */
    uint32_t flags;            /* zero */
    uint64_t snapshot_id;      /* the host's number of the snapshot */
    uint64_t reserved[2];      /* zero */
} jio_snapshot_t;

typedef struct jio_clone {
    uint32_t size;
    uint32_t phase;            /* JIO_PHASE_* */
    uint32_t flags;            /* zero */
    uint32_t pad;              /* zero */
    uint8_t dest_disk_uuid[16];
    const char *dest_path;     /* as jio_disk_info_t.path */
    uint64_t reserved[2];      /* zero */
} jio_clone_t;

#define JIO_MIGRATE_PREPARE 1u /* source, disk running: a negative answer forbids the migration */
#define JIO_MIGRATE_HANDOFF 2u /* source, stunned: last state to the sidecar; close(HANDOFF) follows */
#define JIO_MIGRATE_ARRIVED 3u /* destination, open but before the first I/O */
#define JIO_MIGRATE_CANCEL 4u  /* source: it goes on running here */

#define JIO_MIGRATE_VM 1u      /* the VM moves, the disk stays */
#define JIO_MIGRATE_STORAGE 2u /* the disk moves */

typedef struct jio_migrate {
    uint32_t size;
    uint32_t phase;            /* JIO_MIGRATE_PREPARE ... */
    uint32_t what;             /* JIO_MIGRATE_VM, JIO_MIGRATE_STORAGE or both */
    uint32_t flags;            /* zero */
    const char *dest_path;     /* as jio_disk_info_t.path; empty if the disk stays */
    uint64_t reserved[2];      /* zero */
} jio_migrate_t;

/* What one disk needs of the host, at most. The host may refuse to attach or open if it cannot give it. */
typedef struct jio_requirements {
    uint32_t size;             /* set by the host: how much the filter may fill */
    uint32_t timers;           /* timers running at once */
    uint32_t work_items;       /* work queued at once */
    uint32_t requests;         /* own requests in flight at once */
    uint64_t heap_bytes;       /* from heap_alloc */
    uint64_t mapped_bytes;     /* shared mappings that the filter makes in run_dir */
    uint64_t sidecar_bytes;    /* all sidecars of the disk */
    uint64_t defer_ns_max;     /* the longest that the filter ever defers an I/O or holds a completion */
    uint64_t reserved[4];
} jio_requirements_t;

/* jio_filter_status_t.state */
#define JIO_STATE_IDLE 1u      /* attached, but told to do nothing */
#define JIO_STATE_STREAMING 2u /* every write is captured in order */
#define JIO_STATE_TRACKING 3u  /* only the places of writes are noted */
#define JIO_STATE_SYNCING 4u   /* places noted earlier are being read and sent */
#define JIO_STATE_FAILED 5u    /* a defect stopped replication; I/O passes, all is to be resynced */

/* jio_filter_status_t.alarms */
#define JIO_ALARM_NO_CONSUMER 0x1u     /* nobody takes what is captured */
#define JIO_ALARM_BACK_PRESSURE 0x2u   /* writes are being delayed */
#define JIO_ALARM_TRACKING 0x4u        /* no new consistent point can be made */
#define JIO_ALARM_SIDECAR 0x8u         /* the sidecar cannot be read or written */
#define JIO_ALARM_INTERNAL 0x10u       /* a defect was stopped; see the log */
#define JIO_ALARM_ACK_FALLBACK 0x20u   /* write-through was given up for a while */

/* A reading of one disk; each member is right by itself, all together may be a little apart in time. */
typedef struct jio_filter_status {
    uint32_t size;             /* set by the host: how much the filter may fill */
    uint32_t state;            /* JIO_STATE_* */
    uint32_t alarms;           /* JIO_ALARM_* */
    uint32_t pad;              /* zero */
    uint64_t epoch;            /* of the attach; a new one for each open that can write */
    uint64_t published_seq;    /* the last record captured; 0 is none */
    uint64_t durable_seq;      /* the last record known to be durable elsewhere */
    uint64_t lane_used_bytes;  /* captured, not yet durable elsewhere */
    uint64_t lane_capacity_bytes;
    uint64_t dirty_bytes;      /* noted only, to be synced */
    uint64_t deferred_count;   /* I/Os deferred since open */
    uint64_t deferred_ns_max;  /* the longest deferral since open */
    uint64_t held_count;       /* completions held since open */
    uint64_t tracking_count;   /* times it fell back to tracking since open */
    uint64_t intent_bytes;     /* would be synced if the host crashed now */
    uint64_t intent_late_count; /* changes that passed before that was written down, since open */
    uint64_t synced_bytes;     /* read and captured by syncs since open */
    uint64_t held_bytes;       /* read by syncs since open, and held elsewhere already: not captured */
    uint64_t reserved[2];
} jio_filter_status_t;

/* Callbacks that the filter hands to the host: the userdata comes back first, untouched. */
typedef void (*jio_task_fn)(void *userdata);

/* A callback that the host hands to property_list: borrowed strings, valid during the call. */
typedef void (*jio_property_fn)(void *userdata, const char *key, const char *value);

/* A running timer. Never reused in a process; 0 is none. */
typedef uint64_t jio_timer_t;

/* Levels of log and event. */
#define JIO_LOG_ERROR 1u
#define JIO_LOG_WARN 2u
#define JIO_LOG_INFO 3u
#define JIO_LOG_DEBUG 4u

/* ------------------------------------------------------------------------------------------------
 * The host's services. One table per process, valid and unchanged from jio_filter_entry until the
 * process ends. Every function is safe to call from several threads at once.
 *
 * host_ctx is handed back as it is in the table. `disk` must be a disk in the sense of jio_disk_t;
 * where NULL is allowed it says so.
 */
typedef struct jio_host {
    uint32_t size;        /* bytes of this table, set by the host */
    uint32_t abi_version; /* JIO_ABI_VERSION that the host was built with */
    void *host_ctx;
    const char *name;     /* for messages, for example "simhost 0.1.0"; lives as long as the table */

    /* --- Memory, time, chance, words. None blocks. --------------------------------------------- */

    /* [any] Appends one message of len_bytes bytes (UTF-8, no NUL needed, no newline) to the host's
     * log. disk may be NULL: about the filter as a whole. Borrowed during the call. */
    void (*log)(void *host_ctx, jio_disk_t *disk, uint32_t level, const char *message,
                uint64_t len_bytes);

    /* [any] Memory from the host's heap for this disk (or NULL: for the filter as a whole), not
     * cleared. align_bytes: a power of two, at most 4096. NULL if there is none, or len_bytes is 0.
     * Owned by the filter until heap_free; memory of a disk must be freed before its close returns. */
    void *(*heap_alloc)(void *host_ctx, jio_disk_t *disk, uint64_t len_bytes, uint64_t align_bytes);
    /* [any] Gives it back. disk as in heap_alloc. ptr may be NULL: nothing happens. */
    void (*heap_free)(void *host_ctx, jio_disk_t *disk, void *ptr);

    /* [any] Nanoseconds since some moment before the process started; never runs backwards. */
    uint64_t (*now_mono_ns)(void *host_ctx);
    /* [any] Nanoseconds since 1970-01-01 UTC; may jump. */
    uint64_t (*now_wall_ns)(void *host_ctx);
    /* [any] Fills the buffer with unpredictable bytes. JIO_OK, or JIO_E_IO with the buffer untouched. */
    jio_status_t (*random_bytes)(void *host_ctx, void *buffer, uint64_t len_bytes);

    /* --- Answers to I/Os that the filter holds. None blocks, and none calls the filter from inside:
     *     they may be called with a lock of the filter held. ------------------------------------- */

    /* [any] A deferred I/O goes on to the layers below; io_done follows, on another thread. May be
     * called before the io_start that returns DEFER has returned (on another thread).
     * JIO_E_DENIED: it is not deferred; nothing changed. */
    jio_status_t (*io_continue)(jio_disk_t *disk, jio_io_t *io);
    /* [any] A deferred I/O ends here: the guest sees `status`; no io_done. For a READ with JIO_OK the
     * filter has filled the buffers. Otherwise as io_continue. */
    jio_status_t (*io_complete)(jio_disk_t *disk, jio_io_t *io, jio_status_t status);
    /* [any] A held completion goes up with the status that it came with. May be called before the
     * io_done that returns DEFER has returned. JIO_E_DENIED: its completion is not held. */
    jio_status_t (*io_release)(jio_disk_t *disk, jio_io_t *io);

    /* --- The filter's own I/O -------------------------------------------------------------------- */

    /* [any], from the call of open to the return of close. Does not block. Queues `request`, see
     * jio_request_t. JIO_E_BUSY: too many in flight, try again when one is done; JIO_E_RANGE: beyond
     * the disk or a limit; JIO_E_INVALID: malformed. On failure `done` is not called. There is no
     * order among requests, nor between them and guest I/O. */
    jio_status_t (*submit)(jio_disk_t *disk, jio_request_t *request);

    /* --- Sidecars: small files beside the disk that the host keeps for the filter, copies with the
     *     disk and deletes with it. All block: [work] [control] only. `key` is the filter's own number
     *     of the sidecar, not 0. Lengths and offsets are multiples of JIO_SIDECAR_UNIT_BYTES. ------- */

    /* A new sidecar of len_bytes zeros, durable (the file and its name) when it returns, and open.
     * JIO_E_EXISTS: it is there; JIO_E_NO_SPACE, JIO_E_IO, JIO_E_RANGE. */
    jio_status_t (*sidecar_create)(jio_disk_t *disk, uint64_t key, uint64_t len_bytes,
                                   jio_sidecar_t **out_sidecar);
    /* Opens one. JIO_E_NOT_FOUND; JIO_E_BUSY: another process or handle has it open. */
    jio_status_t (*sidecar_open)(jio_disk_t *disk, uint64_t key, jio_sidecar_t **out_sidecar,
                                 uint64_t *out_len_bytes);
    /* Closes it; the handle is dead afterwards. NULL: nothing happens. */
    void (*sidecar_close)(jio_disk_t *disk, jio_sidecar_t *sidecar);
    /* Reads exactly len_bytes, or fails and leaves the buffer's content undefined. */
    jio_status_t (*sidecar_read)(jio_disk_t *disk, jio_sidecar_t *sidecar, uint64_t offset_bytes,
                                 void *buffer, uint64_t len_bytes);
    /* Writes exactly len_bytes: durable when JIO_OK is returned. On failure, and after a crash in the
     * middle, each 512-byte sector of the range holds its old or its new content. */
    jio_status_t (*sidecar_write)(jio_disk_t *disk, jio_sidecar_t *sidecar, uint64_t offset_bytes,
                                  const void *buffer, uint64_t len_bytes);
    /* Deletes a sidecar that is not open; durable when it returns. JIO_E_NOT_FOUND; JIO_E_BUSY: open. */
    jio_status_t (*sidecar_delete)(jio_disk_t *disk, uint64_t key);

    /* --- Timers and work -------------------------------------------------------------------------- */

    /* [any], from the call of open to the return of close. Calls fn(userdata) once, delay_ns from now or
     * a little later, [callback]. Does not block. userdata is the filter's; it must live until fn has
     * run or the cancel has returned JIO_OK. *out_timer is written before fn can run.
     * JIO_E_NO_MEMORY: too many timers. */
    jio_status_t (*timer_start)(jio_disk_t *disk, uint64_t delay_ns, jio_task_fn fn, void *userdata,
                                jio_timer_t *out_timer);
    /* [work] [control] JIO_OK: fn will never run. JIO_E_NOT_FOUND: fn has run, or the timer is 0. In
     * either case fn is not running when this returns: it waits for an fn that has begun. Called by fn
     * itself it returns JIO_E_NOT_FOUND at once. Do not hold a lock that fn takes. */
    jio_status_t (*timer_cancel)(jio_disk_t *disk, jio_timer_t timer);

    /* [any], from the call of open to the return of close. Runs fn(userdata) once, soon, [work]. Does not
     * block. Items may run at the same time and in any order. JIO_E_NO_MEMORY: the queue is full; fn will
     * not run. */
    jio_status_t (*work_submit)(jio_disk_t *disk, jio_task_fn fn, void *userdata);
    /* [control] Waits until all work of the disk that was submitted before has finished. */
    jio_status_t (*work_flush)(jio_disk_t *disk);

    /* --- Above: every host has them (JIO_HOST_REQUIRED_SIZE). Below: may be missing. ------------- */

    /* [any] [optional] Copies the value of a property as it is now, with its final NUL, into the buffer.
     * JIO_E_NOT_FOUND; JIO_E_RANGE: the buffer is too short (JIO_PROPERTY_VALUE_MAX always does). */
    jio_status_t (*property_get)(jio_disk_t *disk, const char *key, char *buffer,
                                 uint64_t buffer_len_bytes);
    /* [any] [optional] Tells the host's operator: `level` as in log, `code` is the filter's own. disk may
     * be NULL. Borrowed during the call. Does not block; the host may drop repeats. */
    void (*event_post)(void *host_ctx, jio_disk_t *disk, uint32_t level, uint32_t code,
                       const char *message, uint64_t len_bytes);

    /* Slots for what is appended next: NULL. A slot that is taken is replaced in place, in order. */
    void (*reserved[8])(void);
} jio_host_t;

/* What a filter may count on in every host's table: up to and without property_get. */
#define JIO_HOST_REQUIRED_SIZE ((uint32_t)offsetof(jio_host_t, property_get))

/* ------------------------------------------------------------------------------------------------
 * The filter. One table per library, valid and unchanged until the process ends; so are its strings.
 *
 * `instance` is what open put into *out_instance: one per open disk, the filter's own, never looked at
 * by the host, perhaps NULL.
 */

/* jio_filter_t.filter_class: filters of a disk run in this order; at most one of each class per disk. */
#define JIO_CLASS_INSPECTION 1u
#define JIO_CLASS_COMPRESSION 2u
#define JIO_CLASS_ENCRYPTION 3u
#define JIO_CLASS_REPLICATION 4u
#define JIO_CLASS_CACHE 5u

typedef struct jio_filter {
    uint32_t size;        /* bytes of this table, set by the filter */
    uint32_t abi_version; /* JIO_ABI_VERSION that the filter was built with */
    const char *name;     /* [0-9a-z_-], at most 32 bytes */
    const char *vendor;
    const char *version;
    uint32_t filter_class; /* JIO_CLASS_* */
    uint32_t flags;        /* zero */

    /* --- Life. See the picture in CONVENTIONS.md. All [control]. --------------------------------- */

    /* What a disk with this info needs. info may be NULL: the most that any disk needs. Fills *out as far
     * as out->size allows. No disk need be open. */
    jio_status_t (*requirements)(const jio_disk_info_t *info, jio_requirements_t *out);

    /* A disk comes under this filter, for the first time: makes its sidecar. The disk is not open and no
     * I/O runs. Of the host's services only memory, time, log, sidecars, properties and events may be
     * used. JIO_E_EXISTS: it is under this filter already. After a failure nothing is left behind. */
    jio_status_t (*attach)(jio_disk_t *disk, const jio_disk_info_t *info);

    /* A disk leaves this filter: deletes its sidecar. As attach; succeeds if there is nothing left. */
    jio_status_t (*detach)(jio_disk_t *disk, const jio_disk_info_t *info);

    /* An attached disk is opened by this process. On JIO_OK *out_instance is set and I/O may follow once
     * open has returned; close will be called. After a failure nothing is held and the host does not open
     * the disk (with JIO_E_NOT_FOUND: not attached, or the sidecar is missing). A filter that merely
     * cannot replicate opens, lets everything pass and raises an alarm. */
    jio_status_t (*open)(jio_disk_t *disk, const jio_disk_info_t *info, void **out_instance);

    /* The disk is closed. No I/O is in flight, none is held, none follows; control calls have returned.
     * Before it returns the filter has cancelled its timers, waited for its work and its requests (which
     * the host still completes), closed its sidecars and freed the disk's memory. The instance is dead
     * afterwards, whatever is returned: the status is for the log. how: JIO_CLOSE_*. */
    jio_status_t (*close)(void *instance, uint32_t how);

    /* --- I/O. All [io]. --------------------------------------------------------------------------- */

    /* An I/O on its way down. With FAIL *out_status is set to a negative code; otherwise it is not
     * touched. Several threads at once; overlapping I/Os in flight have no order. */
    jio_verdict_t (*io_start)(void *instance, jio_io_t *io, jio_status_t *out_status);

    /* The completion, on its way up, of an I/O that went to the layers below. PASS or DEFER only. */
    jio_verdict_t (*io_done)(void *instance, jio_io_t *io, jio_status_t status);

    /* The guest gives up on an I/O that the filter holds (deferred, or its completion). Must be answered:
     *   JIO_OK            let go: it ends here with JIO_E_CANCELLED; the filter does not answer it again,
     *                     io_done does not follow. (A held completion: goes up now, as by io_release.)
     *   JIO_E_BUSY        kept: the usual answer will come, within the filter's time limit.
     *   JIO_E_NOT_FOUND   not held: it has been answered, or is being answered, on another thread. */
    jio_status_t (*io_abort)(void *instance, jio_io_t *io);

    /* --- Above: every filter has them (JIO_FILTER_REQUIRED_SIZE). Below: may be missing. --------- */

    /* --- Events. All [control] [optional]. No I/O is in flight or held between the return of stun and
     *     the call of unstun; snapshot, grow and migrate(HANDOFF) come in between. A missing snapshot, clone,
     *     migrate or grow means that the disk cannot do that under this filter. -------------------- */

    /* I/O has been drained and stops; a good moment to write state down. */
    jio_status_t (*stun)(void *instance);
    /* I/O goes on. */
    jio_status_t (*unstun)(void *instance);
    jio_status_t (*snapshot)(void *instance, const jio_snapshot_t *info);
    /* The disk is being copied by this process, which has it open. The sidecars are copied too. */
    jio_status_t (*clone)(void *instance, const jio_clone_t *info);
    jio_status_t (*migrate)(void *instance, const jio_migrate_t *info);
    /* The disk has been enlarged; I/O beyond the old end comes after this has returned JIO_OK.
     * JIO_E_RANGE: that is more than the filter can serve. A host never makes a disk smaller. */
    jio_status_t (*grow)(void *instance, uint64_t new_capacity_bytes);

    /* --- Properties. [control] [optional] --------------------------------------------------------- */

    /* Sets a property while the disk is open. JIO_E_NOT_FOUND: no such property, or it cannot be changed
     * while open; JIO_E_INVALID: no such value. On failure the old value holds. */
    jio_status_t (*property_set)(void *instance, const char *key, const char *value);
    /* The value in force, with its final NUL. JIO_E_NOT_FOUND; JIO_E_RANGE as in jio_host_t. */
    jio_status_t (*property_get)(void *instance, const char *key, char *buffer,
                                 uint64_t buffer_len_bytes);
    /* Calls fn once for each property that the filter knows, before it returns. */
    jio_status_t (*property_list)(void *instance, jio_property_fn fn, void *userdata);

    /* --- State. [optional] ------------------------------------------------------------------------ */

    /* [any], while the disk is open. Does not block. Fills *out as far as out->size allows. */
    jio_status_t (*status)(void *instance, jio_filter_status_t *out);
    /* [control] Waits until all that was captured before this call is durable elsewhere, at most
     * timeout_ns. JIO_E_TIMED_OUT; JIO_E_BUSY: it is tracking or syncing, so waiting is of no use. I/O
     * goes on meanwhile. */
    jio_status_t (*drain)(void *instance, uint64_t timeout_ns);

    /* Slots for what is appended next: NULL. A slot that is taken is replaced in place, in order. */
    void (*reserved[8])(void);
} jio_filter_t;

/* What a host may count on in every filter's table: up to and without stun. */
#define JIO_FILTER_REQUIRED_SIZE ((uint32_t)offsetof(jio_filter_t, stun))

/*
 * The one exported symbol of a filter. Called once per process, before anything else, [control].
 *
 * `host` and host->abi_version (given again as host_abi_version, so that it can be refused without
 * reading the table) are checked by the filter. Returns its table, or NULL: it cannot work with this
 * host, and has said why in the host's log if the table has one. Called again with the same host it
 * returns the same table; with another one, NULL.
 */
const jio_filter_t *jio_filter_entry(const jio_host_t *host, uint32_t host_abi_version);
#define JIO_FILTER_ENTRY_SYMBOL "jio_filter_entry"
typedef const jio_filter_t *(*jio_filter_entry_fn)(const jio_host_t *host, uint32_t host_abi_version);

/* ------------------------------------------------------------------------------------------------
 * Layout of version 1.0, for 64-bit targets. An appended member adds a line; no line ever changes.
 */
#if defined(__cplusplus)
#define JIO_ASSERT(what, text) static_assert(what, text)
#else
#define JIO_ASSERT(what, text) _Static_assert(what, text)
#endif
#define JIO_ASSERT_AT(type, member, offset) \
    JIO_ASSERT(offsetof(type, member) == (offset), #type "." #member " has moved")
#define JIO_ASSERT_SIZE(type, bytes) JIO_ASSERT(sizeof(type) == (bytes), #type " has another size")

JIO_ASSERT(sizeof(void *) == 8, "the contract is for 64-bit targets");
JIO_ASSERT(sizeof(void (*)(void)) == 8, "the contract is for 64-bit targets");
JIO_ASSERT(JIO_ABI_VERSION == ((JIO_ABI_MAJOR << 16) | JIO_ABI_MINOR), "version numbers disagree");

JIO_ASSERT_SIZE(jio_iovec_t, 16);
JIO_ASSERT_SIZE(jio_property_t, 16);

JIO_ASSERT_SIZE(jio_io_t, 88);
JIO_ASSERT_AT(jio_io_t, id, 16);
JIO_ASSERT_AT(jio_io_t, offset_bytes, 24);
JIO_ASSERT_AT(jio_io_t, len_bytes, 32);
JIO_ASSERT_AT(jio_io_t, iov, 40);
JIO_ASSERT_AT(jio_io_t, filter_word, 48);

JIO_ASSERT_SIZE(jio_request_t, 104);
JIO_ASSERT_AT(jio_request_t, offset_bytes, 16);
JIO_ASSERT_AT(jio_request_t, iov, 32);
JIO_ASSERT_AT(jio_request_t, done, 40);
JIO_ASSERT_AT(jio_request_t, userdata, 48);
JIO_ASSERT_AT(jio_request_t, host_word, 56);

JIO_ASSERT_SIZE(jio_disk_info_t, 144);
JIO_ASSERT_AT(jio_disk_info_t, capacity_bytes, 16);
JIO_ASSERT_AT(jio_disk_info_t, disk_uuid, 24);
JIO_ASSERT_AT(jio_disk_info_t, vm_uuid, 40);
JIO_ASSERT_AT(jio_disk_info_t, label, 56);
JIO_ASSERT_AT(jio_disk_info_t, boot_id, 88);
JIO_ASSERT_AT(jio_disk_info_t, properties, 96);
JIO_ASSERT_AT(jio_disk_info_t, property_count, 104);
JIO_ASSERT_AT(jio_disk_info_t, content_id, 112);
JIO_ASSERT_AT(jio_disk_info_t, content_id_before, 120);

JIO_ASSERT_SIZE(jio_snapshot_t, 40);
JIO_ASSERT_SIZE(jio_clone_t, 56);
JIO_ASSERT_SIZE(jio_migrate_t, 40);
JIO_ASSERT_SIZE(jio_requirements_t, 80);
JIO_ASSERT_AT(jio_requirements_t, heap_bytes, 16);
JIO_ASSERT_AT(jio_requirements_t, defer_ns_max, 40);
JIO_ASSERT_SIZE(jio_filter_status_t, 144);
JIO_ASSERT_AT(jio_filter_status_t, epoch, 16);
JIO_ASSERT_AT(jio_filter_status_t, tracking_count, 88);
JIO_ASSERT_AT(jio_filter_status_t, synced_bytes, 112);
JIO_ASSERT_AT(jio_filter_status_t, held_bytes, 120);

JIO_ASSERT_SIZE(jio_host_t, 264);
JIO_ASSERT_AT(jio_host_t, host_ctx, 8);
JIO_ASSERT_AT(jio_host_t, log, 24);
JIO_ASSERT_AT(jio_host_t, io_continue, 72);
JIO_ASSERT_AT(jio_host_t, submit, 96);
JIO_ASSERT_AT(jio_host_t, sidecar_create, 104);
JIO_ASSERT_AT(jio_host_t, timer_start, 152);
JIO_ASSERT_AT(jio_host_t, work_submit, 168);
JIO_ASSERT_AT(jio_host_t, property_get, 184);
JIO_ASSERT_AT(jio_host_t, event_post, 192);
JIO_ASSERT_AT(jio_host_t, reserved, 200);

JIO_ASSERT_SIZE(jio_filter_t, 256);
JIO_ASSERT_AT(jio_filter_t, name, 8);
JIO_ASSERT_AT(jio_filter_t, filter_class, 32);
JIO_ASSERT_AT(jio_filter_t, requirements, 40);
JIO_ASSERT_AT(jio_filter_t, open, 64);
JIO_ASSERT_AT(jio_filter_t, io_start, 80);
JIO_ASSERT_AT(jio_filter_t, stun, 104);
JIO_ASSERT_AT(jio_filter_t, property_set, 152);
JIO_ASSERT_AT(jio_filter_t, status, 176);
JIO_ASSERT_AT(jio_filter_t, reserved, 192);

#ifdef __cplusplus
}
#endif

#endif /* JIO_IOFILTER_H */
