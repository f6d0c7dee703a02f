/*
 * What the C compiler makes of include/iofilter.h: the sizes of its structs and the places of the members
 * that the filter uses. A test compares them with what the generated bindings say, so that the two
 * sides of the border cannot drift apart unseen.
 */
#include "iofilter.h"

#define SIZE(type) { #type, sizeof(type) }
#define AT(type, member) { #type "." #member, offsetof(type, member) }

struct jetdr_layout_row {
    const char *name;
    size_t value;
};

static const struct jetdr_layout_row rows[] = {
    SIZE(jio_iovec_t), SIZE(jio_io_t), SIZE(jio_request_t), SIZE(jio_property_t),
    SIZE(jio_disk_info_t), SIZE(jio_snapshot_t), SIZE(jio_requirements_t),
    SIZE(jio_filter_status_t), SIZE(jio_host_t), SIZE(jio_filter_t),
    AT(jio_io_t, filter_word), AT(jio_request_t, done), AT(jio_disk_info_t, properties),
    AT(jio_host_t, submit), AT(jio_host_t, sidecar_create), AT(jio_host_t, timer_start),
    AT(jio_host_t, work_submit), AT(jio_host_t, property_get), AT(jio_host_t, event_post),
    AT(jio_filter_t, io_start), AT(jio_filter_t, stun), AT(jio_filter_t, status),
};

size_t jetdr_layout_count(void);
const char *jetdr_layout_name(size_t i);
size_t jetdr_layout_value(size_t i);

size_t jetdr_layout_count(void) { return sizeof(rows) / sizeof(rows[0]); }
const char *jetdr_layout_name(size_t i) { return i < jetdr_layout_count() ? rows[i].name : NULL; }
size_t jetdr_layout_value(size_t i) { return i < jetdr_layout_count() ? rows[i].value : 0; }
