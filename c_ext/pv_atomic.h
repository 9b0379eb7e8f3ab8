/* SPDX-License-Identifier: MIT */
/*
 * The one place that names memory orders. Everything in shared memory is read and written through these; the README in
 * this folder lists every use with the access it pairs with.
 *
 * The macros take plain integer pointers (so that the public headers stay readable by cffi) and are built on the
 * compiler's __atomic builtins. A test may replace this header by a shim that records or reorders accesses: define
 * PV_ATOMIC_SHIM to its name.
 */
#ifndef PV_ATOMIC_H
#define PV_ATOMIC_H

#include <stddef.h>
#include <string.h>

#ifdef PV_ATOMIC_SHIM
#include PV_ATOMIC_SHIM
#else

#include <sys/syscall.h>
#include <unistd.h>

/* A word whose value guards nothing else, or that only its reader writes. Read once: never re-read by the compiler. */
#define pv_load_relaxed(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define pv_store_relaxed(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)

/* Hand-over of slots: everything written before the release is visible after the acquire that reads its value. */
#define pv_load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define pv_store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)

/* The second half of "I wrote mine, now I read yours" after one of the read-modify-writes below: acquire is not enough,
 * both sides could read the old value. */
#define pv_load_ordered(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)

/* Read-modify-write, sequentially consistent: bits that several writers set, and grant flags. */
#define pv_fetch_or(p, v) __atomic_fetch_or((p), (v), __ATOMIC_SEQ_CST)
#define pv_fetch_and(p, v) __atomic_fetch_and((p), (v), __ATOMIC_SEQ_CST)
#define pv_exchange(p, v) __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST)
#define pv_compare_exchange(p, expected, desired) \
	__atomic_compare_exchange_n((p), (expected), (desired), 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)

/* A private counter that several threads bump; it orders nothing. */
#define pv_count(p) pv_add((p), 1)
#define pv_add(p, n) ((void)__atomic_fetch_add((p), (n), __ATOMIC_RELAXED))

/*
 * A copy of bytes that their owner may change meanwhile, and the two fences by which its reader finds out: the owner says
 * that the bytes are its own again, then pv_fence_release, then changes them; the reader copies, then pv_fence_acquire,
 * then looks whether they were still its to read. No instruction on x86.
 */
#define pv_copy_racing(to, from, n) pv_copy((to), (from), (n))
#define pv_fence_acquire() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define pv_fence_release() __atomic_thread_fence(__ATOMIC_RELEASE)

/* Store-then-load order ("publish, then look whether the other side sleeps"). The expensive one: one a batch. */
#define pv_fence_full() __atomic_thread_fence(__ATOMIC_SEQ_CST)

/*
 * The same order, paid for by one side alone (membarrier(2)): the side that is in a hurry keeps the compiler from moving
 * its load over its store; the other side, on its way to sleep, has the kernel run a full barrier on every CPU that runs
 * a thread of that process (or, "global", of any process that registered for it) before it looks. `command` is one of
 * the kernel's; 0, or -1 and errno.
 */
#define pv_fence_light() pv_fence_compiler()
#define pv_fence_heavy(command) ((int)syscall(SYS_membarrier, (command), 0, 0))

/* Keeps the compiler from moving or merging accesses; no instruction. */
#define pv_fence_compiler() __atomic_signal_fence(__ATOMIC_SEQ_CST)

/* Ask for a cache line to be written soon; only a hint. */
#if defined(__x86_64__)
#define pv_prefetch_write(p) __asm__ volatile("prefetchw %0" : : "m"(*(const char *)(p)))
#else
#define pv_prefetch_write(p) __builtin_prefetch((p), 1)
#endif

#if defined(__x86_64__) || defined(__i386__)
#define pv_pause() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define pv_pause() __asm__ volatile("yield" ::: "memory")
#else
#define pv_pause() pv_fence_compiler()
#endif

#endif

/*
 * memcpy of the C library, whatever is known of n: where gcc knows a bound it would rather put a "rep movs" in its place,
 * which takes longer from some ten bytes on.
 */
static inline void pv_copy(void *to, const void *from, size_t n)
{
	__asm__("" : "+r"(n));
	memcpy(to, from, n);
}

#endif
