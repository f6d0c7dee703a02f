/* Disks of the host in memory: their life, as the contract wants it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memhost.h"

void disk_make(struct jio_disk *disk, const jio_filter_t *filter, const char *label,
               const char *run_dir, uint64_t capacity_bytes) {
    memset(disk, 0, sizeof *disk);
    disk->filter = filter;
    disk->label = label;
    disk->run_dir = run_dir;
    disk->capacity_bytes = capacity_bytes;
    disk->data = calloc(1, capacity_bytes);
    if (!disk->data)
        abort();
    for (unsigned i = 0; i < 16; i++)
        disk->uuid[i] = (uint8_t)(label[i % strlen(label)] + (int)i);
    pthread_mutex_init(&disk->lock, NULL);
    pthread_cond_init(&disk->changed, NULL);
}

void disk_free(struct jio_disk *disk) {
    for (unsigned i = 0; i < MAX_SIDECARS; i++)
        free(disk->sidecars[i].bytes);
    free(disk->data);
    pthread_mutex_destroy(&disk->lock);
    pthread_cond_destroy(&disk->changed);
}

void disk_property(struct jio_disk *disk, const char *key, const char *value) {
    if (disk->property_count == MAX_PROPERTIES)
        abort();
    disk->properties[disk->property_count].key = key;
    disk->properties[disk->property_count].value = value;
    disk->property_count++;
}

unsigned disk_sidecars(struct jio_disk *disk, bool only_open) {
    unsigned found = 0;
    for (unsigned i = 0; i < MAX_SIDECARS; i++)
        found += disk->sidecars[i].exists && (!only_open || disk->sidecars[i].open);
    return found;
}

/* What a host of a later version would have behind the end that is known today. */
struct larger_info {
    jio_disk_info_t known;
    uint8_t more[64];
};

static jio_disk_info_t *info_of(struct jio_disk *disk, enum table_kind kind) {
    struct larger_info info;
    memset(&info, 0xa5, sizeof info);
    memset(&info.known, 0, sizeof info.known);
    info.known.purpose = JIO_PURPOSE_VM;
    info.known.block_bytes = 512;
    info.known.capacity_bytes = disk->capacity_bytes;
    memcpy(info.known.disk_uuid, disk->uuid, 16);
    memcpy(info.known.vm_uuid, "a virtual machin", 16);
    info.known.label = disk->label;
    info.known.path = "/vmfs/volumes/none/conformance.vmdk";
    info.known.vm_name = "conformance";
    info.known.run_dir = disk->run_dir;
    info.known.boot_id = "boot-1";
    info.known.properties = disk->properties;
    info.known.property_count = disk->property_count;
    /* The ids took reserved places: the struct of the oldest host is as long, with zeros there. */
    if (kind != TABLE_REQUIRED) {
        info.known.content_id = disk->openings + 1;
        info.known.content_id_before = disk->openings;
    }
    size_t len = kind == TABLE_LARGER ? sizeof info : sizeof info.known;
    info.known.size = (uint32_t)len;
    return at_the_edge(&info, len);
}

static void info_free(jio_disk_info_t *info) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uintptr_t base = (uintptr_t)info / page * page;
    /* The call is over: whoever still reads it crashes. */
    if (munmap((void *)base, 2 * page) != 0)
        abort();
}

jio_status_t disk_attach(struct jio_disk *disk, enum table_kind kind) {
    jio_disk_info_t *info = info_of(disk, kind);
    in_control(true);
    jio_status_t status = disk->filter->attach(disk, info);
    in_control(false);
    info_free(info);
    if (disk_sidecars(disk, true))
        host_violation(disk, "a sidecar is open after attach");
    return status;
}

jio_status_t disk_detach(struct jio_disk *disk, enum table_kind kind) {
    jio_disk_info_t *info = info_of(disk, kind);
    in_control(true);
    jio_status_t status = disk->filter->detach(disk, info);
    in_control(false);
    info_free(info);
    return status;
}

static void left_behind(struct jio_disk *disk) {
    if (disk_sidecars(disk, true))
        host_violation(disk, "a sidecar is left open");
    pthread_mutex_lock(&disk->lock);
    while (disk->running) /* its last lines, after it has told the filter that it is over */
        pthread_cond_wait(&disk->changed, &disk->lock);
    if (disk->heap_blocks)
        host_violation(disk, "memory of the heap is left behind");
    if (disk->timers_pending)
        host_violation(disk, "a timer is left running");
    if (disk->work_pending)
        host_violation(disk, "work is left queued");
    if (disk->requests_pending)
        host_violation(disk, "a request is left in flight");
    pthread_mutex_unlock(&disk->lock);
}

jio_status_t disk_open(struct jio_disk *disk, enum table_kind kind) {
    static int untouched;
    disk->openings++;
    jio_disk_info_t *info = info_of(disk, kind);
    void *instance = &untouched;
    disk->may_time = disk->may_work = disk->may_submit = true;
    in_control(true);
    jio_status_t status = disk->filter->open(disk, info, &instance);
    in_control(false);
    info_free(info);
    disk->instance = NULL;
    if (status >= 0) {
        if (instance == &untouched)
            host_violation(disk, "open succeeded without an instance");
        disk->instance = instance;
    } else {
        disk->may_time = disk->may_work = disk->may_submit = false;
        if (instance != &untouched)
            host_violation(disk, "open failed and wrote an instance");
        left_behind(disk);
    }
    return status;
}

jio_status_t disk_close(struct jio_disk *disk, uint32_t how) {
    in_control(true);
    jio_status_t status = disk->filter->close(disk->instance, how);
    in_control(false);
    disk->may_time = disk->may_work = disk->may_submit = false;
    disk->instance = NULL;
    left_behind(disk);
    return status;
}
