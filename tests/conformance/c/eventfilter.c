/*
 * A filter that writes down in which order it is called: everything passes. It tells when the host
 * breaks the order of the contract: I/O while the disk is stunned, an event without a stun, I/O before ARRIVED.
 *
 * Property event.log: the file for the lines (`<label> <call> ...`; `<label> BROKEN ...` if the host erred).
 * Property event.refuse: a call to be answered with JIO_E_BUSY, for example `snapshot-create-pre`.
 * Property event.hold: `1`: completions of writes are released later, on another thread.
 * Its sidecar holds how often it was opened, written at open, stun and close.
 */
#include <inttypes.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "iofilter.h"

#define SIDECAR_KEY 0x6576656e74u

struct instance {
    jio_disk_t *disk;
    char label[32], log[512], refuse[64];
    uint64_t openings;
    int hold, must_arrive;
    atomic_int in_flight, stunned, arrived;
};

struct release {
    struct instance *instance;
    jio_io_t *io;
};

static const jio_host_t *host;

static void tell(const struct instance *instance, const char *format, ...) {
    char line[1024];
    int len = snprintf(line, sizeof line, "%s ", instance->label);
    va_list args;
    va_start(args, format);
    vsnprintf(line + len, sizeof line - (size_t)len, format, args);
    va_end(args);
    if (!instance->log[0])
        return;
    FILE *file = fopen(instance->log, "a");
    if (!file)
        return;
    fprintf(file, "%s\n", line);
    fclose(file);
}

static jio_status_t called(const struct instance *instance, const char *call) {
    tell(instance, "%s", call);
    return strcmp(instance->refuse, call) == 0 ? JIO_E_BUSY : JIO_OK;
}

static void must_be_stunned(struct instance *instance, const char *call) {
    if (!atomic_load(&instance->stunned))
        tell(instance, "BROKEN %s without a stun", call);
}

static jio_status_t event_requirements(const jio_disk_info_t *info, jio_requirements_t *out) {
    (void)info;
    if (!out || out->size < sizeof *out)
        return JIO_E_INVALID;
    out->sidecar_bytes = JIO_SIDECAR_UNIT_BYTES;
    out->work_items = 1024;
    return JIO_OK;
}

static jio_status_t event_attach(jio_disk_t *disk, const jio_disk_info_t *info) {
    jio_sidecar_t *sidecar;
    if (!disk || !info)
        return JIO_E_INVALID;
    jio_status_t status = host->sidecar_create(disk, SIDECAR_KEY, JIO_SIDECAR_UNIT_BYTES, &sidecar);
    if (status >= 0)
        host->sidecar_close(disk, sidecar);
    return status;
}

static jio_status_t event_detach(jio_disk_t *disk, const jio_disk_info_t *info) {
    if (!disk || !info)
        return JIO_E_INVALID;
    jio_status_t status = host->sidecar_delete(disk, SIDECAR_KEY);
    return status == JIO_E_NOT_FOUND ? JIO_OK : status;
}

/* The first eight bytes count the openings, the rest of the block repeats them. */
static jio_status_t sidecar_note(struct instance *instance, int read_first) {
    uint64_t block[JIO_SIDECAR_UNIT_BYTES / 8], len_bytes;
    jio_sidecar_t *sidecar;
    jio_status_t status = host->sidecar_open(instance->disk, SIDECAR_KEY, &sidecar, &len_bytes);
    if (status < 0)
        return status;
    if (read_first) {
        status = host->sidecar_read(instance->disk, sidecar, 0, block, sizeof block);
        for (size_t i = 1; status >= 0 && i < sizeof block / 8; i++)
            if (block[i] != block[0]) {
                tell(instance, "torn-sidecar");
                break;
            }
        instance->openings = block[0] + 1;
    }
    for (size_t i = 0; i < sizeof block / 8; i++)
        block[i] = instance->openings;
    if (status >= 0)
        status = host->sidecar_write(instance->disk, sidecar, 0, block, sizeof block);
    host->sidecar_close(instance->disk, sidecar);
    return status;
}

static void uuid_text(const uint8_t *uuid, char *out) {
    for (int i = 0; i < 16; i++)
        snprintf(out + 2 * i, 3, "%02x", uuid[i]);
}

static jio_status_t event_open(jio_disk_t *disk, const jio_disk_info_t *info, void **out_instance) {
    char uuid[33];
    if (!disk || !info || !out_instance || !JIO_HAS(jio_disk_info_t, info, content_id_before))
        return JIO_E_INVALID;
    struct instance *instance = calloc(1, sizeof *instance);
    if (!instance)
        return JIO_E_NO_MEMORY;
    instance->disk = disk;
    strncpy(instance->label, info->label, sizeof instance->label - 1);
    for (uint64_t i = 0; i < info->property_count; i++) {
        const jio_property_t *property = &info->properties[i];
        if (strcmp(property->key, "event.log") == 0)
            strncpy(instance->log, property->value, sizeof instance->log - 1);
        if (strcmp(property->key, "event.refuse") == 0)
            strncpy(instance->refuse, property->value, sizeof instance->refuse - 1);
        if (strcmp(property->key, "event.hold") == 0)
            instance->hold = 1;
    }
    jio_status_t status = sidecar_note(instance, 1);
    if (status < 0) {
        free(instance);
        return status;
    }
    instance->must_arrive = (info->flags & JIO_DISK_MIGRATED) != 0;
    uuid_text(info->disk_uuid, uuid);
    tell(instance, "open nr=%" PRIu64 " migrated=%d uuid=%s id=%" PRIx64 " before=%" PRIx64,
         instance->openings, instance->must_arrive, uuid, info->content_id, info->content_id_before);
    *out_instance = instance;
    return JIO_OK;
}

static jio_status_t event_close(void *raw, uint32_t how) {
    struct instance *instance = raw;
    host->work_flush(instance->disk);
    if (atomic_load(&instance->in_flight))
        tell(instance, "BROKEN close with I/O in flight");
    jio_status_t status = how == JIO_CLOSE_LOST ? JIO_OK : sidecar_note(instance, 0);
    tell(instance, "close how=%u", how);
    free(instance);
    return status;
}

static jio_verdict_t event_io_start(void *raw, jio_io_t *io, jio_status_t *out_status) {
    struct instance *instance = raw;
    (void)io, (void)out_status;
    atomic_fetch_add(&instance->in_flight, 1);
    if (atomic_load(&instance->stunned))
        tell(instance, "BROKEN I/O while stunned");
    if (instance->must_arrive && !atomic_load(&instance->arrived))
        tell(instance, "BROKEN I/O before ARRIVED");
    return JIO_PASS;
}

static void release_now(void *userdata) {
    struct release *release = userdata;
    atomic_fetch_sub(&release->instance->in_flight, 1);
    host->io_release(release->instance->disk, release->io);
    free(release);
}

static jio_verdict_t event_io_done(void *raw, jio_io_t *io, jio_status_t status) {
    struct instance *instance = raw;
    (void)status;
    struct release *release = instance->hold && io->kind == JIO_IO_WRITE ? malloc(sizeof *release) : NULL;
    if (release) {
        *release = (struct release){instance, io};
        if (host->work_submit(instance->disk, release_now, release) >= 0)
            return JIO_DEFER;
        free(release);
    }
    atomic_fetch_sub(&instance->in_flight, 1);
    return JIO_PASS;
}

static jio_status_t event_io_abort(void *raw, jio_io_t *io) {
    (void)io;
    return ((struct instance *)raw)->hold ? JIO_E_BUSY : JIO_E_NOT_FOUND;
}

static jio_status_t event_stun(void *raw) {
    struct instance *instance = raw;
    if (atomic_load(&instance->in_flight))
        tell(instance, "BROKEN stun with I/O in flight");
    if (atomic_exchange(&instance->stunned, 1))
        tell(instance, "BROKEN stunned twice");
    sidecar_note(instance, 0);
    jio_status_t status = called(instance, "stun");
    if (status < 0)
        atomic_store(&instance->stunned, 0);
    return status;
}

static jio_status_t event_unstun(void *raw) {
    struct instance *instance = raw;
    if (!atomic_exchange(&instance->stunned, 0))
        tell(instance, "BROKEN unstun without a stun");
    return called(instance, "unstun");
}

static jio_status_t event_snapshot(void *raw, const jio_snapshot_t *info) {
    static const char *const events[] = {"?", "create", "revert", "consolidate"};
    static const char *const phases[] = {"?", "pre", "post", "cancel"};
    char call[64];
    must_be_stunned(raw, "snapshot");
    snprintf(call, sizeof call, "snapshot-%s-%s", events[info->event & 3], phases[info->phase & 3]);
    tell(raw, "id=%" PRIu64, info->snapshot_id);
    return called(raw, call);
}

static jio_status_t event_clone(void *raw, const jio_clone_t *info) {
    static const char *const calls[] = {"?", "clone-pre", "clone-post", "clone-cancel"};
    char uuid[33];
    uuid_text(info->dest_disk_uuid, uuid);
    tell(raw, "dest=%s %s", uuid, info->dest_path);
    return called(raw, calls[info->phase & 3]);
}

static jio_status_t event_migrate(void *raw, const jio_migrate_t *info) {
    static const char *const calls[] = {"?", "migrate-prepare", "migrate-handoff", "migrate-arrived",
                                        "migrate-cancel"};
    struct instance *instance = raw;
    if (info->phase == JIO_MIGRATE_HANDOFF)
        must_be_stunned(instance, "migrate(HANDOFF)");
    if (info->phase == JIO_MIGRATE_ARRIVED)
        atomic_store(&instance->arrived, 1);
    return called(instance, calls[info->phase <= JIO_MIGRATE_CANCEL ? info->phase : 0]);
}

static jio_status_t event_grow(void *raw, uint64_t new_capacity_bytes) {
    must_be_stunned(raw, "grow");
    tell(raw, "capacity=%" PRIu64, new_capacity_bytes);
    return called(raw, "grow");
}

static jio_status_t event_status(void *raw, jio_filter_status_t *out) {
    if (out->size < sizeof *out)
        return JIO_E_INVALID;
    out->state = JIO_STATE_IDLE;
    out->epoch = ((struct instance *)raw)->openings;
    return JIO_OK;
}

static const jio_filter_t events = {
    .size = sizeof(jio_filter_t),
    .abi_version = JIO_ABI_VERSION,
    .name = "eventfilter",
    .vendor = "jetdr",
    .version = "1.0",
    .filter_class = JIO_CLASS_INSPECTION,
    .requirements = event_requirements,
    .attach = event_attach,
    .detach = event_detach,
    .open = event_open,
    .close = event_close,
    .io_start = event_io_start,
    .io_done = event_io_done,
    .io_abort = event_io_abort,
    .stun = event_stun,
    .unstun = event_unstun,
    .snapshot = event_snapshot,
    .clone = event_clone,
    .migrate = event_migrate,
    .grow = event_grow,
    .status = event_status,
};

const jio_filter_t *jio_filter_entry(const jio_host_t *offered, uint32_t host_abi_version) {
    if (JIO_ABI_MAJOR_OF(host_abi_version) != JIO_ABI_MAJOR || !offered ||
        offered->size < JIO_HOST_REQUIRED_SIZE)
        return NULL;
    host = offered;
    return &events;
}
