/* SPDX-License-Identifier: MIT */
/* Packets of the backend to the guest. */
#include <errno.h>
#include <string.h>

#include "netfront_private.h"
#include "pv_offload.h"

static int64_t flush_posts(struct pv_netfront *front)
{
	int64_t result;

	if (!front->n_posts)
		return 0;
	result = pv_ring_push(front->rx, front->posts, front->n_posts);
	front->n_posts = 0;
	return settle_push(front, result);
}

/* Offer the page of an id again. There is room: its last slot was answered. */
static int64_t post(struct pv_netfront *front, uint16_t id)
{
	front->slot_ids[front->rx_prod++ & (front->rx->size - 1)] = id;
	front->posts[front->n_posts++] = (struct pv_netif_rx_request){ .id = id, .gref = front->rx_gref + id };
	return front->n_posts == PV_NETFRONT_TAKE ? flush_posts(front) : 0;
}

int64_t pv_netfront_post_all(struct pv_netfront *front)
{
	int64_t result = 0;

	for (uint32_t id = 0; id < front->rx->size && !result; id++)
		result = post(front, (uint16_t)id);
	return result ? result : flush_posts(front);
}

static const struct pv_netif_rx_response *response_at(const struct pv_netfront *front, uint32_t i)
{
	return &front->responses[front->first_response + i];
}

/* Slots of the packet at the front of what was taken: extras after the first, then the rest. 0: it does not end here. */
static uint32_t count_slots(const struct pv_netfront *front, uint32_t *n_extras)
{
	uint32_t n = 1;
	uint16_t flags;

	*n_extras = 0;
	flags = response_at(front, 0)->flags;
	if (flags & PV_NETIF_EXTRA_INFO) {
		struct pv_netif_extra extra;

		do {
			if (n == front->n_responses)
				return 0;
			memcpy(&extra, response_at(front, n++), sizeof(extra));
			++*n_extras;
		} while (extra.flags & PV_NETIF_EXTRA_MORE);
	}
	while (flags & PV_NETIF_MORE_DATA) {
		if (n == front->n_responses)
			return 0;
		flags = response_at(front, n++)->flags;
	}
	return n;
}

static int read_extras(const struct pv_netfront *front, uint32_t n_extras, struct pv_frame *frame)
{
	for (uint32_t i = 1; i <= n_extras; i++) {
		struct pv_netif_extra extra;

		memcpy(&extra, response_at(front, i), sizeof(extra));
		if (!extra.type || extra.type > PV_NETIF_EXTRA_XDP)
			return 0;
		if (extra.type == PV_NETIF_EXTRA_GSO) {
			memcpy(&frame->gso_size, extra.content, sizeof(frame->gso_size));
			frame->gso_type = extra.content[2];
			if (!frame->gso_size || (frame->gso_type != PV_NETIF_GSO_TCPV4 && frame->gso_type != PV_NETIF_GSO_TCPV6))
				return 0;
		} else if (extra.type == PV_NETIF_EXTRA_HASH) {
			memcpy(&frame->hash, extra.content + 2, sizeof(frame->hash));
			frame->hash_type = extra.content[0];
			frame->flags |= PV_FRAME_HASH;
		}
	}
	return 1;
}

/* Bytes of a packet of n slots, 0: it is none. */
static uint32_t measure(struct pv_netfront *front, uint32_t n, uint32_t n_extras)
{
	uint32_t bytes = 0;

	for (uint32_t i = 0; i < n; i++) {
		const struct pv_netif_rx_response *response = response_at(front, i);

		if (i > 0 && i <= n_extras)
			continue;
		if (response->status < 0 || (uint32_t)response->offset + (uint32_t)response->status > PAGE_BYTES)
			return 0;
		bytes += (uint32_t)response->status;
	}
	if (bytes > PV_NETIF_MAX_FRAME)
		front->counters.rx_too_long++;
	return bytes < PV_NETIF_MIN_FRAME || bytes > PV_NETIF_MAX_FRAME ? 0 : bytes;
}

static void copy_out(const struct pv_netfront *front, uint32_t n, uint32_t n_extras, uint8_t *to)
{
	for (uint32_t i = 0; i < n; i++) {
		const struct pv_netif_rx_response *response = response_at(front, i);
		uint16_t id = front->slot_ids[(front->rx_cons + i) & (front->rx->size - 1)];

		if (i > 0 && i <= n_extras)
			continue;
		memcpy(to, front->rx_pages + (uint64_t)id * PAGE_BYTES + response->offset, (size_t)response->status);
		to += response->status;
	}
}

/* The slots of a packet are done with: their pages are offered again. */
static int64_t recycle(struct pv_netfront *front, uint32_t n)
{
	int64_t result = 0;

	for (uint32_t i = 0; i < n && !result; i++)
		result = post(front, front->slot_ids[front->rx_cons++ & (front->rx->size - 1)]);
	front->first_response += n;
	front->n_responses -= n;
	return result;
}

static int are_ids_right(const struct pv_netfront *front, uint32_t n, uint32_t n_extras)
{
	for (uint32_t i = 0; i < n; i++)
		if ((i == 0 || i > n_extras) && response_at(front, i)->id != front->slot_ids[(front->rx_cons + i) & (front->rx->size - 1)])
			return 0;
	return 1;
}

static int64_t take_more(struct pv_netfront *front)
{
	int64_t taken;

	if (front->first_response && front->n_responses)
		memmove(front->responses, &front->responses[front->first_response], front->n_responses * sizeof(front->responses[0]));
	front->first_response = 0;
	taken = pv_ring_take(front->rx, &front->responses[front->n_responses], PV_NETFRONT_TAKE - front->n_responses);
	if (taken > 0)
		front->n_responses += (uint32_t)taken;
	return taken;
}

/* One packet: 1 done, well or not; 0: no room in the burst; -errno. */
static int64_t take_packet(struct pv_netfront *front, struct pv_burst *burst)
{
	uint32_t n_extras, n = count_slots(front, &n_extras), bytes;
	struct pv_frame *frame, seen = { .length = 0 };
	uint16_t flags = response_at(front, 0)->flags;

	if (!n) {
		/* It does not end: what is there of it is all that will come. */
		n = front->n_responses;
		n_extras = n_extras < n ? n_extras : n - 1;
		bytes = 0;
	} else {
		bytes = measure(front, n, n_extras);
	}
	if (!are_ids_right(front, n, n_extras))
		return -EPROTO;
	if (bytes && !read_extras(front, n_extras, &seen))
		bytes = 0;
	if (!bytes) {
		front->counters.rx_errors++;
		return recycle(front, n) ? -EPROTO : 1;
	}
	frame = pv_burst_next(burst, bytes);
	if (!frame)
		return 0;
	seen.offset = frame->offset;
	seen.length = bytes;
	if (flags & PV_NETIF_RX_CSUM_BLANK || seen.gso_type)
		seen.flags |= PV_FRAME_CSUM_BLANK | PV_FRAME_VALIDATED;
	else if (flags & PV_NETIF_RX_DATA_VALIDATED)
		seen.flags |= PV_FRAME_VALIDATED;
	*frame = seen;
	copy_out(front, n, n_extras, burst->memory + frame->offset);
	if (!pv_offload_fits(burst->memory + frame->offset, frame)) {
		front->counters.rx_checksums++;
		front->counters.rx_errors++;
		return recycle(front, n) ? -EPROTO : 1;
	}
	pv_burst_keep(burst, frame);
	front->counters.rx_packets++;
	front->counters.rx_bytes += bytes;
	return recycle(front, n) ? -EPROTO : 1;
}

int64_t pv_netfront_take(struct pv_netfront *front, struct pv_burst *burst, uint32_t max)
{
	uint32_t before = burst->n, n_extras;
	int64_t result = 1;

	while (result > 0 && burst->n - before < max) {
		if (!front->n_responses || (front->n_responses < PV_NETFRONT_TAKE && !count_slots(front, &n_extras))) {
			result = take_more(front);
			if (result < 0)
				return result;
		}
		if (!front->n_responses)
			break;
		result = take_packet(front, burst);
	}
	if (result < 0)
		return result;
	result = flush_posts(front);
	return result ? result : (int64_t)(burst->n - before);
}
