/* SPDX-License-Identifier: MIT */
/*
 * Stands in for pv_atomic.h: every access goes to the explorer (explore.c), with its order and its number in the file.
 * SITE_BASE is the file's first number; the accesses follow in the order of the text, as sites.py counts them. System
 * calls that sleep and wake are the explorer's too.
 */
#ifndef EXPLORE_SHIM_H
#define EXPLORE_SHIM_H

#include <stdint.h>

enum order { RELAXED, ACQUIRE, RELEASE, ACQ_REL, SEQ_CST };
enum rmw { OR, AND, EXCHANGE, ADD };

#define NO_SITE 4095            /* of an access that stands in no file of the core */

uint64_t explore_load(const void *at, uint32_t bytes, enum order order, int site);
void explore_store(void *at, uint32_t bytes, uint64_t value, enum order order, int site);
uint64_t explore_rmw(void *at, uint32_t bytes, enum rmw what, uint64_t value, enum order order, int site);
int explore_compare_exchange(void *at, uint32_t bytes, void *expected, uint64_t desired, int site);
void explore_fence(int site);
int explore_membarrier(int site);
void explore_fence_one_way(int is_acquire, int site);
void explore_copy_racing(void *to, const void *from, uint64_t n);
void explore_copy(void *to, const void *from, uint64_t n);

#define SITE (SITE_BASE + __COUNTER__)
#define pv_load_relaxed(p) ((__typeof__(*(p) + 0))explore_load((p), sizeof *(p), RELAXED, SITE))
#define pv_load_acquire(p) ((__typeof__(*(p) + 0))explore_load((p), sizeof *(p), ACQUIRE, SITE))
#define pv_load_ordered(p) ((__typeof__(*(p) + 0))explore_load((p), sizeof *(p), SEQ_CST, SITE))
#define pv_store_relaxed(p, v) explore_store((p), sizeof *(p), (v), RELAXED, SITE)
#define pv_store_release(p, v) explore_store((p), sizeof *(p), (v), RELEASE, SITE)
#define pv_fetch_or(p, v) ((__typeof__(*(p) + 0))explore_rmw((p), sizeof *(p), OR, (v), SEQ_CST, SITE))
#define pv_fetch_and(p, v) ((__typeof__(*(p) + 0))explore_rmw((p), sizeof *(p), AND, (v), SEQ_CST, SITE))
#define pv_exchange(p, v) ((__typeof__(*(p) + 0))explore_rmw((p), sizeof *(p), EXCHANGE, (v), SEQ_CST, SITE))
#define pv_add(p, n) ((void)explore_rmw((p), sizeof *(p), ADD, (n), RELAXED, SITE))
#define pv_count(p) ((void)explore_rmw((p), sizeof *(p), ADD, 1, RELAXED, SITE))
#define pv_compare_exchange(p, expected, desired) \
	explore_compare_exchange((p), sizeof *(p), (expected), (desired), SITE)
#define pv_fence_full() explore_fence(SITE)
#define pv_fence_heavy(command) ((void)(command), explore_membarrier(SITE))
#define pv_fence_light() ((void)SITE)
#define pv_fence_acquire() explore_fence_one_way(1, SITE)
#define pv_fence_release() explore_fence_one_way(0, SITE)
#define pv_copy_racing(to, from, n) explore_copy_racing((to), (from), (n))
#define pv_fence_compiler() ((void)SITE)
#define pv_prefetch_write(p) ((void)(p))
#define pv_pause() ((void)0)

/* Included after the system's headers. */
struct epoll_event;
int explore_epoll_ctl(int epoll_fd, int operation, int fd);
int explore_epoll_wait(int epoll_fd, struct epoll_event *events, int max, int timeout_ms);
int explore_open(void);
int explore_eventfd(void);
long explore_read(int fd);
long explore_write(int fd);
int explore_yield(void);
struct timespec;
struct itimerspec;
int explore_clock(struct timespec *now);
int explore_timer_set(int fd, const struct itimerspec *at);

#define memcpy(to, from, n) explore_copy((to), (from), (n))
#define clock_gettime(clock, now) ((void)(clock), explore_clock(now))
#define timerfd_create(clock, flags) explore_open()
#define timerfd_settime(fd, flags, at, before) explore_timer_set((fd), (at))
#define epoll_create1(flags) explore_open()
#define eventfd(count, flags) explore_eventfd()
#define epoll_ctl(epoll_fd, operation, fd, event) ((void)(event), explore_epoll_ctl(epoll_fd, operation, fd))
#define epoll_wait(epoll_fd, events, max, timeout_ms) explore_epoll_wait(epoll_fd, events, max, timeout_ms)
#define fcntl(...) 0
#define fstat(fd, status) ((void)(status), -1)
#define close(fd) ((void)(fd))
#define read(fd, data, n) ((void)(data), explore_read(fd))
#define write(fd, data, n) ((void)(data), (ssize_t)explore_write(fd))
#define sched_yield() explore_yield()

#endif
