/* The header is complete by itself and its assertions hold for this compiler. */
#include "iofilter.h"

/* Each reserved slot can be taken by any function, each struct lies in an array without padding. */
JIO_ASSERT(offsetof(jio_host_t, reserved) + 8 * sizeof(void (*)(void)) == sizeof(jio_host_t),
           "jio_host_t ends with its reserved slots");
JIO_ASSERT(offsetof(jio_filter_t, reserved) + 8 * sizeof(void (*)(void)) == sizeof(jio_filter_t),
           "jio_filter_t ends with its reserved slots");
JIO_ASSERT(JIO_HOST_REQUIRED_SIZE == 184, "what a filter may count on never shrinks or grows");
JIO_ASSERT(JIO_FILTER_REQUIRED_SIZE == 104, "what a host may count on never shrinks or grows");

/* `size` comes first in every struct that can grow. */
JIO_ASSERT_AT(jio_io_t, size, 0);
JIO_ASSERT_AT(jio_request_t, size, 0);
JIO_ASSERT_AT(jio_disk_info_t, size, 0);
JIO_ASSERT_AT(jio_snapshot_t, size, 0);
JIO_ASSERT_AT(jio_clone_t, size, 0);
JIO_ASSERT_AT(jio_migrate_t, size, 0);
JIO_ASSERT_AT(jio_requirements_t, size, 0);
JIO_ASSERT_AT(jio_filter_status_t, size, 0);
JIO_ASSERT_AT(jio_host_t, size, 0);
JIO_ASSERT_AT(jio_filter_t, size, 0);

/* JIO_HAS looks at the member's end, not at its start. */
int main(void) {
    jio_io_t io = {0};
    io.size = (uint32_t)offsetof(jio_io_t, filter_word);
    if (JIO_HAS(jio_io_t, &io, filter_word) || !JIO_HAS(jio_io_t, &io, iov))
        return 1;
    io.size = (uint32_t)offsetof(jio_io_t, filter_word) + 8;
    if (JIO_HAS(jio_io_t, &io, filter_word))
        return 2;
    io.size = (uint32_t)offsetof(jio_io_t, reserved);
    return JIO_HAS(jio_io_t, &io, filter_word) ? 0 : 3;
}
