/* SPDX-License-Identifier: MIT */
/* Frames to the guest: brought into a form that it takes, copied into its buffers, or kept until it has some. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "netback_private.h"
#include "pv_offload.h"

#define PAGE_BYTES 4096u

/* ---- buffers and responses ---- */

/* How many buffers can be had now, up to `wanted`: taken from the ring as far as needed. Or as pv_ring_take. */
static int64_t have_buffers(struct pv_netback *netback, uint32_t wanted)
{
	int64_t taken;

	if (netback->n_buffers >= wanted)
		return netback->n_buffers;
	if (netback->first_buffer && netback->n_buffers)
		memmove(netback->buffers, &netback->buffers[netback->first_buffer], netback->n_buffers * sizeof(netback->buffers[0]));
	netback->first_buffer = 0;
	taken = pv_ring_take(netback->rx, &netback->buffers[netback->n_buffers], PV_NETBACK_TAKE - netback->n_buffers);
	if (taken < 0)
		return taken;
	netback->n_buffers += (uint32_t)taken;
	return netback->n_buffers;
}

/* Copy what is to be copied, tell of what failed, publish. */
static int64_t flush(struct pv_netback *netback)
{
	int64_t result;

	if (!netback->n_responses)
		return 0;
	/* The ranges are our own. */
	pv_grant_copy(netback->mapper, netback->ops, netback->n_ops, netback->local, UINT64_MAX, 1);
	for (uint32_t i = 0; i < netback->n_ops; i++)
		if (netback->ops[i].status) {
			netback->responses[netback->op_response[i]].status = PV_NETIF_ERROR;
			netback->counters.rx_copy_errors++;
		}
	netback->n_ops = 0;
	result = pv_ring_push(netback->rx, netback->responses, netback->n_responses);
	netback->n_responses = 0;
	if (result < 0)
		return result;
	if (result >> 32 & PV_RING_STALE)
		netback->stale = 1;
	return 0;
}

static struct pv_netif_rx_response *next_response(struct pv_netback *netback, uint32_t *gref)
{
	const struct pv_netif_rx_request *buffer = &netback->buffers[netback->first_buffer++];
	struct pv_netif_rx_response *response = &netback->responses[netback->n_responses++];

	netback->n_buffers--;
	*gref = buffer->gref;
	*response = (struct pv_netif_rx_response){ .id = buffer->id };
	return response;
}

static void put_extra(struct pv_netback *netback, const struct pv_netif_extra *extra)
{
	uint32_t gref;

	memcpy(next_response(netback, &gref), extra, sizeof(*extra));
}

static uint32_t extras_of(const struct pv_netback *netback, const struct pv_frame *frame)
{
	return (uint32_t)(frame->gso_type != 0) + ((frame->flags & PV_FRAME_HASH) != 0) + (netback->headroom != 0);
}

static void put_extras(struct pv_netback *netback, const struct pv_frame *frame)
{
	struct pv_netif_extra extra = { .type = PV_NETIF_EXTRA_GSO };
	int has_hash = (frame->flags & PV_FRAME_HASH) != 0, has_headroom = netback->headroom != 0;

	if (frame->gso_type) {
		memcpy(extra.content, &frame->gso_size, sizeof(frame->gso_size));
		extra.content[2] = frame->gso_type;
		extra.flags = has_hash || has_headroom ? PV_NETIF_EXTRA_MORE : 0;
		put_extra(netback, &extra);
	}
	if (has_hash) {
		extra = (struct pv_netif_extra){ .type = PV_NETIF_EXTRA_HASH, .content = { frame->hash_type, 1 } };
		extra.flags = has_headroom ? PV_NETIF_EXTRA_MORE : 0;
		memcpy(extra.content + 2, &frame->hash, sizeof(frame->hash));
		put_extra(netback, &extra);
	}
	if (has_headroom) {
		uint16_t headroom = (uint16_t)netback->headroom;

		extra = (struct pv_netif_extra){ .type = PV_NETIF_EXTRA_XDP };
		memcpy(extra.content, &headroom, sizeof(headroom));
		put_extra(netback, &extra);
	}
}

static uint16_t rx_flags(const struct pv_frame *frame)
{
	if (frame->flags & PV_FRAME_CSUM_BLANK)
		return PV_NETIF_RX_CSUM_BLANK | PV_NETIF_RX_DATA_VALIDATED;
	return frame->flags & PV_FRAME_VALIDATED ? PV_NETIF_RX_DATA_VALIDATED : 0;
}

/* There are buffers enough. */
static int64_t put(struct pv_netback *netback, uint8_t *bytes, const struct pv_frame *frame, uint32_t n_slots)
{
	uint32_t extras = extras_of(netback, frame);
	uint32_t room = PAGE_BYTES - netback->headroom;
	uint64_t base;
	int64_t result;

	if (netback->n_ops + n_slots > PV_NETBACK_OPS || netback->n_responses + n_slots > PV_NETBACK_TAKE) {
		result = flush(netback);
		if (result)
			return result;
	}
	base = (uint64_t)(bytes - netback->local);
	for (uint32_t done = 0; done < frame->length;) {
		uint32_t n = frame->length - done < room ? frame->length - done : room, gref;
		struct pv_netif_rx_response *response = next_response(netback, &gref);

		netback->ops[netback->n_ops] = (struct pv_grant_copy_op){
			.gref = gref, .offset = (uint16_t)netback->headroom, .length = (uint16_t)n, .local_offset = base + done };
		netback->op_response[netback->n_ops++] = (uint16_t)(netback->n_responses - 1);
		response->offset = (uint16_t)netback->headroom;
		response->status = (int16_t)n;
		if (done + n < frame->length)
			response->flags |= PV_NETIF_MORE_DATA;
		if (!done) {
			response->flags |= rx_flags(frame);
			if (extras) {
				response->flags |= PV_NETIF_EXTRA_INFO;
				put_extras(netback, frame);
			}
		}
		done += n;
	}
	netback->counters.rx_packets++;
	netback->counters.rx_bytes += frame->length;
	return 0;
}

/* ---- waiting ---- */

static void wait_for_buffers(struct pv_netback *netback, const uint8_t *bytes, const struct pv_frame *frame, int64_t now_ns)
{
	if (netback->stalled) {
		netback->counters.rx_stalled++;
		return;
	}
	if (!netback_wait(netback, bytes, frame, now_ns)) {
		netback->counters.rx_full++;
		return;
	}
	netback->counters.rx_waited++;
	if (!netback->no_buffers_ns)
		netback->no_buffers_ns = now_ns;
}

void pv_netback_destroy(struct pv_netback *netback)
{
	pv_netback_forget(netback);
	free(netback->scratch);
	netback->scratch = NULL;
}

/* ---- one frame ---- */

static uint32_t slots_of(const struct pv_netback *netback, const struct pv_frame *frame)
{
	uint32_t room = PAGE_BYTES - netback->headroom;

	return (frame->length + room - 1) / room + extras_of(netback, frame);
}

/* A frame in a form that the guest takes. */
static int64_t put_or_wait(struct pv_netback *netback, uint8_t *bytes, const struct pv_frame *frame, int64_t now_ns)
{
	uint32_t n_slots = slots_of(netback, frame);
	int64_t buffers;

	if (frame->length > PAGE_BYTES - netback->headroom && !(netback->features & PV_NETBACK_SG)) {
		netback->counters.rx_too_large++;
		return 0;
	}
	if (!netback->waiting_frames) {
		buffers = have_buffers(netback, n_slots);
		if (buffers < 0)
			return buffers;
		if (buffers >= n_slots) {
			netback->no_buffers_ns = 0;
			netback->stalled = 0;
			return put(netback, bytes, frame, n_slots);
		}
	}
	if (!netback->waiting_frames)
		netback->wanted = n_slots;
	wait_for_buffers(netback, bytes, frame, now_ns);
	return 0;
}

static int wants_blank(const struct pv_netback *netback, const struct pv_l4 *l4)
{
	return l4->is_v6 ? netback->features & PV_NETBACK_CSUM6 : !(netback->features & PV_NETBACK_NO_CSUM);
}

static int wants_gso(const struct pv_netback *netback, const struct pv_frame *frame)
{
	return netback->features & PV_NETBACK_SG &&
	       netback->features & (frame->gso_type == PV_NETIF_GSO_TCPV4 ? PV_NETBACK_GSO4 : PV_NETBACK_GSO6);
}

static int64_t cut(struct pv_netback *netback, const uint8_t *bytes, const struct pv_frame *frame, const struct pv_l4 *l4, int64_t now_ns)
{
	uint32_t n = pv_offload_segments(l4, frame->gso_size);
	uint8_t *memory = netback->local;
	int64_t result = flush(netback);

	if (!netback->scratch)
		netback->scratch = malloc(PV_NETIF_MAX_FRAME + 1);
	if (!netback->scratch || !n || n > PV_NETBACK_MAX_SEGMENTS) {
		netback->counters.rx_too_large++;
		return result;
	}
	netback->counters.rx_segmented++;
	netback->local = netback->scratch;
	for (uint32_t i = 0; i < n && !result; i++) {
		struct pv_frame segment = { .flags = PV_FRAME_VALIDATED, .queue = frame->queue };

		segment.length = pv_offload_segment(bytes, l4, frame->gso_size, i, netback->scratch);
		result = put_or_wait(netback, netback->scratch, &segment, now_ns);
		/* The next one is written over it. */
		if (!result)
			result = flush(netback);
	}
	netback->local = memory;
	return result;
}

static int64_t send_one(struct pv_netback *netback, uint8_t *bytes, struct pv_frame *frame, int64_t now_ns)
{
	struct pv_l4 l4;

	if (frame->gso_type || frame->flags & PV_FRAME_CSUM_BLANK) {
		if (!pv_offload_look(bytes, frame->length, &l4)) {
			netback->counters.rx_too_large++;
			return 0;
		}
		if (frame->gso_type)
			frame->flags |= PV_FRAME_CSUM_BLANK | PV_FRAME_VALIDATED;
		if (frame->gso_type && !wants_gso(netback, frame))
			return cut(netback, bytes, frame, &l4, now_ns);
		if (!frame->gso_type && !wants_blank(netback, &l4)) {
			pv_offload_finish(bytes, &l4);
			frame->flags = (uint16_t)((frame->flags & ~PV_FRAME_CSUM_BLANK) | PV_FRAME_VALIDATED);
			netback->counters.rx_checksums++;
		} else {
			/* Another guest may have got the same frame before, with the checksum filled in. */
			pv_offload_prepare(bytes, &l4);
		}
	}
	return put_or_wait(netback, bytes, frame, now_ns);
}

static int is_filtered(const struct pv_netback *netback, const uint8_t *bytes)
{
	static const uint8_t broadcast[6] = { 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF };

	if (!(netback->features & PV_NETBACK_MCAST_CONTROL) || !(bytes[0] & 1) || !memcmp(bytes, broadcast, 6))
		return 0;
	for (uint32_t i = 0; i < netback->groups->n; i++)
		if (!memcmp(bytes, netback->groups->addresses[i], 6))
			return 0;
	return 1;
}

int64_t pv_netback_send(struct pv_netback *netback, uint8_t *memory, struct pv_frame *frames, uint32_t n, int64_t now_ns)
{
	int64_t result = 0, flushed;

	netback->local = memory;
	for (uint32_t i = 0; i < n && !result; i++) {
		uint8_t *bytes = memory + frames[i].offset;

		if (frames[i].length < PV_NETIF_MIN_FRAME || frames[i].length > PV_NETIF_MAX_FRAME)
			netback->counters.rx_too_large++;
		else if (is_filtered(netback, bytes))
			netback->counters.rx_filtered++;
		else
			result = send_one(netback, bytes, &frames[i], now_ns);
	}
	flushed = flush(netback);
	return result ? result : flushed;
}

/* Whether the oldest frame waits no longer: delivered, or dropped. Or as pv_netback_deliver. */
static int64_t deliver_oldest(struct pv_netback *netback, int64_t now_ns)
{
	struct pv_waiting_block *block = netback->oldest;
	struct waiting *oldest = netback_oldest(netback);
	uint32_t n_slots = slots_of(netback, &oldest->frame);
	int64_t buffers = have_buffers(netback, n_slots), result = 0;

	if (buffers < 0)
		return buffers;
	if (buffers >= n_slots) {
		netback->no_buffers_ns = 0;
		if (netback->local != block->bytes)
			result = flush(netback);
		netback->local = block->bytes;
		if (!result)
			result = put(netback, block->bytes + oldest->frame.offset, &oldest->frame, n_slots);
	} else if (now_ns - oldest->since_ns >= netback->drain_ns) {
		netback->counters.rx_expired++;
	} else {
		netback->wanted = n_slots;
		return 0;
	}
	/* The bytes of all of a block go with its last one. */
	if (!result && block->n == 1)
		result = flush(netback);
	netback_drop_oldest(netback);
	return result ? result : 1;
}

int64_t pv_netback_deliver(struct pv_netback *netback, int64_t now_ns)
{
	int64_t result = 1, flushed;

	while (netback->waiting_frames && result > 0)
		result = deliver_oldest(netback, now_ns);
	flushed = flush(netback);
	if (result < 0 || flushed)
		return result < 0 ? result : flushed;
	if (netback->stall_ns && !netback->stalled && netback->no_buffers_ns &&
	    now_ns - netback->no_buffers_ns >= netback->stall_ns) {
		netback->stalled = 1;
		netback->counters.stalls++;
	}
	/* A few that are not enough do not end it: whoever offers one buffer and no more takes nothing either. */
	if ((netback->stalled || netback->no_buffers_ns) && have_buffers(netback, netback->wanted) >= netback->wanted) {
		netback->stalled = 0;
		netback->no_buffers_ns = 0;
	}
	return 0;
}

int64_t pv_netback_due(const struct pv_netback *netback)
{
	int64_t due = netback->resume_ns;

	if (netback->waiting_frames) {
		int64_t drain = netback_oldest(netback)->since_ns + netback->drain_ns;

		due = due && due < drain ? due : drain;
	}
	if (netback->stall_ns && !netback->stalled && netback->no_buffers_ns) {
		int64_t stall = netback->no_buffers_ns + netback->stall_ns;

		due = due && due < stall ? due : stall;
	}
	return due;
}
