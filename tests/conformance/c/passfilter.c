/*
 * The smallest filter that keeps the contract: everything passes. The other implementation of the
 * filter's side, so that a host can be tested without the real library.
 *
 * Property pass.mode: `pass` (default), `defer` (each write is continued later, on another thread), `hold`
 * (each completion is released later), `early` (as defer, before io_start has returned).
 */
#include <stdlib.h>
#include <string.h>

#include "iofilter.h"

#define SIDECAR_KEY 0x7061737366696c74u
#define HANDED_OVER 1u

enum mode { PASS, DEFER, HOLD, EARLY };

struct instance {
    const jio_host_t *host;
    jio_disk_t *disk;
    enum mode mode;
};

/* What is to be answered: lives from io_start or io_done to the work function. */
struct answer {
    struct instance *instance;
    jio_io_t *io;
    jio_status_t (*with)(jio_disk_t *disk, jio_io_t *io);
};

static const jio_host_t *host;

static jio_status_t pass_requirements(const jio_disk_info_t *info, jio_requirements_t *out) {
    (void)info;
    if (!out || out->size < sizeof out->size)
        return JIO_E_INVALID;
    jio_requirements_t all = {0};
    all.size = out->size;
    all.timers = 0;
    all.work_items = 1024;
    all.sidecar_bytes = JIO_SIDECAR_UNIT_BYTES;
    memcpy(out, &all, out->size < sizeof all ? out->size : sizeof all);
    return JIO_OK;
}

static int usable(const jio_disk_t *disk, const jio_disk_info_t *info) {
    return disk && info && JIO_HAS(jio_disk_info_t, info, property_count);
}

static jio_status_t pass_attach(jio_disk_t *disk, const jio_disk_info_t *info) {
    jio_sidecar_t *sidecar;
    if (!usable(disk, info))
        return JIO_E_INVALID;
    jio_status_t status = host->sidecar_create(disk, SIDECAR_KEY, JIO_SIDECAR_UNIT_BYTES, &sidecar);
    if (status >= 0)
        host->sidecar_close(disk, sidecar);
    return status;
}

static jio_status_t pass_detach(jio_disk_t *disk, const jio_disk_info_t *info) {
    if (!usable(disk, info))
        return JIO_E_INVALID;
    jio_status_t status = host->sidecar_delete(disk, SIDECAR_KEY);
    return status == JIO_E_NOT_FOUND ? JIO_OK : status;
}

static enum mode mode_of(const jio_disk_info_t *info) {
    static const char *const names[] = {"pass", "defer", "hold", "early"};
    for (uint64_t i = 0; i < info->property_count; i++)
        for (int mode = PASS; mode <= EARLY; mode++)
            if (strcmp(info->properties[i].key, "pass.mode") == 0 &&
                strcmp(info->properties[i].value, names[mode]) == 0)
                return (enum mode)mode;
    return PASS;
}

static jio_status_t pass_open(jio_disk_t *disk, const jio_disk_info_t *info, void **out_instance) {
    jio_sidecar_t *sidecar;
    uint64_t len_bytes;
    if (!usable(disk, info) || !out_instance)
        return JIO_E_INVALID;
    jio_status_t status = host->sidecar_open(disk, SIDECAR_KEY, &sidecar, &len_bytes);
    if (status < 0)
        return status;
    host->sidecar_close(disk, sidecar);
    struct instance *instance = host->heap_alloc(host->host_ctx, disk, sizeof *instance, 16);
    if (!instance)
        return JIO_E_NO_MEMORY;
    instance->host = host;
    instance->disk = disk;
    instance->mode = mode_of(info);
    *out_instance = instance;
    return JIO_OK;
}

static jio_status_t pass_close(void *raw, uint32_t how) {
    struct instance *instance = raw;
    (void)how;
    if (!instance)
        return JIO_E_INVALID;
    host->work_flush(instance->disk);
    host->heap_free(host->host_ctx, instance->disk, instance);
    return JIO_OK;
}

static void answer_now(void *userdata) {
    struct answer *answer = userdata;
    answer->with(answer->instance->disk, answer->io);
    free(answer);
}

/* Answers the I/O from a work thread; 0: that is not possible now. */
static int answer_later(struct instance *instance, jio_io_t *io,
                        jio_status_t (*with)(jio_disk_t *, jio_io_t *)) {
    struct answer *answer = malloc(sizeof *answer);
    if (!answer)
        return 0;
    *answer = (struct answer){instance, io, with};
    io->filter_word[1] = HANDED_OVER; /* before a thread can answer it */
    if (host->work_submit(instance->disk, answer_now, answer) >= 0)
        return 1;
    free(answer);
    return 0;
}

static jio_verdict_t pass_io_start(void *raw, jio_io_t *io, jio_status_t *out_status) {
    struct instance *instance = raw;
    (void)out_status;
    if (!instance || !io || io->kind != JIO_IO_WRITE)
        return JIO_PASS;
    io->filter_word[0] = io->id;
    if (instance->mode == EARLY)
        return host->io_continue(instance->disk, io) >= 0 ? JIO_DEFER : JIO_PASS;
    if (instance->mode == DEFER && answer_later(instance, io, host->io_continue))
        return JIO_DEFER;
    return JIO_PASS;
}

static jio_verdict_t pass_io_done(void *raw, jio_io_t *io, jio_status_t status) {
    struct instance *instance = raw;
    (void)status;
    if (!instance || !io || io->kind != JIO_IO_WRITE)
        return JIO_PASS;
    if (io->filter_word[0] != io->id)
        return JIO_PASS + 1000; /* the host lost the filter's words: a verdict that it cannot miss */
    if (instance->mode == HOLD && answer_later(instance, io, host->io_release))
        return JIO_DEFER;
    return JIO_PASS;
}

static jio_status_t pass_io_abort(void *raw, jio_io_t *io) {
    (void)raw;
    /* Work that is queued cannot be taken back: the answer comes, or is just being given. */
    return io && io->filter_word[1] == HANDED_OVER ? JIO_E_BUSY : JIO_E_NOT_FOUND;
}

/* A filter of an earlier day: its table ends with what is required. */
static const struct {
    jio_filter_t table;
} pass = {{
    .size = JIO_FILTER_REQUIRED_SIZE,
    .abi_version = JIO_ABI_VERSION,
    .name = "passfilter",
    .vendor = "jetdr",
    .version = "1.0",
    .filter_class = JIO_CLASS_INSPECTION,
    .requirements = pass_requirements,
    .attach = pass_attach,
    .detach = pass_detach,
    .open = pass_open,
    .close = pass_close,
    .io_start = pass_io_start,
    .io_done = pass_io_done,
    .io_abort = pass_io_abort,
    /* Beyond the size: what lies there must not be called. */
    .stun = (jio_status_t(*)(void *))16,
    .unstun = (jio_status_t(*)(void *))16,
    .grow = (jio_status_t(*)(void *, uint64_t))16,
    .status = (jio_status_t(*)(void *, jio_filter_status_t *))16,
    .drain = (jio_status_t(*)(void *, uint64_t))16,
}};

const jio_filter_t *jio_filter_entry(const jio_host_t *offered, uint32_t host_abi_version) {
    if (JIO_ABI_MAJOR_OF(host_abi_version) != JIO_ABI_MAJOR || !offered)
        return NULL;
    if (host)
        return host == offered ? &pass.table : NULL;
    if (offered->abi_version != host_abi_version || offered->size < JIO_HOST_REQUIRED_SIZE)
        return NULL;
    const void *const *slots = (const void *const *)(const void *)&offered->log;
    for (size_t i = 0; i < (JIO_HOST_REQUIRED_SIZE - offsetof(jio_host_t, log)) / sizeof(void *); i++)
        if (!slots[i])
            return NULL;
    host = offered;
    return &pass.table;
}
