/* SPDX-License-Identifier: MIT */
/* The chain of requests that makes a packet. */
#include <stddef.h>
#include <string.h>

#include "pv_netif.h"

#define PAGE_BYTES 4096u
#define FRAME_ALIGN 64u

static struct pv_netif_extra extra_of(const struct pv_netif_tx_request *request)
{
	struct pv_netif_extra extra;

	memcpy(&extra, request, sizeof(extra));
	return extra;
}

static int read_gso(const struct pv_netif_extra *extra, struct pv_netif_packet *packet)
{
	uint16_t size;

	memcpy(&size, extra->content, sizeof(size));
	if (!size)
		return -PV_NETIF_FATAL_GSO_SIZE;
	if (extra->content[2] != PV_NETIF_GSO_TCPV4 && extra->content[2] != PV_NETIF_GSO_TCPV6)
		return -PV_NETIF_FATAL_GSO_TYPE;
	packet->gso_size = size;
	packet->gso_type = extra->content[2];
	return 0;
}

#define HASH_TYPES 4               /* of IPv4, with TCP, of IPv6, with TCP */
#define TOEPLITZ 1

/* What a frontend says of a hash that nobody knows is passed over, as by Linux. */
static void read_hash(const struct pv_netif_extra *extra, struct pv_netif_packet *packet)
{
	packet->has_hash = extra->content[0] < HASH_TYPES && extra->content[1] == TOEPLITZ;
	packet->hash_type = packet->has_hash ? extra->content[0] : 0;
	packet->hash = 0;
	if (packet->has_hash)
		memcpy(&packet->hash, extra->content + 2, sizeof(packet->hash));
}

/* Of several of one type the last counts; of two wishes, the one to add. What is said of segments is read at the end: it
 * does not matter to what is no packet or is dropped. */
static int parse_extra(const struct pv_netif_extra *extra, struct pv_netif_packet *packet, struct pv_netif_extra *gso)
{
	switch (extra->type) {
	case PV_NETIF_EXTRA_GSO:
		*gso = *extra;
		return 0;
	case PV_NETIF_EXTRA_MCAST_ADD:
	case PV_NETIF_EXTRA_MCAST_DEL:
		if (packet->mcast == PV_NETIF_EXTRA_MCAST_ADD && extra->type != packet->mcast)
			return 0;
		packet->mcast = extra->type;
		memcpy(packet->mcast_address, extra->content, sizeof(packet->mcast_address));
		return 0;
	case PV_NETIF_EXTRA_HASH:
		read_hash(extra, packet);
		return 0;
	case PV_NETIF_EXTRA_XDP:
		return 0;
	default:
		return -PV_NETIF_FATAL_EXTRA;
	}
}

/* Slots from requests[1] on; how many, 0: they do not end, or -PV_NETIF_FATAL_*. */
static int parse_extras(const struct pv_netif_tx_request *requests, uint32_t n, struct pv_netif_packet *packet,
			struct pv_netif_extra *gso)
{
	struct pv_netif_extra extra = { .flags = PV_NETIF_EXTRA_MORE };

	while (extra.flags & PV_NETIF_EXTRA_MORE) {
		int result;

		/* Many of one type are odd but well; a chain that is nothing but extra information is none. */
		if (packet->n_extras == PV_NETIF_MAX_EXTRAS)
			return -PV_NETIF_FATAL_EXTRA;
		if (1 + packet->n_extras >= n)
			return 0;
		extra = extra_of(&requests[1 + packet->n_extras]);
		result = parse_extra(&extra, packet, gso);
		if (result)
			return result;
		packet->n_extras++;
	}
	return (int)packet->n_extras;
}

static int crosses_page(const struct pv_netif_tx_request *request)
{
	return (uint32_t)request->offset + request->size > PAGE_BYTES;
}

/* Pages after the first; 0, or -PV_NETIF_FATAL_*, 1: they do not end. */
static int parse_following(const struct pv_netif_tx_request *requests, uint32_t n, struct pv_netif_packet *packet)
{
	struct pv_netif_tx_request *first = &packet->data[0];
	uint32_t following = 0;
	int more = first->flags & PV_NETIF_MORE_DATA;

	while (more) {
		struct pv_netif_tx_request next;

		if (following >= PV_NETIF_FATAL_FOLLOWING)
			return -PV_NETIF_FATAL_SLOTS;
		if (following >= n)
			return 1;
		next = requests[following++];
		if (following > PV_NETIF_MAX_FOLLOWING)
			packet->status = PV_NETIF_ERROR;
		/* Of a frame of 64 KiB and more the size has wrapped: frontends were seen to send some. */
		if (next.size > first->size)
			packet->status = PV_NETIF_ERROR;
		if (crosses_page(&next))
			return -PV_NETIF_FATAL_PAGE;
		first->size = (uint16_t)(first->size - next.size);
		if (packet->n_data < PV_NETIF_MAX_DATA)
			packet->data[packet->n_data++] = next;
		more = next.flags & PV_NETIF_MORE_DATA;
	}
	packet->n_requests += following;
	return 0;
}

int pv_netif_parse(const struct pv_netif_tx_request *requests, uint32_t n, struct pv_netif_packet *packet)
{
	struct pv_netif_extra gso = { .type = 0 };
	int result;

	if (!n)
		return 0;
	packet->n_requests = 1;
	packet->n_extras = 0;
	packet->n_data = 1;
	packet->status = PV_NETIF_OKAY;
	packet->bytes = requests[0].size;
	packet->flags = requests[0].flags;
	packet->gso_size = 0;
	packet->gso_type = packet->mcast = packet->has_hash = packet->hash_type = 0;
	packet->hash = 0;
	packet->data[0] = requests[0];
	if (packet->flags & PV_NETIF_EXTRA_INFO) {
		result = parse_extras(requests, n, packet, &gso);
		if (result <= 0)
			return result;
		packet->n_requests += packet->n_extras;
	}
	if (packet->mcast)
		return (int)packet->n_requests;
	result = parse_following(requests + packet->n_requests, n - packet->n_requests, packet);
	if (result)
		return result > 0 ? 0 : result;
	if (packet->bytes < PV_NETIF_MIN_FRAME)
		packet->status = PV_NETIF_ERROR;
	if (packet->status)
		return (int)packet->n_requests;
	if (crosses_page(&packet->data[0]))
		return -PV_NETIF_FATAL_PAGE;
	result = gso.type ? read_gso(&gso, packet) : 0;
	return result ? result : (int)packet->n_requests;
}

int pv_netif_missing(const struct pv_netif_tx_request *requests, uint32_t n)
{
	struct pv_netif_packet packet = { .n_extras = 0 };
	struct pv_netif_extra gso;

	if (n && requests[0].flags & PV_NETIF_EXTRA_INFO && parse_extras(requests, n, &packet, &gso) == 0)
		return PV_NETIF_FATAL_NO_EXTRA;
	return PV_NETIF_FATAL_SHORT;
}

void pv_netif_answer(const struct pv_netif_tx_request *requests, uint32_t n, uint32_t n_extras, int status,
		     struct pv_netif_tx_response *responses)
{
	for (uint32_t i = 0; i < n; i++) {
		int is_extra = i > 0 && i <= n_extras;

		responses[i].id = is_extra ? 0 : requests[i].id;
		responses[i].status = (int16_t)(is_extra ? PV_NETIF_NULL : status);
	}
}

/* ---- bursts ---- */

void pv_burst_clear(struct pv_burst *burst)
{
	burst->n = burst->used = 0;
}

struct pv_frame *pv_burst_next(struct pv_burst *burst, uint32_t n_bytes)
{
	uint32_t from = burst->used + PV_BURST_HEADROOM;
	struct pv_frame *frame;

	if (burst->n == burst->max || burst->capacity < from || burst->capacity - from < n_bytes)
		return NULL;
	frame = &burst->frames[burst->n];
	*frame = (struct pv_frame){ .offset = from, .length = n_bytes };
	return frame;
}

void pv_burst_keep(struct pv_burst *burst, const struct pv_frame *frame)
{
	burst->used = (frame->offset + frame->length + FRAME_ALIGN - 1) & ~(FRAME_ALIGN - 1);
	burst->n++;
}
