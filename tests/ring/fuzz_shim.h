/* SPDX-License-Identifier: MIT */
/*
 * Stands in for pv_atomic.h in a fuzz target: before each load of shared memory, and before and in the middle of each copy
 * out of it, the fuzzer may rewrite it. `rewrite` decides whether an address is shared.
 */
#ifndef FUZZ_SHIM_H
#define FUZZ_SHIM_H

void rewrite(const void *at, unsigned long n);

#define pv_load_relaxed(p) (rewrite((p), sizeof *(p)), __atomic_load_n((p), __ATOMIC_RELAXED))
#define pv_load_acquire(p) pv_load_relaxed(p)
#define pv_load_ordered(p) pv_load_relaxed(p)
#define pv_store_relaxed(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define pv_store_release(p, v) pv_store_relaxed(p, v)
#define pv_fetch_or(p, v) (rewrite((p), sizeof *(p)), __atomic_fetch_or((p), (v), __ATOMIC_RELAXED))
#define pv_fetch_and(p, v) (rewrite((p), sizeof *(p)), __atomic_fetch_and((p), (v), __ATOMIC_RELAXED))
#define pv_exchange(p, v) (rewrite((p), sizeof *(p)), __atomic_exchange_n((p), (v), __ATOMIC_RELAXED))
#define pv_add(p, n) ((void)__atomic_fetch_add((p), (n), __ATOMIC_RELAXED))
#define pv_count(p) pv_add((p), 1)
#define pv_compare_exchange(p, expected, desired) \
	(rewrite((p), sizeof *(p)),               \
	 __atomic_compare_exchange_n((p), (expected), (desired), 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
#define pv_fence_full() ((void)0)
#define pv_fence_light() ((void)0)
#define pv_fence_heavy(command) ((void)(command), 0)
#define pv_fence_acquire() ((void)0)
#define pv_fence_release() ((void)0)
#define pv_copy_racing(to, from, n) memcpy((to), (from), (n))
#define pv_fence_compiler() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#define pv_prefetch_write(p) ((void)(p))
#define pv_pause() ((void)0)

/* Included after <string.h>. */
#define memcpy(to, from, n) (rewrite((from), (n)), __builtin_memcpy((to), (from), (n)))

#endif
