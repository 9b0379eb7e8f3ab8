/* SPDX-License-Identifier: MIT */
/* boost::lockfree::spsc_queue, one for each way. */
#include "peer.h"

#include <boost/lockfree/spsc_queue.hpp>
#include <new>

#include "queues.h"

struct queues {
	boost::lockfree::spsc_queue<request, boost::lockfree::capacity<SLOTS>> requests;
	boost::lockfree::spsc_queue<response, boost::lockfree::capacity<SLOTS>> responses;
};

static size_t peer_bytes(void)
{
	return sizeof(queues);
}

static void find_queues(void *memory, struct end *end)
{
	end->requests = end->responses = memory;
}

static void peer_prepare(void *memory)
{
	new (memory) queues;
}

INLINE uint32_t send_requests(struct end *end, const struct request *requests, uint32_t n)
{
	return static_cast<uint32_t>(static_cast<queues *>(end->requests)->requests.push(requests, n));
}

INLINE uint32_t take_requests(struct end *end, struct request *requests, uint32_t n)
{
	n = static_cast<uint32_t>(static_cast<queues *>(end->requests)->requests.pop(requests, n));
	FORCE_ALL(requests);
	return n;
}

INLINE uint32_t send_responses(struct end *end, const struct response *responses, uint32_t n)
{
	return static_cast<uint32_t>(static_cast<queues *>(end->responses)->responses.push(responses, n));
}

INLINE uint32_t take_responses(struct end *end, struct response *responses, uint32_t n)
{
	n = static_cast<uint32_t>(static_cast<queues *>(end->responses)->responses.pop(responses, n));
	FORCE_ALL(responses);
	return n;
}
