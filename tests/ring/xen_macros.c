/* SPDX-License-Identifier: MIT */
/*
 * Every macro of Xen's ring.h beside the function here that stands for it: two rings, one driven by the macros and one by
 * the functions, take the same random steps; after each, all answers and all shared bytes are the same.
 *
 *   xen_macros STEPS SEED
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pv_ring.h"

#define __XEN_INTERFACE_VERSION__ 0x00040d00
#define xen_mb() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define xen_rmb() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define xen_wmb() __atomic_thread_fence(__ATOMIC_RELEASE)
#include <xen/io/ring.h>

struct request {
	uint64_t id;
	uint64_t more[2];
};

struct response {
	uint64_t id;
};

DEFINE_RING_TYPES(test, struct request, struct response);

#define BYTES 1024
#define MOST 40

#define CHECK(condition)                                                                                       \
	do {                                                                                                   \
		if (!(condition)) {                                                                            \
			fprintf(stderr, "xen_macros: line %d, step %ld: " #condition "\n", __LINE__, step);    \
			exit(1);                                                                               \
		}                                                                                              \
	} while (0)

static uint8_t xen_memory[BYTES] __attribute__((aligned(64))), our_memory[BYTES] __attribute__((aligned(64)));
static test_front_ring_t xen_front;
static test_back_ring_t xen_back;
static struct pv_ring front, back;
static uint64_t state, next_id;
static long step;

static uint32_t choose(uint32_t below)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (uint32_t)(state >> 32) % below;
}

static void start_anew(void)
{
	static const uint32_t starts[] = {0, 1, UINT32_MAX, UINT32_MAX - 20, 1u << 31};
	uint32_t start = starts[choose(5)];
	struct test_sring *shared = (struct test_sring *)xen_memory;

	memset(xen_memory, 0, BYTES);
	memset(our_memory, 0, BYTES);
	SHARED_RING_INIT(shared);
	if (start == 0) {
		FRONT_RING_INIT(&xen_front, shared, BYTES);
		BACK_RING_INIT(&xen_back, shared, BYTES);
	} else {
		shared->req_prod = shared->rsp_prod = start;
		shared->req_event = shared->rsp_event = start + 1;
		FRONT_RING_ATTACH(&xen_front, shared, start, BYTES);
		BACK_RING_ATTACH(&xen_back, shared, start, BYTES);
	}
	CHECK(pv_ring_create(&front, our_memory, BYTES, 24, 24, 8, NULL, start) == 0);
	CHECK(pv_ring_attach_at(&back, our_memory, BYTES, 24, 24, 8, NULL, 0, start + 1) == -EBUSY);
	CHECK(pv_ring_attach_at(&back, our_memory, BYTES, 24, 24, 8, NULL, 0, start) == 0);
	CHECK(front.size == RING_SIZE(&xen_front));
}

static void push_requests(int check)
{
	struct request batch[MOST];
	uint32_t n = choose(MOST), room = RING_FREE_REQUESTS(&xen_front), i;
	uint64_t notified = front.notified;
	int needed = 0;

	if (n > room)
		n = room;
	for (i = 0; i < n; i++) {
		batch[i] = (struct request){.id = next_id, .more = {next_id * 3, next_id * 5}};
		*RING_GET_REQUEST(&xen_front, xen_front.req_prod_pvt++) = batch[i];
		next_id++;
	}
	if (check && n) {
		RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&xen_front, needed);
		CHECK(pv_ring_push(&front, batch, n) == n);
		CHECK(front.notified - notified == (uint64_t)needed);
		return;
	}
	/* The macros' next check does not cover what was pushed without one, ours does: so look at once, by hand. */
	RING_IDX before = xen_front.sring->req_prod;

	RING_PUSH_REQUESTS(&xen_front);
	needed = (RING_IDX)(xen_front.req_prod_pvt - xen_front.sring->req_event) < (RING_IDX)(xen_front.req_prod_pvt - before);
	CHECK(pv_ring_push_quiet(&front, batch, n) == n);
	CHECK(front.notified == notified);
	CHECK(pv_ring_notify(&front) == 0);
	CHECK(front.notified - notified == (uint64_t)needed);
}

static void take_requests(void)
{
	uint32_t most = choose(MOST), n = 0;
	struct request xen[MOST], ours[MOST];

	while (n < most && RING_HAS_UNCONSUMED_REQUESTS(&xen_back)) {
		RING_COPY_REQUEST(&xen_back, xen_back.req_cons, &xen[n]);
		xen_back.req_cons++;
		n++;
	}
	CHECK(pv_ring_take(&back, ours, most) == n);
	CHECK(memcmp(xen, ours, n * sizeof *xen) == 0);
}

static void push_responses(void)
{
	uint32_t n = choose(MOST), taken = xen_back.req_cons - xen_back.rsp_prod_pvt;
	struct response batch[MOST];
	uint64_t notified = back.notified;
	int needed;

	if (n > taken)
		n = taken;
	if (n == 0)
		return;
	for (uint32_t i = 0; i < n; i++) {
		batch[i].id = state + i;
		*RING_GET_RESPONSE(&xen_back, xen_back.rsp_prod_pvt++) = batch[i];
	}
	RING_PUSH_RESPONSES_AND_CHECK_NOTIFY(&xen_back, needed);
	if (choose(2)) {
		CHECK(pv_ring_push(&back, batch, n) == n);
	} else {
		struct pv_ring_slots slots;
		uint32_t filled = 0;

		/* In place, one publication: the run after the wrap is found once the first is committed. */
		CHECK(pv_ring_reserve(&back, n, &slots) == 0 && slots.n >= 1 && slots.n <= n);
		for (; filled < slots.n; filled++)
			memcpy(slots.first + filled * 24, &batch[filled], 8);
		if (slots.n < n) {
			CHECK(pv_ring_push_quiet(&back, batch, n) == n);
			CHECK(pv_ring_notify(&back) == 0);
		} else {
			CHECK(pv_ring_commit(&back, n) == n);
		}
	}
	CHECK(back.notified - notified == (uint64_t)needed);
}

static void take_responses(void)
{
	uint32_t most = choose(MOST), n = 0;
	struct response xen[MOST], ours[MOST];

	while (n < most && RING_HAS_UNCONSUMED_RESPONSES(&xen_front)) {
		RING_COPY_RESPONSE(&xen_front, xen_front.rsp_cons, &xen[n]);
		xen_front.rsp_cons++;
		n++;
	}
	CHECK(pv_ring_take(&front, ours, most) == n);
	CHECK(memcmp(xen, ours, n * sizeof *xen) == 0);
}

static void check_front(void)
{
	int more;

	RING_FINAL_CHECK_FOR_RESPONSES(&xen_front, more);
	CHECK(pv_ring_final_check(&front) == !!more);
}

static void check_back(void)
{
	int more;

	RING_FINAL_CHECK_FOR_REQUESTS(&xen_back, more);
	CHECK(pv_ring_final_check(&back) == !!more);
}

static void compare(void)
{
	uint32_t index = xen_back.rsp_prod_pvt + choose(200) - 100;
	/* A response that passes the requests is refused, too; the macro leaves that to the caller. */
	int passes = index - xen_front.rsp_cons > xen_front.req_prod_pvt - xen_front.rsp_cons;

	CHECK(memcmp(xen_memory, our_memory, BYTES) == 0);
	CHECK(pv_ring_room(&front) == RING_FREE_REQUESTS(&xen_front));
	CHECK(pv_ring_full(&front) == RING_FULL(&xen_front));
	CHECK(pv_ring_unconsumed(&front) == XEN_RING_NR_UNCONSUMED_RESPONSES(&xen_front));
	CHECK(pv_ring_unconsumed(&back) == XEN_RING_NR_UNCONSUMED_REQUESTS(&xen_back));
	CHECK(pv_ring_poll(&front) == !!RING_HAS_UNCONSUMED_RESPONSES(&xen_front));
	CHECK(pv_ring_poll(&back) == !!RING_HAS_UNCONSUMED_REQUESTS(&xen_back));
	CHECK(pv_ring_cons_overflow(&back, index) == RING_REQUEST_CONS_OVERFLOW(&xen_back, index));
	CHECK(pv_ring_prod_overflow(&front, index) == (RING_RESPONSE_PROD_OVERFLOW(&xen_front, index) || passes));
	/* Ours counts from what was taken, so it also sees an index that goes back behind it. */
	if (index - xen_back.req_cons <= RING_SIZE(&xen_back))
		CHECK(pv_ring_prod_overflow(&back, index) == RING_REQUEST_PROD_OVERFLOW(&xen_back, index));
	else
		CHECK(pv_ring_prod_overflow(&back, index));
}

int main(int argc, char **argv)
{
	long steps;

	if (argc != 3)
		return 2;
	steps = atol(argv[1]);
	state = strtoull(argv[2], NULL, 10) * 2 + 1;
	for (; step < steps; step++) {
		uint32_t what = step % 1000 == 0 ? 0 : 1 + choose(7);

		if (what == 0)
			start_anew();
		else if (what <= 2)
			push_requests(what == 1);
		else if (what == 3)
			take_requests();
		else if (what == 4)
			push_responses();
		else if (what == 5)
			take_responses();
		else if (what == 6)
			check_front();
		else
			check_back();
		compare();
	}
	puts("ok");
	return 0;
}
