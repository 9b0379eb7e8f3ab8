/* SPDX-License-Identifier: MIT */
/* Frames of the guest to its backend. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "netfront_private.h"
#include "pv_offload.h"

#define A_FRAME 1
#define A_WISH 2
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
	if (front->in_flight[response->id] == A_WISH) {
		front->wishes_out--;
		front->wishes_refused += response->status != PV_NETIF_OKAY;
	} else {
		front->counters.tx_errors += response->status != PV_NETIF_OKAY;
	}
	front->in_flight[response->id] = 0;
	front->free_ids[front->n_free++] = response->id;
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

		front->in_flight[id] = A_FRAME;
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

int64_t pv_netfront_wish(struct pv_netfront *front, uint8_t type, const uint8_t address[6])
{
	struct pv_netif_extra extra = { .type = type };
	struct pv_netif_tx_request *request;
	struct requests requests;
	int64_t result;
	uint16_t id;

	requests.n = 0;
	if (front->tx_broken)
		return -EPROTO;
	result = make_room(front, &requests, 2);
	if (result <= 0)
		return result;
	id = front->free_ids[--front->n_free];
	front->in_flight[id] = A_WISH;
	request = add(&requests);
	request->gref = front->tx_gref + id;
	request->id = id;
	request->flags = PV_NETIF_EXTRA_INFO;
	memcpy(extra.content, address, sizeof(extra.content));
	memcpy(add(&requests), &extra, sizeof(extra));
	front->extras_out++;
	front->wishes_out++;
	result = flush(front, &requests);
	return result ? result : 1;
}
