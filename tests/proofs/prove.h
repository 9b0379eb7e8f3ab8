/* SPDX-License-Identifier: MIT */
/*
 * What the harnesses for ESBMC share, and what stands in for pv_atomic.h in them: a hostile peer. Each load of shared
 * memory gives any value, each compare-exchange of it succeeds or not; both are noted. A harness includes a C file of the core
 * and defines is_shared before that. Sequential: one call, with any private state that the file's own rules allow.
 */
#ifndef PROVE_H
#define PROVE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

uint64_t nondet_any(void);
void __ESBMC_assume(_Bool);
void __ESBMC_assert(_Bool, const char *);

#define assume(what) __ESBMC_assume(what)
#define must(what) __ESBMC_assert((what), #what)

static int is_shared(const void *at);

static uint64_t last_load;      /* of shared memory */
static uint64_t last_exchanged; /* what a compare-exchange that succeeded found there */
static uint64_t may_be_set = UINT64_MAX; /* bits of what is loaded: fewer where a loop runs over them */
static int n_loads, n_exchanged;

static uint64_t load(const void *at, uint64_t private_value)
{
	if (!is_shared(at))
		return private_value;
	n_loads++;
	return last_load = nondet_any() & may_be_set;
}

#define LOAD(p) ((__typeof__(*(p) + 0))load((p), (uint64_t)*(p)))
#define pv_load_relaxed(p) LOAD(p)
#define pv_load_acquire(p) LOAD(p)
#define pv_load_ordered(p) LOAD(p)
#define pv_store_relaxed(p, v) ((void)(*(p) = (v)))
#define pv_store_release(p, v) ((void)(*(p) = (v)))
#define UPDATE(p, expression) \
	({ __typeof__(*(p) + 0) old = LOAD(p); *(p) = (__typeof__(*(p)))(expression); old; })
#define pv_fetch_or(p, v) UPDATE(p, old | (v))
#define pv_fetch_and(p, v) UPDATE(p, old & (v))
#define pv_exchange(p, v) UPDATE(p, (v))
#define pv_add(p, n) ((void)(*(p) += (n)))
#define pv_count(p) ((void)++*(p))
#define pv_compare_exchange(p, expected, desired) compare_exchange((p), (expected), (desired))
#define pv_fence_full() ((void)0)
#define pv_fence_light() ((void)0)
#define pv_fence_heavy(command) 0
#define pv_fence_acquire() ((void)0)
#define pv_fence_release() ((void)0)
#define pv_copy_racing(to, from, n) copy_bounded((to), (from), (n))
#define pv_fence_compiler() ((void)0)
#define pv_prefetch_write(p) ((void)(p))
#define pv_pause() ((void)0)

static int compare_exchange(uint64_t *at, uint64_t *expected, uint64_t desired)
{
	if (nondet_any() & 1) {
		*expected = nondet_any();
		return 0;
	}
	last_exchanged = *expected;
	n_exchanged++;
	*at = desired;
	return 1;
}

/* Contents do not matter here; that neither range leaves its object does. */
static void copy_bounded(const void *to, const void *from, uint64_t n)
{
	must(n <= __ESBMC_get_object_size(to) && (uint64_t)__ESBMC_POINTER_OFFSET(to) <= __ESBMC_get_object_size(to) - n);
	must(n <= __ESBMC_get_object_size(from) && (uint64_t)__ESBMC_POINTER_OFFSET(from) <= __ESBMC_get_object_size(from) - n);
}

#define memcpy(to, from, n) copy_bounded((to), (from), (n))

#endif
