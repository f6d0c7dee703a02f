/*
 * The network of a simulated host: loaded (LD_PRELOAD) into every process that the host starts.
 *
 * Invariant: a TCP or UDP connection of such a process goes out from the host's own address, and only
 * to a port that the host's firewall opens now; one that comes in reaches it only on such a port. A port
 * that is not open answers as one on which nobody listens: ECONNREFUSED, a reset for who dials in.
 *
 * SIMHOST_ADDRESS is the host's IPv4 address, SIMHOST_FIREWALL the path of the rules that are in force:
 * a line each, `out tcp 32873 32878` or `in udp 53 53`. They are read at every connection, so a change
 * counts at once. Without both nothing is changed. Rules that cannot be read open nothing.
 * Ports here are always the listener's. Other families than IPv4 and IPv6 (unix sockets) pass.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

static int real_connect(int fd, const struct sockaddr *to, socklen_t len)
{
    static int (*next)(int, const struct sockaddr *, socklen_t);
    if (!next)
        next = dlsym(RTLD_NEXT, "connect");
    return next(fd, to, len);
}

static int real_bind(int fd, const struct sockaddr *at, socklen_t len)
{
    static int (*next)(int, const struct sockaddr *, socklen_t);
    if (!next)
        next = dlsym(RTLD_NEXT, "bind");
    return next(fd, at, len);
}

static int real_accept4(int fd, struct sockaddr *from, socklen_t *len, int flags)
{
    static int (*next)(int, struct sockaddr *, socklen_t *, int);
    if (!next)
        next = dlsym(RTLD_NEXT, "accept4");
    return next(fd, from, len, flags);
}

/* The host's address; 0: this process is on no simulated host. */
static in_addr_t host_address(void)
{
    const char *text = getenv("SIMHOST_ADDRESS");
    struct in_addr address;
    if (!text || !getenv("SIMHOST_FIREWALL") || inet_pton(AF_INET, text, &address) != 1)
        return 0;
    return address.s_addr;
}

/* Whether the rules open a port. */
static int is_open(const char *direction, const char *protocol, unsigned port)
{
    const char *path = getenv("SIMHOST_FIREWALL");
    FILE *rules = path ? fopen(path, "re") : NULL;
    char line[128], way[8], what[8];
    unsigned first, last;
    int open = 0;
    if (!rules)
        return 0;
    while (!open && fgets(line, sizeof line, rules)) {
        if (sscanf(line, "%7s %7s %u %u", way, what, &first, &last) != 4)
            continue;
        open = !strcmp(way, direction) && !strcmp(what, protocol) && port >= first && port <= last;
    }
    fclose(rules);
    return open;
}

/* `tcp` or `udp`; NULL: no socket of these. */
static const char *protocol_of(int fd)
{
    int type = 0;
    socklen_t len = sizeof type;
    if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) != 0)
        return NULL;
    return type == SOCK_STREAM ? "tcp" : type == SOCK_DGRAM ? "udp" : NULL;
}

/* The port of an address; -1: not of a family that the firewall knows. */
static int port_of(const struct sockaddr *address, socklen_t len)
{
    if (address && address->sa_family == AF_INET && len >= (socklen_t)sizeof(struct sockaddr_in))
        return ntohs(((const struct sockaddr_in *)address)->sin_port);
    if (address && address->sa_family == AF_INET6 && len >= (socklen_t)sizeof(struct sockaddr_in6))
        return ntohs(((const struct sockaddr_in6 *)address)->sin6_port);
    return -1;
}

EXPORT int connect(int fd, const struct sockaddr *to, socklen_t len)
{
    in_addr_t own = host_address();
    int port = port_of(to, len);
    const char *protocol = protocol_of(fd);
    if (!own || port < 0 || !protocol)
        return real_connect(fd, to, len);
    if (!is_open("out", protocol, (unsigned)port)) {
        errno = ECONNREFUSED;
        return -1;
    }
    if (to->sa_family == AF_INET) {
        struct sockaddr_in is = {0};
        socklen_t is_len = sizeof is;
        if (getsockname(fd, (struct sockaddr *)&is, &is_len) == 0 && is.sin_port == 0) {
            struct sockaddr_in from = {.sin_family = AF_INET, .sin_addr.s_addr = own};
            if (real_bind(fd, (struct sockaddr *)&from, sizeof from) != 0)
                return -1;
        }
    }
    return real_connect(fd, to, len);
}

/* Who listens anywhere, or on loopback, listens on the host's address. */
EXPORT int bind(int fd, const struct sockaddr *at, socklen_t len)
{
    in_addr_t own = host_address();
    if (own && port_of(at, len) >= 0 && at->sa_family == AF_INET) {
        struct sockaddr_in here = *(const struct sockaddr_in *)at;
        if (here.sin_addr.s_addr == htonl(INADDR_ANY) ||
            here.sin_addr.s_addr == htonl(INADDR_LOOPBACK))
            here.sin_addr.s_addr = own;
        return real_bind(fd, (struct sockaddr *)&here, sizeof here);
    }
    return real_bind(fd, at, len);
}

/* Whoever came in on a port that is closed is reset; the listener hears of a connection that ended. */
static int admit(int fd, int listener)
{
    struct sockaddr_storage local;
    socklen_t len = sizeof local;
    struct linger reset = {.l_onoff = 1, .l_linger = 0};
    int port;
    if (fd < 0 || !host_address() || getsockname(listener, (struct sockaddr *)&local, &len) != 0)
        return fd;
    port = port_of((struct sockaddr *)&local, len);
    if (port < 0 || is_open("in", "tcp", (unsigned)port))
        return fd;
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    close(fd);
    errno = ECONNABORTED;
    return -1;
}

EXPORT int accept4(int fd, struct sockaddr *from, socklen_t *len, int flags)
{
    return admit(real_accept4(fd, from, len, flags), fd);
}

EXPORT int accept(int fd, struct sockaddr *from, socklen_t *len)
{
    return admit(real_accept4(fd, from, len, 0), fd);
}
