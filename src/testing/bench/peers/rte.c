/* SPDX-License-Identifier: MIT */
/*
 * DPDK's rte_ring, one for each way, each with one producer and one consumer. Only its header is used, whose functions
 * are all inline; what rte_ring_init sets is set here, because the library would want DPDK's environment.
 */
#include "peer.h"

#include <rte_ring.h>

#include "queues.h"

#if REQUEST_BYTES % 4 || RESPONSE_BYTES % 4
#error "rte_ring moves multiples of 4 bytes"
#endif

static size_t queue_bytes(size_t message_bytes)
{
	return (sizeof(struct rte_ring) + SLOTS * message_bytes + 127) / 128 * 128;
}

static size_t peer_bytes(void)
{
	return queue_bytes(REQUEST_BYTES) + queue_bytes(RESPONSE_BYTES);
}

static void find_queues(void *memory, struct end *end)
{
	end->requests = memory;
	end->responses = (uint8_t *)memory + queue_bytes(REQUEST_BYTES);
}

static void init_queue(struct rte_ring *queue)
{
	queue->flags = RING_F_SP_ENQ | RING_F_SC_DEQ;
	queue->prod.sync_type = queue->cons.sync_type = RTE_RING_SYNC_ST;
	queue->size = SLOTS;
	queue->mask = queue->capacity = SLOTS - 1;
}

static void peer_prepare(void *memory)
{
	struct end both;

	find_queues(memory, &both);
	init_queue(both.requests);
	init_queue(both.responses);
}

INLINE uint32_t send_requests(struct end *end, const struct request *requests, uint32_t n)
{
	return rte_ring_sp_enqueue_burst_elem(end->requests, requests, sizeof *requests, n, NULL);
}

INLINE uint32_t take_requests(struct end *end, struct request *requests, uint32_t n)
{
	n = rte_ring_sc_dequeue_burst_elem(end->requests, requests, sizeof *requests, n, NULL);
	FORCE_ALL(requests);
	return n;
}

INLINE uint32_t send_responses(struct end *end, const struct response *responses, uint32_t n)
{
	return rte_ring_sp_enqueue_burst_elem(end->responses, responses, sizeof *responses, n, NULL);
}

INLINE uint32_t take_responses(struct end *end, struct response *responses, uint32_t n)
{
	n = rte_ring_sc_dequeue_burst_elem(end->responses, responses, sizeof *responses, n, NULL);
	FORCE_ALL(responses);
	return n;
}
