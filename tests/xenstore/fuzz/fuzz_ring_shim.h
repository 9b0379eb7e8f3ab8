/* SPDX-License-Identifier: MIT */
/* Stands in for pv_atomic.h: before each load of a word its peer may write it. */
#ifndef FUZZ_RING_SHIM_H
#define FUZZ_RING_SHIM_H

void interrupt(const void *word);

#define pv_load_relaxed(p) (interrupt(p), __atomic_load_n((p), __ATOMIC_SEQ_CST))
#define pv_load_acquire(p) pv_load_relaxed(p)
#define pv_load_ordered(p) pv_load_relaxed(p)
#define pv_store_relaxed(p, v) (__atomic_store_n((p), (v), __ATOMIC_SEQ_CST), interrupt(p))
#define pv_store_release(p, v) pv_store_relaxed(p, v)
#define pv_fetch_or(p, v) (interrupt(p), __atomic_fetch_or((p), (v), __ATOMIC_SEQ_CST))
#define pv_fetch_and(p, v) (interrupt(p), __atomic_fetch_and((p), (v), __ATOMIC_SEQ_CST))
#define pv_exchange(p, v) (interrupt(p), __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST))
#define pv_compare_exchange(p, expected, desired) \
	__atomic_compare_exchange_n((p), (expected), (desired), 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)
#define pv_add(p, n) ((void)__atomic_fetch_add((p), (n), __ATOMIC_RELAXED))
#define pv_count(p) pv_add((p), 1)
#define pv_fence_full() ((void)0)
#define pv_fence_compiler() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#define pv_pause() ((void)0)

#endif
