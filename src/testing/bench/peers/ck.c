/* SPDX-License-Identifier: MIT */
/* Concurrency Kit's ck_ring, one for each way, one producer and one consumer. It moves one message at a time. */
#include "peer.h"

#include <ck_ring.h>

#include "queues.h"

CK_RING_PROTOTYPE(request, request)
CK_RING_PROTOTYPE(response, response)

struct queues {
	ck_ring_t requests;
	ck_ring_t responses;
	struct request request_slots[SLOTS];
	struct response response_slots[SLOTS];
};

static size_t peer_bytes(void)
{
	return sizeof(struct queues);
}

static void find_queues(void *memory, struct end *end)
{
	end->requests = end->responses = memory;
}

static void peer_prepare(void *memory)
{
	struct queues *queues = memory;

	ck_ring_init(&queues->requests, SLOTS);
	ck_ring_init(&queues->responses, SLOTS);
}

INLINE uint32_t send_requests(struct end *end, const struct request *requests, uint32_t n)
{
	struct queues *queues = end->requests;
	uint32_t i = 0;

	while (i < n && CK_RING_ENQUEUE_SPSC(request, &queues->requests, queues->request_slots, (void *)&requests[i]))
		i++;
	return i;
}

INLINE uint32_t take_requests(struct end *end, struct request *requests, uint32_t n)
{
	struct queues *queues = end->requests;
	uint32_t i = 0;

	for (; i < n && CK_RING_DEQUEUE_SPSC(request, &queues->requests, queues->request_slots, &requests[i]); i++)
		FORCE(requests[i]);
	return i;
}

INLINE uint32_t send_responses(struct end *end, const struct response *responses, uint32_t n)
{
	struct queues *queues = end->responses;
	uint32_t i = 0;

	while (i < n && CK_RING_ENQUEUE_SPSC(response, &queues->responses, queues->response_slots, (void *)&responses[i]))
		i++;
	return i;
}

INLINE uint32_t take_responses(struct end *end, struct response *responses, uint32_t n)
{
	struct queues *queues = end->responses;
	uint32_t i = 0;

	for (; i < n && CK_RING_DEQUEUE_SPSC(response, &queues->responses, queues->response_slots, &responses[i]); i++)
		FORCE(responses[i]);
	return i;
}
