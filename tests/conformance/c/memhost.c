#include "memhost.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static _Atomic unsigned violations;

unsigned host_violations(void) { return atomic_load(&violations); }

void host_violation(const struct jio_disk *disk, const char *what) {
    atomic_fetch_add(&violations, 1);
    fprintf(stderr, "contract violated by the filter, disk %s: %s\n", disk ? disk->label : "-", what);
}

void *host_must(void *memory) {
    if (!memory) {
        fprintf(stderr, "out of memory\n");
        abort();
    }
    return memory;
}

static uint64_t mono_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

struct timespec host_wall_after(uint64_t delay_ns) {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    uint64_t ns = (uint64_t)at.tv_nsec + delay_ns;
    at.tv_sec += (time_t)(ns / 1000000000ull);
    at.tv_nsec = (long)(ns % 1000000000ull);
    return at;
}

/* ---- contexts --------------------------------------------------------------------------------- */

_Thread_local enum host_context host_context;

void in_control(bool entered) { host_context = entered ? CONTROL : NO_CONTEXT; }

static bool may_block(struct jio_disk *disk, const char *service) {
    if (host_context == WORK || host_context == CONTROL)
        return true;
    char text[128];
    snprintf(text, sizeof text, "%s from a context that must not block", service);
    host_violation(disk, text);
    return false;
}

/* ---- memory, time, words ----------------------------------------------------------------------- */

static void svc_log(void *ctx, jio_disk_t *disk, uint32_t level, const char *message, uint64_t len) {
    (void)ctx;
    fprintf(stderr, "filter[%u] %s: %.*s\n", level, disk ? disk->label : "-", (int)len, message);
}

static void svc_event(void *ctx, jio_disk_t *disk, uint32_t level, uint32_t code, const char *message,
                      uint64_t len) {
    (void)code;
    svc_log(ctx, disk, level, message, len);
}

void disk_count(struct jio_disk *disk, uint64_t *counter, int change) {
    pthread_mutex_lock(&disk->lock);
    if (change < 0 && *counter == 0)
        host_violation(disk, "more was given back than was taken");
    else
        *counter += (uint64_t)(int64_t)change;
    pthread_cond_broadcast(&disk->changed);
    pthread_mutex_unlock(&disk->lock);
}

/* A function of the filter begins to run: it is not waiting any more, but not over either. */
static void begins(struct jio_disk *disk, uint64_t *waiting, enum host_context as) {
    disk_count(disk, &disk->running, 1);
    if (waiting)
        disk_count(disk, waiting, -1);
    host_context = as;
}

static void ends(struct jio_disk *disk) {
    host_context = NO_CONTEXT;
    disk_count(disk, &disk->running, -1);
}

static void *svc_alloc(void *ctx, jio_disk_t *disk, uint64_t len, uint64_t align) {
    (void)ctx;
    void *memory = NULL;
    if (len == 0 || align == 0 || (align & (align - 1)) != 0 || align > 4096)
        return NULL;
    if (posix_memalign(&memory, align < sizeof(void *) ? sizeof(void *) : align, len) != 0)
        return NULL;
    if (disk)
        disk_count(disk, &disk->heap_blocks, 1);
    return memory;
}

static void svc_free(void *ctx, jio_disk_t *disk, void *memory) {
    (void)ctx;
    if (memory && disk)
        disk_count(disk, &disk->heap_blocks, -1);
    free(memory);
}

static uint64_t svc_mono(void *ctx) {
    (void)ctx;
    return mono_ns();
}

static uint64_t svc_wall(void *ctx) {
    (void)ctx;
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

static jio_status_t svc_random(void *ctx, void *buffer, uint64_t len) {
    (void)ctx;
    FILE *source = fopen("/dev/urandom", "rb");
    if (!source)
        return JIO_E_IO;
    size_t got = fread(buffer, 1, len, source);
    fclose(source);
    return got == len ? JIO_OK : JIO_E_IO;
}

/* ---- threads for jobs ---------------------------------------------------------------------------- */

struct job {
    void (*run)(struct job *job);
    struct job *next;
    struct jio_disk *disk;
    jio_task_fn fn;
    void *userdata;
    jio_request_t *request;
};

static pthread_mutex_t jobs_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t jobs_there = PTHREAD_COND_INITIALIZER;
static struct job *jobs_first, *jobs_last;

static void job_put(struct job *job) {
    pthread_mutex_lock(&jobs_lock);
    job->next = NULL;
    if (jobs_last)
        jobs_last->next = job;
    else
        jobs_first = job;
    jobs_last = job;
    pthread_cond_signal(&jobs_there);
    pthread_mutex_unlock(&jobs_lock);
}

static void *job_thread(void *unused) {
    (void)unused;
    for (;;) {
        pthread_mutex_lock(&jobs_lock);
        while (!jobs_first)
            pthread_cond_wait(&jobs_there, &jobs_lock);
        struct job *job = jobs_first;
        jobs_first = job->next;
        if (!jobs_first)
            jobs_last = NULL;
        pthread_mutex_unlock(&jobs_lock);
        job->run(job);
        free(job);
    }
    return NULL;
}

static struct job *job_new(struct jio_disk *disk, void (*run)(struct job *)) {
    struct job *job = host_must(calloc(1, sizeof *job));
    job->disk = disk;
    job->run = run;
    return job;
}

static void run_work(struct job *job) {
    begins(job->disk, NULL, WORK);
    job->fn(job->userdata);
    ends(job->disk);
    disk_count(job->disk, &job->disk->work_pending, -1);
}

static jio_status_t svc_work(jio_disk_t *disk, jio_task_fn fn, void *userdata) {
    if (!disk || !fn)
        return JIO_E_INVALID;
    if (!disk->may_work) {
        host_violation(disk, "work_submit on a closed disk");
        return JIO_E_CLOSED;
    }
    struct job *job = job_new(disk, run_work);
    job->fn = fn;
    job->userdata = userdata;
    disk_count(disk, &disk->work_pending, 1);
    job_put(job);
    return JIO_OK;
}

static jio_status_t svc_flush(jio_disk_t *disk) {
    if (host_context != CONTROL)
        host_violation(disk, "work_flush outside of a control call");
    pthread_mutex_lock(&disk->lock);
    while (disk->work_pending)
        pthread_cond_wait(&disk->changed, &disk->lock);
    pthread_mutex_unlock(&disk->lock);
    return JIO_OK;
}

/* ---- timers ---------------------------------------------------------------------------------------- */

struct timer {
    jio_timer_t id;
    uint64_t due_ns;
    struct jio_disk *disk;
    jio_task_fn fn;
    void *userdata;
    struct timer *next;
};

static pthread_mutex_t timers_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t timers_changed = PTHREAD_COND_INITIALIZER;
static struct timer *timers;
static jio_timer_t timer_last, timer_running;
static pthread_t timer_owner;

static void *timer_thread(void *unused) {
    (void)unused;
    pthread_mutex_lock(&timers_lock);
    for (;;) {
        struct timer **first = NULL;
        for (struct timer **at = &timers; *at; at = &(*at)->next)
            if (!first || (*at)->due_ns < (*first)->due_ns)
                first = at;
        uint64_t now = mono_ns();
        if (!first) {
            pthread_cond_wait(&timers_changed, &timers_lock);
        } else if ((*first)->due_ns > now) {
            struct timespec until = host_wall_after((*first)->due_ns - now);
            pthread_cond_timedwait(&timers_changed, &timers_lock, &until);
        } else {
            struct timer *timer = *first;
            *first = timer->next;
            timer_running = timer->id;
            pthread_mutex_unlock(&timers_lock);
            begins(timer->disk, &timer->disk->timers_pending, CALLBACK);
            timer->fn(timer->userdata);
            ends(timer->disk);
            free(timer);
            pthread_mutex_lock(&timers_lock);
            timer_running = 0;
            pthread_cond_broadcast(&timers_changed);
        }
    }
    return NULL;
}

static jio_status_t svc_timer(jio_disk_t *disk, uint64_t delay_ns, jio_task_fn fn, void *userdata,
                              jio_timer_t *out) {
    if (!disk || !fn || !out)
        return JIO_E_INVALID;
    if (!disk->may_time) {
        host_violation(disk, "timer_start on a closed disk");
        return JIO_E_CLOSED;
    }
    struct timer *timer = host_must(calloc(1, sizeof *timer));
    disk_count(disk, &disk->timers_pending, 1);
    pthread_mutex_lock(&timers_lock);
    *out = timer->id = ++timer_last;
    timer->due_ns = mono_ns() + delay_ns;
    timer->disk = disk;
    timer->fn = fn;
    timer->userdata = userdata;
    timer->next = timers;
    timers = timer;
    pthread_cond_broadcast(&timers_changed);
    pthread_mutex_unlock(&timers_lock);
    return JIO_OK;
}

static jio_status_t svc_cancel(jio_disk_t *disk, jio_timer_t id) {
    pthread_mutex_lock(&timers_lock);
    for (struct timer **at = &timers; *at; at = &(*at)->next) {
        if ((*at)->id != id)
            continue;
        struct timer *timer = *at;
        *at = timer->next;
        pthread_mutex_unlock(&timers_lock);
        free(timer);
        disk_count(disk, &disk->timers_pending, -1);
        return JIO_OK;
    }
    bool own = pthread_equal(pthread_self(), timer_owner);
    if (!own)
        may_block(disk, "timer_cancel");
    while (!own && id != 0 && timer_running == id)
        pthread_cond_wait(&timers_changed, &timers_lock);
    pthread_mutex_unlock(&timers_lock);
    return JIO_E_NOT_FOUND;
}

/* ---- sidecars -------------------------------------------------------------------------------------- */

static bool in_units(uint64_t a, uint64_t b) { return ((a | b) & (JIO_SIDECAR_UNIT_BYTES - 1)) == 0; }

static struct jio_sidecar *sidecar_find(jio_disk_t *disk, uint64_t key, bool exists) {
    for (unsigned i = 0; i < MAX_SIDECARS; i++) {
        struct jio_sidecar *sidecar = &disk->sidecars[i];
        if (sidecar->exists == exists && (!exists || sidecar->key == key))
            return sidecar;
    }
    return NULL;
}

static jio_status_t svc_sidecar_create(jio_disk_t *disk, uint64_t key, uint64_t len,
                                       jio_sidecar_t **out) {
    if (!disk || !out || key == 0)
        return JIO_E_INVALID;
    may_block(disk, "sidecar_create");
    if (!in_units(len, 0) || len == 0 || len > JIO_SIDECAR_MAX_BYTES) {
        host_violation(disk, "a sidecar's length is not a multiple of 4096");
        return JIO_E_RANGE;
    }
    if (sidecar_find(disk, key, true))
        return JIO_E_EXISTS;
    struct jio_sidecar *sidecar = sidecar_find(disk, 0, false);
    if (!sidecar)
        return JIO_E_NO_SPACE;
    sidecar->key = key;
    sidecar->len_bytes = len;
    sidecar->bytes = host_must(calloc(1, len));
    sidecar->exists = sidecar->open = true;
    *out = sidecar;
    return JIO_OK;
}

static jio_status_t svc_sidecar_open(jio_disk_t *disk, uint64_t key, jio_sidecar_t **out,
                                     uint64_t *out_len) {
    if (!disk || !out || !out_len)
        return JIO_E_INVALID;
    may_block(disk, "sidecar_open");
    struct jio_sidecar *sidecar = sidecar_find(disk, key, true);
    if (!sidecar)
        return JIO_E_NOT_FOUND;
    if (sidecar->open)
        return JIO_E_BUSY;
    sidecar->open = true;
    *out = sidecar;
    *out_len = sidecar->len_bytes;
    return JIO_OK;
}

static void svc_sidecar_close(jio_disk_t *disk, jio_sidecar_t *sidecar) {
    if (!sidecar)
        return;
    may_block(disk, "sidecar_close");
    if (!sidecar->open)
        host_violation(disk, "sidecar_close of one that is not open");
    sidecar->open = false;
}

static jio_status_t sidecar_range(jio_disk_t *disk, jio_sidecar_t *sidecar, uint64_t offset,
                                  uint64_t len) {
    may_block(disk, "sidecar I/O");
    if (!sidecar || !sidecar->open)
        return JIO_E_INVALID;
    if (!in_units(offset, len)) {
        host_violation(disk, "sidecar I/O is not in multiples of 4096");
        return JIO_E_RANGE;
    }
    return offset > sidecar->len_bytes || len > sidecar->len_bytes - offset ? JIO_E_RANGE : JIO_OK;
}

static jio_status_t svc_sidecar_read(jio_disk_t *disk, jio_sidecar_t *sidecar, uint64_t offset,
                                     void *buffer, uint64_t len) {
    jio_status_t status = sidecar_range(disk, sidecar, offset, len);
    if (status == JIO_OK)
        memcpy(buffer, sidecar->bytes + offset, len);
    return status;
}

static jio_status_t svc_sidecar_write(jio_disk_t *disk, jio_sidecar_t *sidecar, uint64_t offset,
                                      const void *buffer, uint64_t len) {
    jio_status_t status = sidecar_range(disk, sidecar, offset, len);
    if (status == JIO_OK)
        memcpy(sidecar->bytes + offset, buffer, len);
    return status;
}

static jio_status_t svc_sidecar_delete(jio_disk_t *disk, uint64_t key) {
    may_block(disk, "sidecar_delete");
    struct jio_sidecar *sidecar = sidecar_find(disk, key, true);
    if (!sidecar)
        return JIO_E_NOT_FOUND;
    if (sidecar->open)
        return JIO_E_BUSY;
    free(sidecar->bytes);
    memset(sidecar, 0, sizeof *sidecar);
    return JIO_OK;
}

/* ---- properties -------------------------------------------------------------------------------------- */

static jio_status_t svc_property(jio_disk_t *disk, const char *key, char *buffer, uint64_t len) {
    if (!disk || !key || !buffer)
        return JIO_E_INVALID;
    for (uint64_t i = 0; i < disk->property_count; i++) {
        if (strcmp(disk->properties[i].key, key) != 0)
            continue;
        if (strlen(disk->properties[i].value) >= len)
            return JIO_E_RANGE;
        strcpy(buffer, disk->properties[i].value);
        return JIO_OK;
    }
    return JIO_E_NOT_FOUND;
}

/* ---- the filter's own I/O ------------------------------------------------------------------------ */

static void run_request(struct job *job) {
    jio_request_t *r = job->request;
    jio_status_t status =
        disk_execute(job->disk, r->kind, r->offset_bytes, r->len_bytes, r->iov, r->iov_count);
    begins(job->disk, &job->disk->requests_pending, CALLBACK);
    r->done(r->userdata, r, status);
    ends(job->disk);
}

static jio_status_t svc_submit(jio_disk_t *disk, jio_request_t *request) {
    if (!disk || !request)
        return JIO_E_INVALID;
    if (!disk->may_submit) {
        host_violation(disk, "submit on a disk that is not open");
        return JIO_E_CLOSED;
    }
    if (request->size < offsetof(jio_request_t, reserved) || !request->done || request->kind < JIO_IO_READ ||
        request->kind > JIO_IO_FLUSH || ((request->offset_bytes | request->len_bytes) & 511) != 0) {
        host_violation(disk, "submit of a malformed request");
        return JIO_E_INVALID;
    }
    if (request->offset_bytes > disk->capacity_bytes ||
        request->len_bytes > disk->capacity_bytes - request->offset_bytes)
        return JIO_E_RANGE;
    struct job *job = job_new(disk, run_request);
    job->request = request;
    disk_count(disk, &disk->requests_pending, 1);
    job_put(job);
    return JIO_OK;
}

/* ---- the table --------------------------------------------------------------------------------------- */

void *at_the_edge(const void *from, size_t len) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t pages = (len + page - 1) / page;
    uint8_t *base = mmap(NULL, (pages + 1) * page, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || mprotect(base + pages * page, page, PROT_NONE) != 0)
        abort();
    return memcpy(base + pages * page - len, from, len);
}

static const jio_host_t services = {
    .size = sizeof(jio_host_t),
    .abi_version = JIO_ABI_VERSION,
    .name = "memhost",
    .log = svc_log,
    .heap_alloc = svc_alloc,
    .heap_free = svc_free,
    .now_mono_ns = svc_mono,
    .now_wall_ns = svc_wall,
    .random_bytes = svc_random,
    .io_continue = guest_continue,
    .io_complete = guest_complete,
    .io_release = guest_release,
    .submit = svc_submit,
    .sidecar_create = svc_sidecar_create,
    .sidecar_open = svc_sidecar_open,
    .sidecar_close = svc_sidecar_close,
    .sidecar_read = svc_sidecar_read,
    .sidecar_write = svc_sidecar_write,
    .sidecar_delete = svc_sidecar_delete,
    .timer_start = svc_timer,
    .timer_cancel = svc_cancel,
    .work_submit = svc_work,
    .work_flush = svc_flush,
    .property_get = svc_property,
    .event_post = svc_event,
};

/* What a host of a later version would have behind the end that is known today. */
struct larger_host {
    jio_host_t known;
    uint8_t more[128];
};

jio_host_t *host_start(enum table_kind kind) {
    pthread_t thread;
    for (unsigned i = 0; i < 3; i++)
        if (pthread_create(&thread, NULL, job_thread, NULL) != 0)
            abort();
    if (pthread_create(&timer_owner, NULL, timer_thread, NULL) != 0)
        abort();
    struct larger_host table;
    memset(&table, 0xa5, sizeof table);
    table.known = services;
    size_t len = kind == TABLE_REQUIRED ? JIO_HOST_REQUIRED_SIZE
                 : kind == TABLE_LARGER ? sizeof table
                                        : sizeof(jio_host_t);
    table.known.size = (uint32_t)len;
    if (kind == TABLE_REQUIRED)
        table.known.abi_version = JIO_ABI_MAJOR << 16; /* the first minor version */
    if (kind == TABLE_LARGER)
        table.known.abi_version = JIO_ABI_VERSION + 7; /* a later minor version */
    return at_the_edge(&table, len);
}
