/* SPDX-License-Identifier: MIT */
/*
 * Xen's own macros, public/io/ring.h. -DCHECK_NOTIFY=1: they look whether to notify, as drivers do; 0: they do not.
 * One way, a response without content hands a slot back, for half a ring at a time.
 */
#include "peer.h"

#define __XEN_INTERFACE_VERSION__ 0x00040d00
#define xen_mb() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define xen_rmb() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define xen_wmb() __atomic_thread_fence(__ATOMIC_RELEASE)
#include <xen/io/ring.h>

DEFINE_RING_TYPES(peer, struct request, struct response);

#define RING_BYTES (64 + SLOTS * sizeof(union peer_sring_entry))

struct end {
	peer_front_ring_t front;
	peer_back_ring_t back;
	uint64_t notified;
	uint32_t owed;
};

static struct end ends[2];

static size_t peer_bytes(void)
{
	return RING_BYTES;
}

static void peer_prepare(void *memory)
{
	SHARED_RING_INIT((struct peer_sring *)memory);
}

static struct end *peer_open(void *memory, int is_front)
{
	struct peer_sring *shared = memory;

	if (is_front)
		FRONT_RING_INIT(&ends[1].front, shared, RING_BYTES);
	else
		BACK_RING_INIT(&ends[0].back, shared, RING_BYTES);
	return &ends[is_front];
}

static inline uint32_t least(uint32_t a, uint32_t b)
{
	return a < b ? a : b;
}

/* The private half of a ring is worked on in registers, as where it is a local variable of a loop. */
INLINE uint32_t send_requests(struct end *end, const struct request *requests, uint32_t n)
{
	peer_front_ring_t ring = end->front;
	int notify = 0;

	n = least(n, RING_FREE_REQUESTS(&ring));
	if (!n)
		return 0;
	for (uint32_t i = 0; i < n; i++)
		memcpy(RING_GET_REQUEST(&ring, ring.req_prod_pvt++), &requests[i], sizeof *requests);
	if (CHECK_NOTIFY)
		RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&ring, notify);
	else
		RING_PUSH_REQUESTS(&ring);
	if (notify)
		end->notified++;
	end->front.req_prod_pvt = ring.req_prod_pvt;
	return n;
}

INLINE uint32_t take_responses(struct end *end, struct response *responses, uint32_t n)
{
	peer_front_ring_t ring = end->front;
	RING_IDX last = __atomic_load_n(&ring.sring->rsp_prod, __ATOMIC_RELAXED);
	uint32_t taken = 0;

	xen_rmb();
	for (; ring.rsp_cons != last && taken < n; ring.rsp_cons++, taken++) {
		memcpy(&responses[taken], RING_GET_RESPONSE(&ring, ring.rsp_cons), sizeof *responses);
		FORCE(responses[taken]);
	}
	end->front.rsp_cons = ring.rsp_cons;
	return taken;
}

INLINE uint32_t take_requests(struct end *end, struct request *requests, uint32_t n)
{
	peer_back_ring_t ring = end->back;
	RING_IDX last = __atomic_load_n(&ring.sring->req_prod, __ATOMIC_RELAXED);
	uint32_t taken = 0;

	xen_rmb();
	if (RING_REQUEST_PROD_OVERFLOW(&ring, last))
		abort();
	for (; ring.req_cons != last && taken < n; ring.req_cons++, taken++) {
		memcpy(&requests[taken], RING_GET_REQUEST(&ring, ring.req_cons), sizeof *requests);
		FORCE(requests[taken]);
	}
	end->back.req_cons = ring.req_cons;
	return taken;
}

INLINE void push_responses(struct end *end)
{
	int notify = 0;

	if (CHECK_NOTIFY)
		RING_PUSH_RESPONSES_AND_CHECK_NOTIFY(&end->back, notify);
	else
		RING_PUSH_RESPONSES(&end->back);
	if (notify)
		end->notified++;
}

INLINE uint32_t send_responses(struct end *end, const struct response *responses, uint32_t n)
{
	peer_back_ring_t ring = end->back;

	for (uint32_t i = 0; i < n; i++)
		memcpy(RING_GET_RESPONSE(&ring, ring.rsp_prod_pvt++), &responses[i], sizeof *responses);
	end->back.rsp_prod_pvt = ring.rsp_prod_pvt;
	push_responses(end);
	return n;
}

INLINE void pause_empty(struct end *end)
{
	(void)end;
}

INLINE void hand_back(struct end *end, uint32_t n)
{
	end->owed += n;
	if (end->owed < SLOTS / 2)
		return;
	end->back.rsp_prod_pvt += end->owed;
	end->owed = 0;
	push_responses(end);
}

INLINE uint32_t make_room(struct end *end)
{
	RING_IDX before = end->front.rsp_cons;

	end->front.rsp_cons = __atomic_load_n(&end->front.sring->rsp_prod, __ATOMIC_ACQUIRE);
	return end->front.rsp_cons - before;
}
