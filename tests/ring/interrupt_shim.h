/* SPDX-License-Identifier: MIT */
/* Stands in for pv_atomic.h: a call of `interrupt` before each access, and everything sequentially consistent. */
#ifndef INTERRUPT_SHIM_H
#define INTERRUPT_SHIM_H

#include <string.h>

void interrupt(void);

/* Interrupted in the middle. */
static inline void copy_racing(void *to, const void *from, size_t n)
{
	interrupt();
	memcpy(to, from, n / 2);
	interrupt();
	memcpy((char *)to + n / 2, (const char *)from + n / 2, n - n / 2);
}

#define SHIM_ORDER __ATOMIC_SEQ_CST
#define pv_load_relaxed(p) (interrupt(), __atomic_load_n((p), SHIM_ORDER))
#define pv_load_acquire(p) pv_load_relaxed(p)
#define pv_load_ordered(p) pv_load_relaxed(p)
#define pv_store_relaxed(p, v) (interrupt(), __atomic_store_n((p), (v), SHIM_ORDER))
#define pv_store_release(p, v) pv_store_relaxed(p, v)
#define pv_fetch_or(p, v) (interrupt(), __atomic_fetch_or((p), (v), SHIM_ORDER))
#define pv_fetch_and(p, v) (interrupt(), __atomic_fetch_and((p), (v), SHIM_ORDER))
#define pv_exchange(p, v) (interrupt(), __atomic_exchange_n((p), (v), SHIM_ORDER))
#define pv_fence_full() interrupt()
#define pv_fence_light() interrupt()
#define pv_fence_heavy(command) (interrupt(), 0)
#define pv_fence_acquire() interrupt()
#define pv_fence_release() interrupt()
#define pv_copy_racing(to, from, n) copy_racing((to), (from), (n))
#define pv_count(p) pv_add((p), 1)
#define pv_add(p, n) ((void)__atomic_fetch_add((p), (n), SHIM_ORDER))
#define pv_compare_exchange(p, expected, desired) \
	__atomic_compare_exchange_n((p), (expected), (desired), 0, SHIM_ORDER, SHIM_ORDER)
#define pv_fence_compiler() ((void)0)
#define pv_prefetch_write(p) ((void)(p))
#define pv_pause() ((void)0)

#endif
