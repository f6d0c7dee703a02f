/*
 * Drives a filter library through its life by iofilter.h alone, and checks what it answers.
 *
 *   drive LIBRARY RUN_DIR [full|required|larger] [SEED] [KEY=VALUE]...
 *
 * full, required, larger: which sizes the host's table and the disk's info have, as hosts of this version, of
 * the oldest and of a later one would make them. Properties are handed to the filter as they are.
 * One line a check on stdout (TAP); exit 0 if all held.
 */
#include <dlfcn.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "memhost.h"

#define CAPACITY_BYTES (32ull << 20)
#define GUESTS 4u
#define IOS_PER_GUEST 1500u

static unsigned checks, failures;

#define CHECK(what, ...)                                      \
    do {                                                      \
        bool held_ = (what);                                  \
        checks++;                                             \
        failures += !held_;                                   \
        printf("%s %u - ", held_ ? "ok" : "not ok", checks);  \
        printf(__VA_ARGS__);                                  \
        printf(held_ ? "\n" : "  (" #what ")\n");             \
    } while (0)

static uint64_t seed;

static uint64_t next_random(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* ---- entry ------------------------------------------------------------------------------------- */

/* Whether a table like `host`, but of this size and version, and with this required slot NULL, is refused. */
static bool refused(jio_filter_entry_fn entry, const jio_host_t *host, uint32_t size,
                    uint32_t table_version, uint32_t version, size_t null_slot) {
    uint8_t copy[sizeof(jio_host_t)];
    size_t known = host->size < sizeof copy ? host->size : sizeof copy;
    memset(copy, 0, sizeof copy);
    memcpy(copy, host, known);
    if (null_slot)
        memset(copy + null_slot, 0, sizeof(void *));
    jio_host_t *changed = (jio_host_t *)(void *)copy;
    changed->size = size;
    changed->abi_version = table_version;
    size_t end = size < sizeof(jio_host_t) ? size : sizeof(jio_host_t);
    const jio_host_t *table = at_the_edge(changed, end < 8 ? 8 : end);
    return entry(table, version) == NULL;
}

static const jio_filter_t *check_entry(jio_filter_entry_fn entry, const jio_host_t *host) {
    uint32_t now = host->abi_version, next = (JIO_ABI_MAJOR + 1) << 16;
    CHECK(entry(NULL, JIO_ABI_VERSION) == NULL, "a host without a table is refused");
    CHECK(refused(entry, host, host->size, next, next, 0), "another major version is refused");
    CHECK(refused(entry, host, host->size, now, next, 0), "a table that contradicts its version is refused");
    CHECK(refused(entry, host, JIO_HOST_REQUIRED_SIZE - 8, now, now, 0), "a table that is too small is refused");
    CHECK(refused(entry, host, 8, now, now, 0), "a table of nothing is refused");
    bool all = true;
    for (size_t at = offsetof(jio_host_t, io_continue); at < JIO_HOST_REQUIRED_SIZE; at += sizeof(void *))
        all = all && refused(entry, host, host->size, now, now, at);
    CHECK(all, "a table with NULL in a required slot is refused");

    const jio_filter_t *filter = entry(host, now);
    CHECK(filter != NULL, "the host is accepted after all that");
    if (!filter)
        return NULL;
    CHECK(entry(host, now) == filter, "entered again it gives the same table");
    CHECK(refused(entry, host, host->size, now, now, 0), "a second host in one process is refused");
    CHECK(JIO_ABI_MAJOR_OF(filter->abi_version) == JIO_ABI_MAJOR, "the filter's major version");
    CHECK(filter->size >= JIO_FILTER_REQUIRED_SIZE, "the filter's table of %u bytes is long enough", filter->size);
    if (filter->size < JIO_FILTER_REQUIRED_SIZE)
        return NULL;
    CHECK(filter->name && *filter->name && strlen(filter->name) <= 32 &&
              strspn(filter->name, "0123456789abcdefghijklmnopqrstuvwxyz_-") == strlen(filter->name),
          "the filter's name");
    CHECK(filter->vendor && filter->version && *filter->version, "the filter's vendor and version");
    CHECK(filter->filter_class >= JIO_CLASS_INSPECTION && filter->filter_class <= JIO_CLASS_CACHE &&
              filter->flags == 0,
          "the filter's class and flags");
    bool complete = filter->requirements && filter->attach && filter->detach && filter->open &&
                    filter->close && filter->io_start && filter->io_done && filter->io_abort;
    CHECK(complete, "no required slot of the filter's table is NULL");
    return complete ? filter : NULL;
}

/* ---- life ---------------------------------------------------------------------------------------- */

static void check_requirements(const jio_filter_t *filter) {
    union {
        jio_requirements_t all;
        uint8_t bytes[sizeof(jio_requirements_t)];
    } out;
    memset(&out, 0x5a, sizeof out);
    out.all.size = offsetof(jio_requirements_t, mapped_bytes);
    in_control(true);
    CHECK(filter->requirements(NULL, &out.all) == JIO_OK, "requirements of any disk");
    bool kept = true;
    for (size_t i = offsetof(jio_requirements_t, mapped_bytes); i < sizeof out; i++)
        kept = kept && out.bytes[i] == 0x5a;
    CHECK(kept && out.all.size == offsetof(jio_requirements_t, mapped_bytes),
          "a shorter struct is filled up to its size only");
    CHECK(out.all.timers != 0x5a5a5a5a, "a shorter struct is filled as far as it goes");
    CHECK(filter->requirements(NULL, NULL) == JIO_E_INVALID, "requirements into NULL");
    in_control(false);
}

static void check_nulls_closed(const jio_filter_t *filter, struct jio_disk *disk) {
    void *instance = disk;
    jio_disk_info_t empty = {0};
    empty.size = 8;
    in_control(true);
    CHECK(filter->attach(NULL, NULL) == JIO_E_INVALID, "attach of nothing");
    CHECK(filter->attach(disk, NULL) == JIO_E_INVALID, "attach without an info");
    CHECK(filter->attach(disk, &empty) < 0, "attach with an info of 8 bytes");
    CHECK(filter->detach(disk, NULL) == JIO_E_INVALID, "detach without an info");
    CHECK(filter->open(disk, NULL, &instance) == JIO_E_INVALID, "open without an info");
    CHECK(filter->open(disk, &empty, &instance) < 0, "open with an info of 8 bytes");
    CHECK(filter->open(NULL, &empty, &instance) < 0, "open of nothing");
    CHECK(filter->open(disk, &empty, NULL) == JIO_E_INVALID, "open without a place for the instance");
    in_control(false);
    CHECK(instance == disk, "an open that failed writes nothing");
}

/* NULL is no instance of this filter, since its open gave another. */
static void check_nulls_open(const jio_filter_t *filter, struct jio_disk *disk) {
    jio_filter_status_t status = {0};
    jio_io_t io = {0};
    jio_status_t out = 1;
    io.size = sizeof io;
    io.kind = JIO_IO_FLUSH;
    in_control(true);
    if (JIO_HAS(jio_filter_t, filter, status) && filter->status) {
        status.size = sizeof status;
        CHECK(filter->status(disk->instance, NULL) == JIO_E_INVALID, "status into NULL");
        if (disk->instance)
            CHECK(filter->status(NULL, &status) < 0, "status of nothing");
    }
    if (JIO_HAS(jio_filter_t, filter, snapshot) && filter->snapshot)
        CHECK(filter->snapshot(disk->instance, NULL) == JIO_E_INVALID, "snapshot without an info");
    if (JIO_HAS(jio_filter_t, filter, property_list) && filter->property_list)
        CHECK(filter->property_list(disk->instance, NULL, NULL) == JIO_E_INVALID,
              "property_list without a function");
    if (disk->instance) {
        if (JIO_HAS(jio_filter_t, filter, grow) && filter->grow)
            CHECK(filter->grow(NULL, CAPACITY_BYTES) < 0, "grow of nothing");
        if (JIO_HAS(jio_filter_t, filter, drain) && filter->drain)
            CHECK(filter->drain(NULL, 0) < 0, "drain of nothing");
        CHECK(filter->close(NULL, JIO_CLOSE_CLEAN) < 0, "close of nothing");
        CHECK(filter->io_start(NULL, &io, &out) == JIO_PASS, "an I/O of a disk that is not open passes");
        CHECK(filter->io_start(disk->instance, NULL, &out) == JIO_PASS, "an I/O that is NULL passes");
        CHECK(filter->io_done(disk->instance, NULL, JIO_OK) == JIO_PASS, "a completion that is NULL passes");
    }
    in_control(false);
    CHECK(filter->io_abort(disk->instance, &io) == JIO_E_NOT_FOUND, "abort of an I/O that is not held");
}

static void property_seen(void *userdata, const char *key, const char *value) {
    unsigned *seen = userdata;
    if (key && *key && strlen(key) < JIO_PROPERTY_KEY_MAX && value && strlen(value) < JIO_PROPERTY_VALUE_MAX)
        ++*seen;
    else
        *seen = 1000000;
}

static void check_properties(const jio_filter_t *filter, struct jio_disk *disk) {
    char buffer[JIO_PROPERTY_VALUE_MAX] = "kept";
    unsigned seen = 0;
    in_control(true);
    if (JIO_HAS(jio_filter_t, filter, property_set) && filter->property_set)
        CHECK(filter->property_set(disk->instance, "no.such.property", "1") == JIO_E_NOT_FOUND,
              "an unknown property cannot be set");
    if (JIO_HAS(jio_filter_t, filter, property_get) && filter->property_get)
        CHECK(filter->property_get(disk->instance, "no.such.property", buffer, sizeof buffer) ==
                      JIO_E_NOT_FOUND &&
                  strcmp(buffer, "kept") == 0,
              "an unknown property cannot be read");
    if (JIO_HAS(jio_filter_t, filter, property_list) && filter->property_list)
        CHECK(filter->property_list(disk->instance, property_seen, &seen) == JIO_OK && seen < 1000000,
              "%u properties are listed", seen);
    in_control(false);
}

/* ---- I/O ------------------------------------------------------------------------------------------- */

struct guest_thread {
    pthread_t thread;
    struct jio_disk *disk;
    unsigned number;
    unsigned wrong;
};

/* A guest of its own quarter of the disk, where it knows every byte, that issues all kinds of I/O. */
static void *guest_run(void *argument) {
    struct guest_thread *guest = argument;
    uint64_t state = seed * 2654435761u + guest->number + 1, quarter = CAPACITY_BYTES / GUESTS;
    uint64_t from = guest->number * quarter, longest = 512u << 10;
    uint8_t *expected = calloc(1, quarter), *buffer = malloc(longest);
    if (!expected || !buffer)
        abort();
    for (unsigned i = 0; i < IOS_PER_GUEST; i++) {
        uint64_t dice = next_random(&state) % 100;
        uint64_t len = next_random(&state) % (next_random(&state) % 16 ? 32 : longest / 512) * 512 + 512;
        uint64_t at = next_random(&state) % ((quarter - len) / 512 + 1) * 512;
        uint32_t kind = dice < 55   ? JIO_IO_WRITE
                        : dice < 80 ? JIO_IO_READ
                        : dice < 87 ? JIO_IO_ZERO
                        : dice < 94 ? JIO_IO_UNMAP
                                    : JIO_IO_FLUSH;
        uint32_t flags = next_random(&state) % 8 == 0 ? JIO_IO_FUA : 0;
        if (kind == JIO_IO_FLUSH)
            at = len = 0;
        uint8_t fill = (uint8_t)next_random(&state);
        for (uint64_t k = 0; k < len; k++)
            buffer[k] = kind == JIO_IO_WRITE ? (uint8_t)(fill + k * 7) : 0xee;
        jio_status_t status = guest_io(guest->disk, kind, flags, kind == JIO_IO_FLUSH ? 0 : from + at, len,
                                       buffer, (unsigned)(dice % 4) + 1, 0);
        guest->wrong += status != JIO_OK;
        if (kind == JIO_IO_READ)
            guest->wrong += memcmp(buffer, expected + at, len) != 0;
        else if (kind == JIO_IO_WRITE)
            memcpy(expected + at, buffer, len);
        else
            memset(expected + at, 0, len);
    }
    guest->wrong += memcmp(guest->disk->data + from, expected, quarter) != 0;
    free(expected);
    free(buffer);
    return NULL;
}

static void check_io(struct jio_disk *disk) {
    struct guest_thread guests[GUESTS];
    unsigned wrong = 0;
    for (unsigned i = 0; i < GUESTS; i++) {
        guests[i] = (struct guest_thread){.disk = disk, .number = i};
        if (pthread_create(&guests[i].thread, NULL, guest_run, &guests[i]) != 0)
            abort();
    }
    for (unsigned i = 0; i < GUESTS; i++) {
        pthread_join(guests[i].thread, NULL);
        wrong += guests[i].wrong;
    }
    CHECK(wrong == 0, "%u I/Os from %u threads leave what the guests wrote; %" PRIu64 " deferred, %" PRIu64 " held",
          IOS_PER_GUEST * GUESTS, GUESTS, disk->deferred, disk->held);

    uint8_t block[4096] = {1};
    disk->fail_writes_from = 8192;
    disk->fail_writes_to = 8192 + 512;
    CHECK(guest_io(disk, JIO_IO_WRITE, 0, 8192, sizeof block, block, 1, 0) == JIO_E_IO,
          "the guest sees that its write failed");
    CHECK(guest_io(disk, JIO_IO_WRITE, 0, 65536, sizeof block, block, 2, 0) == JIO_OK,
          "the next one succeeds");
    disk->fail_writes_from = disk->fail_writes_to = 0;
    /* Kinds of a later version pass. */
    CHECK(guest_io(disk, 77, 0, 0, 0, block, 1, 0) == JIO_OK, "an I/O of an unknown kind passes");
}

/* Writes with no consumer until the filter must hold some, and gives up on those. */
static void check_abort(struct jio_disk *disk) {
    static uint8_t block[256u << 10];
    uint64_t before = disk->aborted;
    unsigned ended = 0, rounds = 400;
    for (unsigned i = 0; i < rounds; i++) {
        uint64_t at = i * sizeof block % CAPACITY_BYTES;
        jio_status_t status = guest_io(disk, JIO_IO_WRITE, 0, at, sizeof block, block, 1, 200000);
        ended += status == JIO_OK || status == JIO_E_CANCELLED;
    }
    CHECK(ended == rounds, "writes that are given up end; %" PRIu64 " of %u were cancelled",
          disk->aborted - before, rounds);
}

static jio_filter_status_t status_of(struct jio_disk *disk) {
    jio_filter_status_t status = {0};
    status.size = sizeof status;
    if (JIO_HAS(jio_filter_t, disk->filter, status) && disk->filter->status)
        disk->filter->status(disk->instance, &status);
    return status;
}

static void check_control(const jio_filter_t *filter, struct jio_disk *disk) {
    jio_snapshot_t snapshot = {.size = sizeof snapshot, .event = JIO_SNAPSHOT_CREATE, .snapshot_id = 1};
    in_control(true);
    if (JIO_HAS(jio_filter_t, filter, status) && filter->status) {
        union {
            jio_filter_status_t all;
            uint8_t bytes[sizeof(jio_filter_status_t)];
        } out;
        memset(&out, 0x5a, sizeof out);
        out.all.size = offsetof(jio_filter_status_t, durable_seq);
        CHECK(filter->status(disk->instance, &out.all) == JIO_OK &&
                  out.bytes[offsetof(jio_filter_status_t, durable_seq)] == 0x5a &&
                  out.all.size == offsetof(jio_filter_status_t, durable_seq),
              "a shorter status is filled up to its size only");
        jio_filter_status_t status = status_of(disk);
        CHECK(status.state >= JIO_STATE_IDLE && status.state <= JIO_STATE_FAILED &&
                  status.published_seq >= status.durable_seq &&
                  status.lane_used_bytes <= status.lane_capacity_bytes,
              "status: state %u, published %" PRIu64 ", durable %" PRIu64 ", dirty %" PRIu64, status.state,
              status.published_seq, status.durable_seq, status.dirty_bytes);
    }
    if (JIO_HAS(jio_filter_t, filter, drain) && filter->drain) {
        jio_status_t drained = filter->drain(disk->instance, 1000000);
        CHECK(drained == JIO_OK || drained == JIO_E_TIMED_OUT || drained == JIO_E_BUSY, "drain: %d", drained);
    }
    if (JIO_HAS(jio_filter_t, filter, stun) && filter->stun)
        CHECK(filter->stun(disk->instance) == JIO_OK, "stun");
    if (JIO_HAS(jio_filter_t, filter, snapshot) && filter->snapshot) {
        for (uint32_t event = JIO_SNAPSHOT_CREATE; event <= JIO_SNAPSHOT_CONSOLIDATE; event++) {
            snapshot.event = event;
            snapshot.phase = JIO_PHASE_PRE;
            jio_status_t pre = filter->snapshot(disk->instance, &snapshot);
            snapshot.phase = pre == JIO_OK ? JIO_PHASE_POST : JIO_PHASE_CANCEL;
            CHECK(filter->snapshot(disk->instance, &snapshot) == JIO_OK, "snapshot, event %u: %d", event, pre);
        }
    }
    if (JIO_HAS(jio_filter_t, filter, grow) && filter->grow) {
        jio_status_t huge = filter->grow(disk->instance, UINT64_MAX / 512 * 512);
        CHECK(huge == JIO_E_RANGE, "a disk does not grow beyond all bounds: %d", huge);
        CHECK(filter->grow(disk->instance, CAPACITY_BYTES) == JIO_OK, "grow to the same capacity");
    }
    if (JIO_HAS(jio_filter_t, filter, unstun) && filter->unstun)
        CHECK(filter->unstun(disk->instance) == JIO_OK, "unstun");
    in_control(false);
    uint8_t block[512];
    CHECK(guest_io(disk, JIO_IO_READ, 0, 0, sizeof block, block, 1, 0) == JIO_OK, "I/O goes on after it");
}

static void check_life(const jio_filter_t *filter, struct jio_disk *disk, struct jio_disk *second,
                       enum table_kind kind) {
    jio_status_t unattached = disk_open(disk, kind);
    CHECK(unattached == JIO_E_NOT_FOUND, "a disk that is not attached cannot be opened: %d", unattached);
    CHECK(disk_attach(disk, kind) == JIO_OK, "attach");
    unsigned sidecars = disk_sidecars(disk, false);
    CHECK(disk_attach(disk, kind) == JIO_E_EXISTS && disk_sidecars(disk, false) == sidecars, "attach twice");
    CHECK(disk_open(disk, kind) == JIO_OK, "open, with a property that the filter does not know");
    CHECK(disk_attach(second, kind) == JIO_OK && disk_open(second, kind) == JIO_OK, "a second disk");
    check_nulls_open(filter, disk);
    check_properties(filter, disk);
    check_abort(disk); /* first: a filter whose consumer is missing soon stops holding anything */
    check_io(disk);
    check_io(second);
    check_control(filter, disk);
    uint64_t epoch = status_of(disk).epoch;
    CHECK(disk_close(disk, JIO_CLOSE_CLEAN) == JIO_OK, "close, clean");
    const uint32_t ways[] = {JIO_CLOSE_LOST, JIO_CLOSE_HANDOFF, JIO_CLOSE_CLEAN};
    for (unsigned i = 0; i < 3; i++) {
        CHECK(disk_open(disk, kind) == JIO_OK, "open again");
        uint64_t later = status_of(disk).epoch;
        CHECK(epoch == 0 || later > epoch, "an epoch of its own: %" PRIu64 " after %" PRIu64, later, epoch);
        epoch = later;
        uint8_t block[4096] = {2};
        CHECK(guest_io(disk, JIO_IO_WRITE, 0, 0, sizeof block, block, 1, 0) == JIO_OK, "a write");
        CHECK(disk_close(disk, ways[i]) == JIO_OK, "close, way %u", ways[i]);
    }
    CHECK(disk_close(second, JIO_CLOSE_CLEAN) == JIO_OK, "the second disk is closed");
    CHECK(disk_detach(disk, kind) == JIO_OK && disk_sidecars(disk, false) == 0, "detach leaves nothing behind");
    CHECK(disk_detach(disk, kind) == JIO_OK, "detach of a disk that is not attached");
    CHECK(disk_open(disk, kind) == JIO_E_NOT_FOUND, "a detached disk cannot be opened");
    CHECK(disk_detach(second, kind) == JIO_OK, "the second disk is detached");
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: drive LIBRARY RUN_DIR [full|required|larger] [SEED] [KEY=VALUE]...\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    const char *kind_name = argc > 3 ? argv[3] : "full";
    enum table_kind kind = strcmp(kind_name, "required") == 0 ? TABLE_REQUIRED
                           : strcmp(kind_name, "larger") == 0 ? TABLE_LARGER
                                                              : TABLE_FULL;
    seed = argc > 4 ? strtoull(argv[4], NULL, 0) : 1;
    printf("# seed %" PRIu64 ", tables: %s\n", seed, kind_name);
    void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "cannot load %s: %s\n", argv[1], dlerror());
        return 2;
    }
    jio_filter_entry_fn entry;
    *(void **)&entry = dlsym(library, JIO_FILTER_ENTRY_SYMBOL);
    CHECK(entry != NULL, "the library exports " JIO_FILTER_ENTRY_SYMBOL);
    const jio_host_t *host = host_start(kind);
    const jio_filter_t *filter = entry ? check_entry(entry, host) : NULL;
    if (filter) {
        struct jio_disk first, second;
        struct jio_disk *disks[] = {&first, &second};
        disk_make(&first, filter, "disk0", argv[2], CAPACITY_BYTES);
        disk_make(&second, filter, "disk1", argv[2], CAPACITY_BYTES);
        for (int at = 5; at < argc; at++) {
            char *value = strchr(argv[at], '=');
            if (!value)
                return 2;
            *value++ = 0;
            disk_property(&first, argv[at], value);
            disk_property(&second, argv[at], value);
        }
        disk_property(&first, "no.such.property", "1");
        check_requirements(filter);
        check_nulls_closed(filter, &first);
        check_life(filter, &first, &second, kind);
        disk_free(disks[0]);
        disk_free(disks[1]);
    }
    CHECK(host_violations() == 0, "%u violations of the contract", host_violations());
    printf("1..%u\n# %u of %u failed\n", checks, failures, checks);
    return failures == 0 ? 0 : 1;
}
