/*
 * A filter that breaks the contract on purpose, to show that the host's checks fire: property bad.how
 * says in which way. It breaks nothing but the one rule, so that a host survives to tell.
 */
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "iofilter.h"

#define SIDECAR_KEY 0x626164u

struct instance {
    jio_disk_t *disk;
    char how[32];
    jio_io_t *kept;
    jio_request_t request;
};

static const jio_host_t *host;
/* Outlives every disk: what comes too late is the host's to notice, not a crash of this. */
static jio_request_t late_request;
static atomic_int late_began;

static int is(const struct instance *instance, const char *how) {
    return strcmp(instance->how, how) == 0;
}

static void nothing(void *userdata) { (void)userdata; }

static void never_done(void *userdata, jio_request_t *request, jio_status_t status) {
    (void)userdata, (void)request, (void)status;
}

/* Runs on when close has long returned. */
static void submit_late(void *userdata) {
    struct timespec pause = {.tv_nsec = 500000000};
    atomic_store(&late_began, 1);
    nanosleep(&pause, NULL);
    late_request.size = sizeof late_request;
    late_request.kind = JIO_IO_FLUSH;
    late_request.done = never_done;
    host->submit(userdata, &late_request);
}

static void continue_twice(void *userdata) {
    struct instance *instance = userdata;
    jio_io_t *io = instance->kept;
    instance->kept = NULL;
    host->io_continue(instance->disk, io);
    host->io_continue(instance->disk, io);
}

static void complete_twice(void *userdata) {
    struct instance *instance = userdata;
    jio_io_t *io = instance->kept;
    instance->kept = NULL;
    host->io_complete(instance->disk, io, JIO_OK);
    host->io_complete(instance->disk, io, JIO_OK);
}

static int usable(const jio_disk_t *disk, const jio_disk_info_t *info) {
    return disk && info && JIO_HAS(jio_disk_info_t, info, property_count);
}

static jio_status_t bad_requirements(const jio_disk_info_t *info, jio_requirements_t *out) {
    (void)info;
    if (!out)
        return JIO_E_INVALID;
    out->timers = 1;
    return JIO_OK;
}

static jio_status_t bad_attach(jio_disk_t *disk, const jio_disk_info_t *info) {
    jio_sidecar_t *sidecar;
    if (!usable(disk, info))
        return JIO_E_INVALID;
    jio_status_t status = host->sidecar_create(disk, SIDECAR_KEY, JIO_SIDECAR_UNIT_BYTES, &sidecar);
    if (status >= 0)
        host->sidecar_close(disk, sidecar);
    return status;
}

static jio_status_t bad_detach(jio_disk_t *disk, const jio_disk_info_t *info) {
    if (!usable(disk, info))
        return JIO_E_INVALID;
    jio_status_t status = host->sidecar_delete(disk, SIDECAR_KEY);
    return status == JIO_E_NOT_FOUND ? JIO_OK : status;
}

static jio_status_t bad_open(jio_disk_t *disk, const jio_disk_info_t *info, void **out_instance) {
    jio_sidecar_t *sidecar;
    uint64_t len_bytes;
    jio_timer_t timer;
    uint8_t odd[512];
    if (!usable(disk, info) || !out_instance)
        return JIO_E_INVALID;
    jio_status_t status = host->sidecar_open(disk, SIDECAR_KEY, &sidecar, &len_bytes);
    if (status < 0)
        return status;
    struct instance *instance = calloc(1, sizeof *instance);
    if (!instance)
        return JIO_E_NO_MEMORY;
    instance->disk = disk;
    for (uint64_t i = 0; i < info->property_count; i++)
        if (strcmp(info->properties[i].key, "bad.how") == 0)
            strncpy(instance->how, info->properties[i].value, sizeof instance->how - 1);
    if (is(instance, "odd-sidecar"))
        host->sidecar_read(disk, sidecar, 0, odd, sizeof odd);
    if (!is(instance, "sidecar-left-open"))
        host->sidecar_close(disk, sidecar);
    if (is(instance, "heap-leak"))
        host->heap_alloc(host->host_ctx, disk, 4096, 4096);
    if (is(instance, "timer-left"))
        host->timer_start(disk, UINT64_C(3600000000000), nothing, NULL, &timer);
    *out_instance = instance;
    return JIO_OK;
}

static jio_status_t bad_close(void *raw, uint32_t how) {
    struct instance *instance = raw;
    (void)how;
    if (!instance)
        return JIO_E_INVALID;
    if (is(instance, "submit-after-close") &&
        host->work_submit(instance->disk, submit_late, instance->disk) >= 0)
        while (!atomic_load(&late_began))
            sched_yield();
    free(instance);
    return JIO_OK;
}

static jio_verdict_t bad_io_start(void *raw, jio_io_t *io, jio_status_t *out_status) {
    struct instance *instance = raw;
    jio_sidecar_t *sidecar;
    uint64_t len_bytes;
    if (!instance || !io || io->kind != JIO_IO_WRITE)
        return JIO_PASS;
    if (is(instance, "no-verdict"))
        return 0;
    if (is(instance, "wrong-verdict"))
        return 77;
    if (is(instance, "fail-without-status"))
        return JIO_FAIL;
    if (is(instance, "continue-undeferred")) {
        host->io_continue(instance->disk, io);
        return JIO_PASS;
    }
    if (is(instance, "release-unheld"))
        host->io_release(instance->disk, io);
    if (is(instance, "sidecar-in-io") &&
        host->sidecar_open(instance->disk, SIDECAR_KEY, &sidecar, &len_bytes) >= 0)
        host->sidecar_close(instance->disk, sidecar);
    if (is(instance, "flush-in-io"))
        host->work_flush(instance->disk);
    if (is(instance, "malformed-request"))
        host->submit(instance->disk, &instance->request);
    if ((is(instance, "continue-twice") || is(instance, "complete-twice")) && !instance->kept) {
        instance->kept = io;
        host->work_submit(instance->disk, is(instance, "continue-twice") ? continue_twice : complete_twice,
                          instance);
        return JIO_DEFER;
    }
    if (is(instance, "never-answers"))
        return JIO_DEFER;
    (void)out_status;
    return JIO_PASS;
}

static jio_verdict_t bad_io_done(void *raw, jio_io_t *io, jio_status_t status) {
    struct instance *instance = raw;
    (void)status;
    if (!instance || !io || io->kind != JIO_IO_WRITE)
        return JIO_PASS;
    if (is(instance, "done-completes"))
        return JIO_COMPLETE;
    if (is(instance, "done-no-verdict"))
        return 0;
    return JIO_PASS;
}

static jio_status_t bad_io_abort(void *raw, jio_io_t *io) {
    struct instance *instance = raw;
    (void)io;
    return is(instance, "never-answers") ? JIO_E_BUSY : JIO_E_NOT_FOUND;
}

static const jio_filter_t bad = {
    .size = sizeof(jio_filter_t),
    .abi_version = JIO_ABI_VERSION,
    .name = "badfilter",
    .vendor = "jetdr",
    .version = "1.0",
    .filter_class = JIO_CLASS_INSPECTION,
    .requirements = bad_requirements,
    .attach = bad_attach,
    .detach = bad_detach,
    .open = bad_open,
    .close = bad_close,
    .io_start = bad_io_start,
    .io_done = bad_io_done,
    .io_abort = bad_io_abort,
};

const jio_filter_t *jio_filter_entry(const jio_host_t *offered, uint32_t host_abi_version) {
    if (JIO_ABI_MAJOR_OF(host_abi_version) != JIO_ABI_MAJOR || !offered ||
        offered->size < JIO_HOST_REQUIRED_SIZE)
        return NULL;
    host = offered;
    return &bad;
}
