/* SPDX-License-Identifier: MIT */
/* Stands in for pv_atomic.h: every compare-exchange finds that the peer has just changed the entry, and is counted; each
 * copy without a pin finds it afterwards. */
#ifndef FLIP_SHIM_H
#define FLIP_SHIM_H

#include <stdint.h>
#include <string.h>

int flip(uint64_t *word, uint64_t *expected);
void flip_one(const void *page);

#define pv_load_relaxed(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)
#define pv_load_acquire(p) pv_load_relaxed(p)
#define pv_store_relaxed(p, v) __atomic_store_n((p), (v), __ATOMIC_SEQ_CST)
#define pv_store_release(p, v) pv_store_relaxed(p, v)
#define pv_fetch_or(p, v) __atomic_fetch_or((p), (v), __ATOMIC_SEQ_CST)
#define pv_fetch_and(p, v) __atomic_fetch_and((p), (v), __ATOMIC_SEQ_CST)
#define pv_exchange(p, v) __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST)
#define pv_compare_exchange(p, expected, desired) ((void)(desired), flip((p), (expected)))
#define pv_count(p) ((void)++*(p))
#define pv_fence_acquire() ((void)0)
#define pv_fence_release() ((void)0)
#define pv_copy_racing(to, from, n) (flip_one((from)), memcpy((to), (from), (n)))
#define pv_fence_compiler() ((void)0)
#define pv_pause() ((void)0)
#define pv_prefetch_write(p) ((void)(p))

#endif
