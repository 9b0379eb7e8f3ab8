// SPDX-License-Identifier: MIT
// A pretend hypervisor for Debian's xenstore daemons, loaded into them by LD_PRELOAD.
//
// It stands in for libxenctrl, libxenevtchn and libxengnttab, and for the few files a daemon finds on a Xen host.
// All of its world is files in the folder that PARAVIRT_SHIM names; domain 0 always exists:
//
//   domN         domain N exists; its text says how it is: "" running, "shutdown" or "dying"
//   domN.page    its xenstore ring page, 4096 bytes (public/io/xs_wire.h)
//   events       a datagram socket of the daemon: each datagram is a u32, the number of a port that got an event
//   domN.events  a datagram socket of domain N: a datagram for each event that the daemon sends it
//
// The daemon's port of domain N is FIRST_PORT + N, whatever port INTRODUCE names. An event that finds the receiver's
// queue full is dropped: then the receiver has events to look at anyway.
//
// A daemon that was given a pipe as its standard input dies when the other end is closed.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>
#include <xenctrl.h>
#include <xenevtchn.h>
#include <xengnttab.h>

#define PAGE_BYTES 4096
#define DOMID_END 0x7ff0
#define VIRQ_PORT 1  // "some domain died or shut down"
#define FIRST_PORT 1000

enum state { ABSENT, RUNNING, SHUTDOWN, DYING };

// -- files

static int real_open(const char *path, int flags, mode_t mode)
{
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

static const char *folder(void)
{
    const char *path = getenv("PARAVIRT_SHIM");
    return path ? path : ".";
}

static void domain_file(char *path, unsigned domid, const char *suffix)
{
    snprintf(path, PATH_MAX, "%s/dom%u%s", folder(), domid, suffix);
}

static enum state state_of(unsigned domid)
{
    char path[PATH_MAX], text[16] = "";
    if (domid == 0)
        return RUNNING;
    domain_file(path, domid, "");
    int fd = real_open(path, O_RDONLY, 0);
    if (fd < 0)
        return ABSENT;
    ssize_t n_bytes = read(fd, text, sizeof(text) - 1);
    close(fd);
    if (n_bytes > 0 && !strcmp(text, "shutdown"))
        return SHUTDOWN;
    return n_bytes > 0 && !strcmp(text, "dying") ? DYING : RUNNING;
}

static void *map_page(unsigned domid)
{
    char path[PATH_MAX];
    domain_file(path, domid, ".page");
    int fd = real_open(path, O_RDWR, 0);
    if (fd < 0)
        return NULL;
    void *page = mmap(NULL, PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return page == MAP_FAILED ? NULL : page;
}

// Where a path of a Xen host is in our folder; other paths are as they are.
static const char *redirect(const char *path, char *buffer)
{
    static const char *const places[][2] = {
        {"/dev/xen/xenbus_kva", "/dom0.page"}, {"/proc/xen/xsd_kva", "/dom0.page"}, {"/proc/xen/xsd_port", "/port"},
        {"/var/run/xenstored", ""},            {"/var/log/xen", "/log"},
    };
    for (size_t i = 0; i < sizeof(places) / sizeof(*places); i++) {
        size_t length = strlen(places[i][0]);
        if (!strncmp(path, places[i][0], length)) {
            snprintf(buffer, PATH_MAX, "%s%s%s", folder(), places[i][1], path + length);
            return buffer;
        }
    }
    return path;
}

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...)                                                                         \
    {                                                                                                                  \
        char buffer[PATH_MAX];                                                                                         \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;                                                      \
        va_end(more);                                                                                                  \
        return real_open(redirect(path, buffer), flags, mode);                                                         \
    }
OPEN(open)
OPEN(open64)
#undef OPEN

int mkdir(const char *path, mode_t mode)
{
    char buffer[PATH_MAX];
    return (int)syscall(SYS_mkdirat, AT_FDCWD, redirect(path, buffer), mode);
}

int chmod(const char *path, mode_t mode)
{
    char buffer[PATH_MAX];
    return (int)syscall(SYS_fchmodat, AT_FDCWD, redirect(path, buffer), mode);
}

int unlink(const char *path)
{
    char buffer[PATH_MAX];
    return (int)syscall(SYS_unlinkat, AT_FDCWD, redirect(path, buffer), 0);
}

int access(const char *path, int mode)
{
    char buffer[PATH_MAX];
    return (int)syscall(SYS_faccessat, AT_FDCWD, redirect(path, buffer), mode);
}

// Path and length of a socket's address, ours or one of a Xen host; -1 if it does not fit.
static int set_address(struct sockaddr_un *address, const char *path)
{
    memset(address, 0, sizeof(*address));
    address->sun_family = AF_UNIX;
    if (strlen(path) >= sizeof(address->sun_path)) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(address->sun_path, path);
    return 0;
}

int bind(int fd, const struct sockaddr *address, socklen_t length)
{
    char buffer[PATH_MAX];
    struct sockaddr_un local;
    if (address->sa_family == AF_UNIX) {
        const char *path = redirect(((const struct sockaddr_un *)address)->sun_path, buffer);
        if (set_address(&local, path))
            return -1;
        address = (const struct sockaddr *)&local;
        length = sizeof(local);
    }
    return (int)syscall(SYS_bind, fd, address, length);
}

// oxenstored raises its limit of open files, which not even root may do everywhere, and gives up if it cannot.
int setrlimit(__rlimit_resource_t resource, const struct rlimit *limit)
{
    (void)resource, (void)limit;
    return 0;
}

// -- event channels

struct xenevtchn_handle {
    int fd;
};

xenevtchn_handle *xenevtchn_fdopen(xentoollog_logger *logger, int fd, unsigned flags)
{
    (void)logger, (void)flags;
    xenevtchn_handle *handle = malloc(sizeof(*handle));
    if (handle)
        handle->fd = fd;
    return handle;
}

xenevtchn_handle *xenevtchn_open(xentoollog_logger *logger, unsigned flags)
{
    char path[PATH_MAX];
    struct sockaddr_un address;
    snprintf(path, sizeof(path), "%s/events", folder());
    unlink(path);
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || set_address(&address, path) || bind(fd, (struct sockaddr *)&address, sizeof(address)))
        return NULL;
    return xenevtchn_fdopen(logger, fd, flags);
}

int xenevtchn_close(xenevtchn_handle *handle)
{
    close(handle->fd);
    free(handle);
    return 0;
}

int xenevtchn_fd(xenevtchn_handle *handle)
{
    return handle->fd;
}

xenevtchn_port_or_error_t xenevtchn_bind_virq(xenevtchn_handle *handle, unsigned int virq)
{
    (void)handle, (void)virq;
    return VIRQ_PORT;
}

xenevtchn_port_or_error_t xenevtchn_bind_interdomain(xenevtchn_handle *handle, uint32_t domid, evtchn_port_t port)
{
    (void)handle, (void)port;
    if (state_of(domid) == ABSENT) {
        errno = ESRCH;
        return -1;
    }
    return (int)(FIRST_PORT + domid);
}

int xenevtchn_unbind(xenevtchn_handle *handle, evtchn_port_t port)
{
    (void)handle, (void)port;
    return 0;
}

int xenevtchn_unmask(xenevtchn_handle *handle, evtchn_port_t port)
{
    (void)handle, (void)port;
    return 0;
}

xenevtchn_port_or_error_t xenevtchn_pending(xenevtchn_handle *handle)
{
    uint32_t port;
    return recv(handle->fd, &port, sizeof(port), 0) == sizeof(port) ? (int)port : -1;
}

int xenevtchn_notify(xenevtchn_handle *handle, evtchn_port_t port)
{
    char path[PATH_MAX];
    struct sockaddr_un address;
    if (port < FIRST_PORT)
        return 0;
    domain_file(path, port - FIRST_PORT, ".events");
    if (!set_address(&address, path))
        sendto(handle->fd, &port, sizeof(port), MSG_DONTWAIT, (struct sockaddr *)&address, sizeof(address));
    return 0;
}

// -- grants and foreign pages: the only page anybody maps is a domain's xenstore page

xengnttab_handle *xengnttab_open(xentoollog_logger *logger, unsigned flags)
{
    (void)logger, (void)flags;
    return malloc(1);
}

int xengnttab_close(xengnttab_handle *handle)
{
    free(handle);
    return 0;
}

int xengnttab_set_max_grants(xengnttab_handle *handle, uint32_t count)
{
    (void)handle, (void)count;
    return 0;
}

void *xengnttab_map_grant_ref(xengnttab_handle *handle, uint32_t domid, uint32_t ref, int prot)
{
    (void)handle, (void)ref, (void)prot;
    if (state_of(domid) == ABSENT) {
        errno = ESRCH;
        return NULL;
    }
    return map_page(domid);
}

int xengnttab_unmap(xengnttab_handle *handle, void *page, uint32_t count)
{
    (void)handle;
    return munmap(page, (size_t)count * PAGE_BYTES);
}

void *xc_map_foreign_range(xc_interface *xc, uint32_t domid, int n_bytes, int prot, unsigned long frame)
{
    (void)xc, (void)n_bytes, (void)prot, (void)frame;
    return map_page(domid);
}

// -- domains

xc_interface *xc_interface_open(xentoollog_logger *logger, xentoollog_logger *builder, unsigned flags)
{
    (void)logger, (void)builder, (void)flags;
    return malloc(1);
}

int xc_interface_close(xc_interface *xc)
{
    free(xc);
    return 0;
}

// The next existing domain from `domid` on, or DOMID_END. Who asks for one only means just that one.
static uint32_t next_domain(uint32_t domid, unsigned int max)
{
    uint32_t end = max > 1 ? DOMID_END : domid + 1;
    while (domid < end && state_of(domid) == ABSENT)
        domid++;
    return domid < end ? domid : DOMID_END;
}

int xc_domain_getinfo(xc_interface *xc, uint32_t first, unsigned int max, xc_dominfo_t *info)
{
    unsigned int n = 0;
    (void)xc;
    for (uint32_t domid = first; n < max && (domid = next_domain(domid, max)) < DOMID_END; domid++, n++) {
        enum state state = state_of(domid);
        memset(&info[n], 0, sizeof(info[n]));
        info[n].domid = domid;
        info[n].running = state == RUNNING;
        info[n].shutdown = state >= SHUTDOWN;
        info[n].dying = state == DYING;
    }
    return (int)n;
}

int xc_domain_getinfolist(xc_interface *xc, uint32_t first, unsigned int max, xc_domaininfo_t *info)
{
    unsigned int n = 0;
    (void)xc;
    for (uint32_t domid = first; n < max && (domid = next_domain(domid, max)) < DOMID_END; domid++, n++) {
        enum state state = state_of(domid);
        memset(&info[n], 0, sizeof(info[n]));
        info[n].domain = (domid_t)domid;
        info[n].flags = state == RUNNING ? XEN_DOMINF_running : XEN_DOMINF_shutdown;
        if (state == DYING)
            info[n].flags |= XEN_DOMINF_dying;
    }
    return (int)n;
}

// -- the end

__attribute__((constructor)) static void die_with_the_launcher(void)
{
    struct stat status;
    if (!fstat(STDIN_FILENO, &status) && S_ISFIFO(status.st_mode)) {  // SIGIO, unhandled, ends the process
        fcntl(STDIN_FILENO, F_SETOWN, getpid());
        fcntl(STDIN_FILENO, F_SETFL, fcntl(STDIN_FILENO, F_GETFL) | O_ASYNC);
    }
}
