/* The guest's I/O of the host in memory: one verdict, one answer, or a violation is counted. */
#include "memhost.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Longer than any filter may hold anything, on any loaded machine. */
#define PATIENCE_NS (30ull * 1000000000ull)

/* Where a guest's I/O stands; see the picture in CONVENTIONS.md. */
enum state { STARTING, EARLY_CONTINUE, EARLY_COMPLETE, DEFERRED, DOWN, EARLY_RELEASE, HELD, ENDED };

struct guest {
    jio_io_t io; /* first: a pointer to it is a pointer to this */
    jio_iovec_t iov[4];
    enum state state;
    jio_status_t status;
    pthread_mutex_t lock;
    pthread_cond_t changed;
};

/* Moves `guest` by the first pair that matches its state; what else the filter asks for is refused. */
static jio_status_t answer(jio_disk_t *disk, jio_io_t *io, const char *service, enum state early_from,
                           enum state early_to, enum state from, enum state to, jio_status_t status) {
    if (!disk || !io)
        return JIO_E_INVALID;
    struct guest *guest = (struct guest *)(void *)io;
    pthread_mutex_lock(&guest->lock);
    bool early = guest->state == early_from;
    bool usual = guest->state == from;
    if (early || usual) {
        guest->state = early ? early_to : to;
        if (to != DOWN && from != HELD)
            guest->status = status;
        pthread_cond_broadcast(&guest->changed);
    }
    pthread_mutex_unlock(&guest->lock);
    if (early || usual)
        return JIO_OK;
    host_violation(disk, service);
    return JIO_E_DENIED;
}

jio_status_t guest_continue(jio_disk_t *disk, jio_io_t *io) {
    return answer(disk, io, "io_continue of an I/O that is not deferred", STARTING, EARLY_CONTINUE,
                  DEFERRED, DOWN, 0);
}

jio_status_t guest_complete(jio_disk_t *disk, jio_io_t *io, jio_status_t status) {
    return answer(disk, io, "io_complete of an I/O that is not deferred", STARTING, EARLY_COMPLETE,
                  DEFERRED, ENDED, status);
}

jio_status_t guest_release(jio_disk_t *disk, jio_io_t *io) {
    return answer(disk, io, "io_release of a completion that is not held", DOWN, EARLY_RELEASE, HELD,
                  ENDED, 0);
}

/* The layer below: bytes in memory. */
jio_status_t disk_execute(struct jio_disk *disk, uint32_t kind, uint64_t offset, uint64_t len,
                            const jio_iovec_t *iov, uint32_t iov_count) {
    if (kind == JIO_IO_FLUSH)
        return JIO_OK;
    if (offset > disk->capacity_bytes || len > disk->capacity_bytes - offset)
        return JIO_E_RANGE;
    if (kind != JIO_IO_READ && offset < disk->fail_writes_to && offset + len > disk->fail_writes_from)
        return JIO_E_IO;
    if (kind == JIO_IO_ZERO || kind == JIO_IO_UNMAP)
        memset(disk->data + offset, 0, len);
    for (uint32_t i = 0; i < iov_count; i++) {
        if (kind == JIO_IO_READ)
            memcpy(iov[i].base, disk->data + offset, iov[i].len_bytes);
        else
            memcpy(disk->data + offset, iov[i].base, iov[i].len_bytes);
        offset += iov[i].len_bytes;
    }
    return JIO_OK;
}

/* Waits for the filter's answer; gives up on the I/O after abort_after_ns. */
static void wait_for_answer(struct jio_disk *disk, struct guest *guest, enum state while_in,
                            uint64_t abort_after_ns) {
    uint64_t limit = abort_after_ns ? abort_after_ns : PATIENCE_NS;
    struct timespec until = host_wall_after(limit);
    bool asked = false;
    while (guest->state == while_in) {
        if (pthread_cond_timedwait(&guest->changed, &guest->lock, &until) != ETIMEDOUT)
            continue;
        if (!abort_after_ns || asked) {
            host_violation(disk, "an I/O is held without end");
            abort();
        }
        pthread_mutex_unlock(&guest->lock); /* the filter may answer from inside */
        host_context = IO;
        jio_status_t answered = disk->filter->io_abort(disk->instance, &guest->io);
        host_context = NO_CONTEXT;
        pthread_mutex_lock(&guest->lock);
        asked = true;
        until = host_wall_after(PATIENCE_NS);
        if (answered == JIO_OK) {
            disk_count(disk, &disk->aborted, 1);
            if (guest->state != while_in)
                host_violation(disk, "io_abort let go of an I/O that was answered");
            if (while_in == DEFERRED)
                guest->status = JIO_E_CANCELLED;
            guest->state = ENDED;
        } else if (answered != JIO_E_BUSY && answered != JIO_E_NOT_FOUND) {
            host_violation(disk, "io_abort's answer is none of those allowed");
        }
    }
}

static void io_down(struct jio_disk *disk, struct guest *guest, uint64_t abort_after_ns) {
    jio_io_t *io = &guest->io;
    pthread_mutex_lock(&guest->lock);
    guest->state = DOWN;
    guest->status = disk_execute(disk, io->kind, io->offset_bytes, io->len_bytes, io->iov, io->iov_count);
    pthread_mutex_unlock(&guest->lock);
    host_context = IO;
    jio_verdict_t verdict = disk->filter->io_done(disk->instance, io, guest->status);
    host_context = NO_CONTEXT;
    pthread_mutex_lock(&guest->lock);
    if (verdict == JIO_DEFER) {
        disk_count(disk, &disk->held, 1);
        if (guest->state == DOWN) {
            guest->state = HELD;
            wait_for_answer(disk, guest, HELD, abort_after_ns);
        }
    } else if (verdict != JIO_PASS) {
        host_violation(disk, "io_done's verdict is neither PASS nor DEFER");
    } else if (guest->state == EARLY_RELEASE) {
        host_violation(disk, "io_release, then PASS");
    }
    guest->state = ENDED;
    pthread_mutex_unlock(&guest->lock);
}

static void io_up_and_down(struct jio_disk *disk, struct guest *guest, uint64_t abort_after_ns) {
    jio_status_t refused = JIO_OK;
    host_context = IO;
    jio_verdict_t verdict = disk->filter->io_start(disk->instance, &guest->io, &refused);
    host_context = NO_CONTEXT;
    pthread_mutex_lock(&guest->lock);
    bool early = guest->state != STARTING;
    if (early && verdict != JIO_DEFER)
        host_violation(disk, "an I/O was answered, and then got another verdict than DEFER");
    bool down = verdict == JIO_PASS;
    if (verdict == JIO_DEFER) {
        disk_count(disk, &disk->deferred, 1);
        if (guest->state == EARLY_CONTINUE)
            guest->state = DOWN;
        if (guest->state == STARTING) {
            guest->state = DEFERRED;
            wait_for_answer(disk, guest, DEFERRED, abort_after_ns);
        }
        down = guest->state == DOWN;
    } else if (verdict == JIO_FAIL) {
        guest->status = refused;
        if (refused >= 0)
            host_violation(disk, "FAIL without a status");
    } else if (verdict != JIO_PASS && verdict != JIO_COMPLETE) {
        host_violation(disk, "io_start's verdict is none");
        down = true;
    }
    pthread_mutex_unlock(&guest->lock);
    if (down)
        io_down(disk, guest, abort_after_ns);
}

jio_status_t guest_io(struct jio_disk *disk, uint32_t kind, uint32_t flags, uint64_t offset_bytes,
                      uint64_t len_bytes, uint8_t *buffer, unsigned pieces, uint64_t abort_after_ns) {
    struct guest *guest = host_must(calloc(1, sizeof *guest));
    bool has_data = kind == JIO_IO_READ || kind == JIO_IO_WRITE;
    pthread_mutex_init(&guest->lock, NULL);
    pthread_cond_init(&guest->changed, NULL);
    if (pieces == 0 || pieces > 4 || len_bytes / 512 < pieces)
        pieces = 1;
    uint64_t done = 0;
    for (unsigned i = 0; has_data && i < pieces; i++) {
        uint64_t piece = i + 1 == pieces ? len_bytes - done : len_bytes / 512 / pieces * 512;
        guest->iov[i].base = buffer + done;
        guest->iov[i].len_bytes = piece;
        done += piece;
    }
    guest->io.size = sizeof guest->io;
    guest->io.kind = kind;
    guest->io.flags = flags;
    guest->io.iov_count = has_data ? pieces : 0;
    guest->io.iov = has_data ? guest->iov : NULL;
    guest->io.offset_bytes = offset_bytes;
    guest->io.len_bytes = len_bytes;
    pthread_mutex_lock(&disk->lock);
    guest->io.id = ++disk->next_io;
    pthread_mutex_unlock(&disk->lock);
    io_up_and_down(disk, guest, abort_after_ns);
    /* Never freed: a filter that answers it again is told so, and does not crash the host. */
    return guest->status;
}
