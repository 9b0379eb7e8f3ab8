/* SPDX-License-Identifier: MIT */
/* Frames of the guest to its backend, and packets of the backend to the guest. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "pv_netfront.h"
#include "pv_offload.h"

#define PAGE_BYTES 4096u
#define COLOUR_BYTES 64u             /* frames begin at different places of their pages, so that caches hold many */

int pv_netfront_init(struct pv_netfront *front, struct pv_ring *tx, struct pv_ring *rx, uint8_t *tx_pages, uint32_t tx_gref,
		     uint8_t *rx_pages, uint32_t rx_gref)
{
	memset(front, 0, sizeof(*front));
	front->tx = tx;
	front->rx = rx;
	front->tx_pages = tx_pages;
	front->rx_pages = rx_pages;
	front->tx_gref = tx_gref;
	front->rx_gref = rx_gref;
	front->rx_cons = rx->cons;
	front->rx_prod = rx->prod;
	front->free_ids = calloc(tx->size, sizeof(*front->free_ids));
	front->in_flight = calloc(tx->size, sizeof(*front->in_flight));
	front->slot_ids = calloc(rx->size, sizeof(*front->slot_ids));
	if (!front->free_ids || !front->in_flight || !front->slot_ids) {
		pv_netfront_destroy(front);
		return -ENOMEM;
	}
	while (front->n_free < tx->size) {
		front->free_ids[front->n_free] = (uint16_t)(tx->size - 1 - front->n_free);
		front->n_free++;
	}
	return 0;
}

void pv_netfront_destroy(struct pv_netfront *front)
{
	free(front->free_ids);
	free(front->in_flight);
	free(front->slot_ids);
	free(front->scratch);
	front->free_ids = front->slot_ids = NULL;
	front->in_flight = front->scratch = NULL;
}

static int64_t settle_push(struct pv_netfront *front, int64_t result)
{
	if (result < 0)
		return result;
	if (result >> 32 & PV_RING_STALE)
		front->untold = 1;
	return 0;
}

/* ---- sending ---- */

static int64_t free_response(struct pv_netfront *front, const struct pv_netif_tx_response *response)
{
	if (response->status == PV_NETIF_NULL) {
		if (!front->extras_out)
			return -EPROTO;
		front->extras_out--;
		return 0;
	}
	if (response->id >= front->tx->size || !front->in_flight[response->id])
		return -EPROTO;
	front->in_flight[response->id] = 0;
	front->free_ids[front->n_free++] = response->id;
	front->counters.tx_errors += response->status != PV_NETIF_OKAY;
	return 0;
}

int64_t pv_netfront_reap(struct pv_netfront *front)
{
	struct pv_netif_tx_response responses[PV_NETFRONT_TAKE];
	int64_t n, result = 0;

	if (front->tx_broken)
		return -EPROTO;
	do {
		n = pv_ring_take(front->tx, responses, PV_NETFRONT_TAKE);
		for (int64_t i = 0; i < n && !result; i++)
			result = free_response(front, &responses[i]);
	} while (n == PV_NETFRONT_TAKE && !result);
	/* What it has of our pages cannot be known any more. */
	if (result)
		front->tx_broken = 1;
	return n < 0 ? n : result;
}

struct requests {
	uint32_t n;
	struct pv_netif_tx_request list[PV_NETFRONT_TAKE];
};

static int64_t flush(struct pv_netfront *front, struct requests *requests)
{
	int64_t result;

	if (!requests->n)
		return 0;
	result = pv_ring_push(front->tx, requests->list, requests->n);
	requests->n = 0;
	return settle_push(front, result);
}

static struct pv_netif_tx_request *add(struct requests *requests)
{
	struct pv_netif_tx_request *request = &requests->list[requests->n++];

	memset(request, 0, sizeof(*request));
	return request;
}

static uint16_t tx_flags(const struct pv_frame *frame)
{
	if (frame->flags & PV_FRAME_CSUM_BLANK)
		return PV_NETIF_CSUM_BLANK | PV_NETIF_DATA_VALIDATED;
	return frame->flags & PV_FRAME_VALIDATED ? PV_NETIF_DATA_VALIDATED : 0;
}

static uint32_t slots_of(const struct pv_frame *frame)
{
	return (frame->length + PAGE_BYTES - 1) / PAGE_BYTES + (frame->gso_type != 0);
}

static int has_room(const struct pv_netfront *front, const struct requests *requests, uint32_t n_slots)
{
	return front->n_free >= n_slots && pv_ring_room(front->tx) - requests->n >= n_slots;
}

/* There is room. */
static void put(struct pv_netfront *front, const uint8_t *bytes, const struct pv_frame *frame, struct requests *requests)
{
	for (uint32_t done = 0; done < frame->length || !done;) {
		uint32_t n = frame->length - done < PAGE_BYTES ? frame->length - done : PAGE_BYTES;
		uint16_t id = front->free_ids[--front->n_free];
		uint32_t colour = done ? 0 : id % ((PAGE_BYTES - n) / COLOUR_BYTES + 1) * COLOUR_BYTES;
		struct pv_netif_tx_request *request = add(requests);

		front->in_flight[id] = 1;
		memcpy(front->tx_pages + (uint64_t)id * PAGE_BYTES + colour, bytes + done, n);
		request->gref = front->tx_gref + id;
		request->offset = (uint16_t)colour;
		request->id = id;
		request->size = (uint16_t)(done ? n : frame->length);
		if (done + n < frame->length)
			request->flags |= PV_NETIF_MORE_DATA;
		if (!done) {
			request->flags |= tx_flags(frame);
			if (frame->gso_type) {
				struct pv_netif_extra extra = { .type = PV_NETIF_EXTRA_GSO };

				request->flags |= PV_NETIF_EXTRA_INFO;
				memcpy(extra.content, &frame->gso_size, sizeof(frame->gso_size));
				extra.content[2] = frame->gso_type;
				memcpy(add(requests), &extra, sizeof(extra));
				front->extras_out++;
			}
		}
		done += n;
	}
	front->counters.tx_packets++;
	front->counters.tx_bytes += frame->length;
}

/* Room for n_slots, by taking responses if that helps: 1 or 0, or -errno. */
static int64_t make_room(struct pv_netfront *front, struct requests *requests, uint32_t n_slots)
{
	int64_t result;

	if (requests->n + n_slots > PV_NETFRONT_TAKE) {
		result = flush(front, requests);
		if (result)
			return result;
	}
	if (has_room(front, requests, n_slots))
		return 1;
	result = pv_netfront_reap(front);
	return result ? result : has_room(front, requests, n_slots);
}

static int takes_gso(const struct pv_netfront *front, const struct pv_frame *frame)
{
	uint32_t wanted = PV_NETFRONT_SG | (frame->gso_type == PV_NETIF_GSO_TCPV4 ? PV_NETFRONT_GSO4 : PV_NETFRONT_GSO6);

	return (front->features & wanted) == wanted;
}

/* All segments, or 0: there is no room for all of them. */
static int64_t cut(struct pv_netfront *front, const uint8_t *bytes, const struct pv_frame *frame, const struct pv_l4 *l4,
		   struct requests *requests)
{
	uint32_t n = pv_offload_segments(l4, frame->gso_size), payload = l4->end - l4->payload;
	uint32_t largest = l4->payload + (payload < frame->gso_size ? payload : frame->gso_size);
	uint32_t n_slots = (largest + PAGE_BYTES - 1) / PAGE_BYTES;
	int64_t result;

	if (!front->scratch)
		front->scratch = malloc(PV_NETIF_MAX_FRAME + 1);
	if (!front->scratch || n * n_slots > front->tx->size || (n_slots > 1 && !(front->features & PV_NETFRONT_SG)))
		return -EINVAL;
	result = make_room(front, requests, n * n_slots);
	if (result <= 0)
		return result;
	front->counters.tx_segmented++;
	for (uint32_t i = 0; i < n; i++) {
		struct pv_frame segment = { .flags = PV_FRAME_VALIDATED };

		segment.length = pv_offload_segment(bytes, l4, frame->gso_size, i, front->scratch);
		if (requests->n + n_slots > PV_NETFRONT_TAKE) {
			result = flush(front, requests);
			if (result)
				return result;
		}
		put(front, front->scratch, &segment, requests);
	}
	return 1;
}

/* 1: sent; 0: no room; -EINVAL: it cannot be sent; -errno. */
static int64_t send_one(struct pv_netfront *front, uint8_t *bytes, struct pv_frame *frame, struct requests *requests)
{
	struct pv_l4 l4;
	int64_t result;

	if (frame->length < PV_NETIF_MIN_FRAME || frame->length > PV_NETIF_MAX_FRAME)
		return -EINVAL;
	if (frame->gso_type || frame->flags & PV_FRAME_CSUM_BLANK) {
		if (frame->gso_type > PV_NETIF_GSO_TCPV6 || !pv_offload_look(bytes, frame->length, &l4))
			return -EINVAL;
		if (frame->gso_type && (!frame->gso_size || l4.protocol != 6 || l4.is_v6 != (frame->gso_type == PV_NETIF_GSO_TCPV6)))
			return -EINVAL;
		if (frame->gso_type)
			frame->flags |= PV_FRAME_CSUM_BLANK | PV_FRAME_VALIDATED;
		if (frame->gso_type && !takes_gso(front, frame))
			return cut(front, bytes, frame, &l4, requests);
		if (!frame->gso_type && l4.is_v6 && !(front->features & PV_NETFRONT_CSUM6)) {
			pv_offload_finish(bytes, &l4);
			frame->flags = (uint16_t)((frame->flags & ~PV_FRAME_CSUM_BLANK) | PV_FRAME_VALIDATED);
			front->counters.tx_checksums++;
		} else {
			pv_offload_prepare(bytes, &l4);
		}
	}
	if (frame->length > PAGE_BYTES && !(front->features & PV_NETFRONT_SG))
		return -EINVAL;
	result = make_room(front, requests, slots_of(frame));
	if (result <= 0)
		return result;
	put(front, bytes, frame, requests);
	return 1;
}

int64_t pv_netfront_send(struct pv_netfront *front, uint8_t *memory, struct pv_frame *frames, uint32_t n)
{
	struct requests requests;
	int64_t result = 0;
	uint32_t sent = 0;

	requests.n = 0;
	if (front->tx_broken)
		return -EPROTO;
	for (; sent < n; sent++) {
		frames[sent].status = 0;
		result = send_one(front, memory + frames[sent].offset, &frames[sent], &requests);
		if (result == -EINVAL) {
			frames[sent].status = -EINVAL;
			front->counters.tx_refused++;
		} else if (result <= 0) {
			break;
		}
	}
	if (result < 0 && result != -EINVAL)
		return result;
	result = flush(front, &requests);
	return result ? result : (int64_t)sent;
}

/* ---- receiving ---- */

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
