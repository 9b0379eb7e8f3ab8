// SPDX-License-Identifier: MIT
// A client on Xen's own C library, to be told by its first argument which of its calls to try.
//
// XENSTORED_PATH names the daemon's socket. The exit code is 0 if everything was as it must be; otherwise the line that
// was not is on standard error. Source: xenstore.h.

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xenstore.h>

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "line %d: not so: %s (errno: %s)\n", __LINE__, #condition, strerror(errno));               \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)
// A call that returns false or NULL, with this errno.
#define REFUSED(code, call)                                                                                            \
    do {                                                                                                               \
        errno = 0;                                                                                                     \
        CHECK(!(call) && errno == (code));                                                                             \
    } while (0)

static struct xs_handle *store;

// Whether a node has just this value.
static bool has(xs_transaction_t transaction, const char *path, const char *value)
{
    unsigned int n_bytes;
    char *got = xs_read(store, transaction, path, &n_bytes);
    bool same = got && n_bytes == strlen(value) && !strcmp(got, value);
    free(got);
    return same;
}

static bool put(xs_transaction_t transaction, const char *path, const char *value)
{
    return xs_write(store, transaction, path, value, (unsigned int)strlen(value));
}

static void nodes(void)
{
    unsigned int n;
    CHECK(put(XBT_NULL, "/a/b", "1"));
    CHECK(xs_mkdir(store, XBT_NULL, "/a/c"));
    CHECK(xs_mkdir(store, XBT_NULL, "/a/c"));  // twice is harmless
    CHECK(has(XBT_NULL, "/a/b", "1"));
    CHECK(has(XBT_NULL, "/a/c", ""));

    char **names = xs_directory(store, XBT_NULL, "/a", &n);
    CHECK(names && n == 2 && !strcmp(names[0], "b") && !strcmp(names[1], "c"));
    free(names);
    names = xs_directory(store, XBT_NULL, "/a/b", &n);
    CHECK(names && n == 0);
    free(names);

    CHECK(xs_write(store, XBT_NULL, "/a/bytes", "\0\1\377\0", 4));
    char *bytes = xs_read(store, XBT_NULL, "/a/bytes", &n);
    CHECK(bytes && n == 4 && !memcmp(bytes, "\0\1\377\0\0", 5));  // the library adds a NUL
    free(bytes);

    CHECK(xs_rm(store, XBT_NULL, "/a/b"));
    CHECK(xs_rm(store, XBT_NULL, "/a/b"));  // its parent is there
    REFUSED(ENOENT, xs_read(store, XBT_NULL, "/a/b", &n));
    REFUSED(ENOENT, xs_directory(store, XBT_NULL, "/a/b", &n));
    REFUSED(ENOENT, xs_rm(store, XBT_NULL, "/x/y"));
    REFUSED(EINVAL, xs_rm(store, XBT_NULL, "/"));
    REFUSED(EINVAL, xs_read(store, XBT_NULL, "/a b", &n));
    REFUSED(EINVAL, xs_mkdir(store, XBT_NULL, "/a/"));
    REFUSED(E2BIG, xs_write(store, XBT_NULL, "/a/b", calloc(1, 5000), 5000));
    CHECK(put(XBT_NULL, "relative", "1"));
    CHECK(has(XBT_NULL, "/local/domain/0/relative", "1"));
}

// A directory that needs several DIRECTORY_PART, read while it changes.
static void large_directory(void)
{
    enum { COUNT = 1200 };
    char path[64];
    unsigned int n;
    for (int i = 0; i < COUNT; i++) {
        snprintf(path, sizeof(path), "/many/child-number-%d", i);
        CHECK(put(XBT_NULL, path, "v"));
    }
    char **names = xs_directory(store, XBT_NULL, "/many", &n);
    CHECK(names && n == COUNT);
    for (int i = 0; i < COUNT; i++) {
        snprintf(path, sizeof(path), "child-number-%d", i);
        CHECK(!strcmp(names[i], path));
    }
    free(names);

    xs_transaction_t transaction = xs_transaction_start(store);
    CHECK(transaction);
    names = xs_directory(store, transaction, "/many", &n);
    CHECK(names && n == COUNT);
    free(names);
    CHECK(xs_transaction_end(store, transaction, false));

    pid_t child = fork();
    CHECK(child >= 0);
    if (!child) {
        struct xs_handle *mine = xs_open(0);
        for (int i = 0; i < COUNT; i++) {
            snprintf(path, sizeof(path), "/many/child-number-%d", i);
            if (!mine || !xs_rm(mine, XBT_NULL, path))
                _exit(1);
        }
        xs_close(mine);
        _exit(0);
    }
    do {  // every listing is one that the directory had at some time: the last names, all there
        names = xs_directory(store, XBT_NULL, "/many", &n);
        CHECK(names && n <= COUNT);
        for (unsigned int i = 0; i < n; i++) {
            snprintf(path, sizeof(path), "child-number-%d", (int)(COUNT - n + i));
            CHECK(!strcmp(names[i], path));
        }
        free(names);
    } while (n);
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && !WEXITSTATUS(status));
}

static void permissions(void)
{
    struct xs_permissions wanted[] = {{0, XS_PERM_NONE}, {0, XS_PERM_READ}, {0, XS_PERM_READ | XS_PERM_WRITE}};
    struct xs_permissions unknown[] = {{7, XS_PERM_NONE}};
    unsigned int n;
    CHECK(put(XBT_NULL, "/a", "1"));
    struct xs_permissions *got = xs_get_permissions(store, XBT_NULL, "/a", &n);
    CHECK(got && n == 1 && got[0].id == 0 && got[0].perms == XS_PERM_NONE);
    free(got);
    CHECK(xs_set_permissions(store, XBT_NULL, "/a", wanted, 3));
    got = xs_get_permissions(store, XBT_NULL, "/a", &n);
    CHECK(got && n == 3);
    for (unsigned int i = 0; i < n; i++)
        CHECK(got[i].id == wanted[i].id && got[i].perms == wanted[i].perms);
    free(got);
    REFUSED(ENOENT, xs_get_permissions(store, XBT_NULL, "/x", &n));
    REFUSED(ENOENT, xs_set_permissions(store, XBT_NULL, "/x", wanted, 3));
    REFUSED(ENOENT, xs_set_permissions(store, XBT_NULL, "/a", unknown, 1));
    REFUSED(EINVAL, xs_set_permissions(store, XBT_NULL, "/a", wanted, 0));
}

static bool next_event_is(const char *path, const char *token)
{
    unsigned int n;
    char **event = xs_read_watch(store, &n);
    bool same = event && n == 2 && !strcmp(event[XS_WATCH_PATH], path) && !strcmp(event[XS_WATCH_TOKEN], token);
    if (!same)
        fprintf(stderr, "event %s %s\n", event ? event[XS_WATCH_PATH] : "none", event ? event[XS_WATCH_TOKEN] : "");
    free(event);
    return same;
}

static void watches(void)
{
    struct xs_handle *other = xs_open(0);
    CHECK(other);
    struct pollfd ready = {.fd = xs_fileno(store), .events = POLLIN};
    CHECK(ready.fd >= 0);
    REFUSED(EAGAIN, xs_check_watch(store));

    CHECK(xs_watch(store, "/a", "token"));
    CHECK(poll(&ready, 1, 30000) == 1);
    CHECK(next_event_is("/a", "token"));
    CHECK(xs_write(other, XBT_NULL, "/a/b", "1", 1));
    CHECK(next_event_is("/a/b", "token"));
    CHECK(xs_rm(other, XBT_NULL, "/a"));
    CHECK(next_event_is("/a", "token"));
    REFUSED(EEXIST, xs_watch(store, "/a", "token"));
    REFUSED(EINVAL, xs_watch(store, "/a//b", "token"));
    CHECK(xs_watch(store, "relative", "2"));
    CHECK(next_event_is("relative", "2"));
    CHECK(xs_write(other, XBT_NULL, "/local/domain/0/relative/x", "1", 1));
    CHECK(next_event_is("relative/x", "2"));
    CHECK(xs_watch(store, "@releaseDomain", "3"));
    CHECK(next_event_is("@releaseDomain", "3"));

    // What was changed before a reply came is in the queue before it, so nothing is needed to wait for it.
    CHECK(put(XBT_NULL, "/a/c", "1"));
    char **event = xs_check_watch(store);
    CHECK(event && !strcmp(event[XS_WATCH_PATH], "/a/c") && !strcmp(event[XS_WATCH_TOKEN], "token"));
    free(event);

    CHECK(xs_unwatch(store, "/a", "token"));
    REFUSED(ENOENT, xs_unwatch(store, "/a", "token"));
    CHECK(xs_write(other, XBT_NULL, "/a/d", "1", 1));
    CHECK(put(XBT_NULL, "relative/y", "1"));
    CHECK(next_event_is("relative/y", "2"));  // and none of /a/d before it
    REFUSED(EAGAIN, xs_check_watch(store));
    xs_close(other);
}

static void transactions(void)
{
    struct xs_handle *other = xs_open(0);
    unsigned int n;
    CHECK(other);
    xs_transaction_t first = xs_transaction_start(store);
    CHECK(first != XBT_NULL);
    CHECK(put(first, "/a/b", "1"));
    CHECK(has(first, "/a/b", "1"));
    REFUSED(ENOENT, xs_read(other, XBT_NULL, "/a/b", &n));
    CHECK(xs_transaction_end(store, first, false));
    CHECK(has(XBT_NULL, "/a/b", "1"));
    REFUSED(ENOENT, xs_read(store, first, "/a/b", &n));
    REFUSED(ENOENT, xs_transaction_end(store, first, false));

    xs_transaction_t aborted = xs_transaction_start(store);
    CHECK(put(aborted, "/a/b", "2"));
    CHECK(xs_transaction_end(store, aborted, true));
    CHECK(has(XBT_NULL, "/a/b", "1"));

    xs_transaction_t loser = xs_transaction_start(store);
    CHECK(has(loser, "/a/b", "1"));
    CHECK(xs_write(other, XBT_NULL, "/a/b", "3", 1));
    CHECK(put(loser, "/a/b", "2"));
    REFUSED(EAGAIN, xs_transaction_end(store, loser, false));
    CHECK(has(XBT_NULL, "/a/b", "3"));
    xs_close(other);
}

static void domains(void)
{
    char *path = xs_get_domain_path(store, 7);
    CHECK(path && !strcmp(path, "/local/domain/7"));
    free(path);
    CHECK(xs_is_domain_introduced(store, 0));
    CHECK(!xs_is_domain_introduced(store, 7));
    REFUSED(EINVAL, xs_introduce_domain(store, 7, 1, 5));
    REFUSED(EINVAL, xs_introduce_domain(store, 0, 1, 0));
    REFUSED(ENOENT, xs_release_domain(store, 7));
    REFUSED(EINVAL, xs_release_domain(store, 0));
    REFUSED(ENOENT, xs_resume_domain(store, 7));
    REFUSED(ENOENT, xs_set_target(store, 7, 0));
    CHECK(!xs_restrict(store, 7));
    CHECK(xs_path_is_subpath("/a", "/a/b") && !xs_path_is_subpath("/a", "/ab"));
}

static void control(void)
{
    char *answer = xs_control_command(store, "check", NULL, 0);
    CHECK(answer);
    free(answer);
    answer = xs_debug_command(store, "print", (void *)"text", sizeof("text"));
    CHECK(answer && !strcmp(answer, "OK"));
    free(answer);
    REFUSED(EINVAL, xs_control_command(store, "nonsense", NULL, 0));
}

// Threads that share one handle.
enum { THREADS = 8, ROUNDS = 200 };

static void *work(void *argument)
{
    char path[64], value[64];
    long number = (long)argument;
    snprintf(path, sizeof(path), "/threads/%ld", number);
    for (int i = 0; i < ROUNDS; i++) {
        snprintf(value, sizeof(value), "%ld in round %d", number, i);
        CHECK(put(XBT_NULL, path, value));
        CHECK(has(XBT_NULL, path, value));
    }
    return NULL;
}

static void *count_events(void *argument)
{
    int *count = argument;
    unsigned int n;
    char **event;
    while ((event = xs_read_watch(store, &n)) && strcmp(event[XS_WATCH_PATH], "/end")) {
        *count += !strncmp(event[XS_WATCH_PATH], "/threads", 8);
        free(event);
    }
    free(event);
    return NULL;
}

static void threads(void)
{
    pthread_t workers[THREADS], watcher;
    int n_events = 0;
    CHECK(xs_watch(store, "/threads", "t") && xs_watch(store, "/end", "e"));
    CHECK(next_event_is("/threads", "t") && next_event_is("/end", "e"));
    CHECK(!pthread_create(&watcher, NULL, count_events, &n_events));
    for (long i = 0; i < THREADS; i++)
        CHECK(!pthread_create(&workers[i], NULL, work, (void *)i));
    for (int i = 0; i < THREADS; i++)
        CHECK(!pthread_join(workers[i], NULL));
    CHECK(put(XBT_NULL, "/end", ""));
    CHECK(!pthread_join(watcher, NULL));
    CHECK(n_events >= THREADS && n_events <= THREADS * ROUNDS);  // equal ones that nobody read yet may be one
}

// Open, close, and a child that must not use its parent's connection.
static void handles(void)
{
    struct xs_handle *one = xs_daemon_open(), *two = xs_open(XS_UNWATCH_FILTER);
    CHECK(one && two);
    xs_daemon_close(one);
    CHECK(xs_write(two, XBT_NULL, "/handles", "1", 1));
    pid_t child = fork();
    if (!child) {
        xs_daemon_destroy_postfork(two);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && !status);
    CHECK(xs_watch(two, "/handles", "t"));
    CHECK(xs_unwatch(two, "/handles", "t"));  // takes the event that waits with it
    REFUSED(EAGAIN, xs_check_watch(two));
    xs_close(two);
    xs_close(NULL);
}

static const struct {
    const char *name;
    void (*run)(void);
} TRIALS[] = {
    {"nodes", nodes},     {"large_directory", large_directory}, {"permissions", permissions}, {"watches", watches},
    {"domains", domains}, {"transactions", transactions},       {"control", control},         {"threads", threads},
    {"handles", handles},
};

int main(int argc, char **argv)
{
    alarm(50);
    store = xs_open(0);
    CHECK(store);
    for (size_t i = 0; argc == 2 && i < sizeof(TRIALS) / sizeof(*TRIALS); i++) {
        if (!strcmp(TRIALS[i].name, argv[1])) {
            TRIALS[i].run();
            xs_close(store);
            return 0;
        }
    }
    fprintf(stderr, "which one?\n");
    return 2;
}
