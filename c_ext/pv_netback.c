/* SPDX-License-Identifier: MIT */
/* Packets of the guest: taken, copied, answered. What goes to it is in pv_netback_rx.c. */
#include <errno.h>
#include <string.h>

#include "pv_netback.h"
#include "pv_offload.h"

#define NS_PER_US 1000

void pv_netback_init(struct pv_netback *netback, struct pv_ring *tx, struct pv_ring *rx, struct pv_mapper *mapper, uint32_t features)
{
	memset(netback, 0, sizeof(*netback));
	netback->tx = tx;
	netback->rx = rx;
	netback->mapper = mapper;
	netback->features = features;
	netback->groups = &netback->own_groups;
}

void pv_netback_set_rate(struct pv_netback *netback, uint64_t bytes, uint64_t window_us)
{
	netback->credit_bytes = window_us ? bytes : 0;
	netback->credit_window_ns = (int64_t)window_us * NS_PER_US;
	netback->credit_left = bytes;
	netback->credit_next_ns = 0;
	netback->resume_ns = 0;
}

/* ---- credit ---- */

/* Whether n bytes are too many now; then nothing is taken before the next window. */
static int is_over_credit(struct pv_netback *netback, uint32_t n_bytes, int64_t now_ns)
{
	uint64_t burst = netback->credit_bytes > PV_NETBACK_MIN_BURST ? netback->credit_bytes : PV_NETBACK_MIN_BURST;

	if (!netback->credit_bytes)
		return 0;
	if (!netback->credit_next_ns) {
		/* The first window, for which there is credit already. */
		netback->credit_next_ns = now_ns + netback->credit_window_ns;
	} else if (now_ns >= netback->credit_next_ns) {
		uint64_t room = burst - (netback->credit_left < burst ? netback->credit_left : burst);

		netback->credit_left += netback->credit_bytes < room ? netback->credit_bytes : room;
		netback->credit_next_ns = now_ns + netback->credit_window_ns;
	}
	if (n_bytes > netback->credit_left) {
		netback->resume_ns = netback->credit_next_ns;
		netback->counters.tx_delayed++;
		return 1;
	}
	netback->credit_left -= n_bytes;
	return 0;
}

/* ---- multicast lists ---- */

static uint32_t find_group(const struct pv_netback_groups *groups, const uint8_t address[6])
{
	uint32_t i = 0;

	while (i < groups->n && memcmp(groups->addresses[i], address, 6))
		i++;
	return i;
}

static int change_groups(struct pv_netback *netback, const struct pv_netif_packet *packet)
{
	struct pv_netback_groups *groups = netback->groups;
	uint32_t at = find_group(groups, packet->mcast_address);

	if (!(packet->mcast_address[0] & 1))
		return PV_NETIF_ERROR;
	if (packet->mcast == PV_NETIF_EXTRA_MCAST_DEL) {
		if (at < groups->n)
			memmove(groups->addresses[at], groups->addresses[--groups->n], 6);
		netback->counters.mcast_changes++;
		return PV_NETIF_OKAY;
	}
	if (at == PV_NETBACK_MCAST)
		return PV_NETIF_ERROR;
	if (at == groups->n)
		memcpy(groups->addresses[groups->n++], packet->mcast_address, 6);
	netback->counters.mcast_changes++;
	return PV_NETIF_OKAY;
}

void pv_netback_share_groups(struct pv_netback *netback, struct pv_netback *with)
{
	netback->groups = with->groups;
}

void pv_netback_filter(struct pv_netback *netback, int on)
{
	netback->features &= ~(uint32_t)PV_NETBACK_MCAST_CONTROL;
	netback->features |= on ? PV_NETBACK_MCAST_CONTROL : 0;
}

/* ---- a batch ---- */

/* A packet of the batch whose pages are to be copied. */
struct under_way {
	uint32_t first_request;
	uint32_t n_requests;
	uint32_t n_extras;
	uint32_t first_op;
	uint32_t n_ops;
};

struct batch {
	struct under_way packets[PV_NETBACK_PACKETS];
	struct pv_grant_copy_op ops[PV_NETBACK_TAKE];
	uint32_t n_packets;
	uint32_t n_ops;
};

/* Answered are requests [from, from + n) of those that were taken. */
static void answer(struct pv_netback *netback, uint32_t from, uint32_t n, uint32_t n_extras, int status)
{
	pv_netif_answer(&netback->requests[from], n, n_extras, status, &netback->answers[netback->n_answers]);
	netback->n_answers += n;
}

static void add(struct pv_netback *netback, struct batch *batch, struct pv_burst *burst, struct pv_frame *frame,
		const struct pv_netif_packet *packet)
{
	struct under_way *under_way = &batch->packets[batch->n_packets++];
	uint64_t at = frame->offset;

	*under_way = (struct under_way){
		.first_request = netback->first_request,
		.n_requests = packet->n_requests,
		.n_extras = packet->n_extras,
		.first_op = batch->n_ops,
	};
	for (uint32_t i = 0; i < packet->n_data; i++) {
		const struct pv_netif_tx_request *data = &packet->data[i];

		if (!data->size)
			continue;
		batch->ops[batch->n_ops++] = (struct pv_grant_copy_op){
			.gref = data->gref, .offset = data->offset, .length = data->size, .local_offset = at };
		at += data->size;
	}
	under_way->n_ops = batch->n_ops - under_way->first_op;
	if (packet->flags & PV_NETIF_CSUM_BLANK)
		frame->flags = PV_FRAME_CSUM_BLANK | PV_FRAME_VALIDATED;
	else if (packet->flags & PV_NETIF_DATA_VALIDATED)
		frame->flags = PV_FRAME_VALIDATED;
	frame->gso_size = packet->gso_size;
	frame->gso_type = packet->gso_type;
	if (packet->has_hash) {
		frame->flags |= PV_FRAME_HASH;
		frame->hash_type = packet->hash_type;
		frame->hash = packet->hash;
	}
	pv_burst_keep(burst, frame);
}

/* More requests behind those that are left. As pv_ring_take. */
static int64_t take_more(struct pv_netback *netback)
{
	int64_t taken;

	if (netback->first_request && netback->n_requests)
		memmove(netback->requests, &netback->requests[netback->first_request], netback->n_requests * sizeof(netback->requests[0]));
	netback->first_request = 0;
	taken = pv_ring_take(netback->tx, &netback->requests[netback->n_requests], PV_NETBACK_TAKE - netback->n_requests);
	if (taken > 0)
		netback->n_requests += (uint32_t)taken;
	return taken;
}

static int64_t give_up(struct pv_netback *netback, int reason)
{
	netback->fatal = (uint32_t)reason;
	return -EPROTO;
}

/* One chain: 1 done; 0 not now (no room, no credit); -EAGAIN: more requests are needed; -EPROTO. */
static int64_t take_packet(struct pv_netback *netback, struct batch *batch, struct pv_burst *burst, int64_t now_ns)
{
	struct pv_netif_packet packet;
	int n = pv_netif_parse(&netback->requests[netback->first_request], netback->n_requests, &packet);
	struct pv_frame *frame = NULL;

	if (n <= 0)
		return n ? give_up(netback, -n) : -EAGAIN;
	if (packet.mcast) {
		answer(netback, netback->first_request, packet.n_requests, packet.n_extras, change_groups(netback, &packet));
	} else if (packet.status) {
		netback->counters.tx_errors++;
		answer(netback, netback->first_request, packet.n_requests, packet.n_extras, PV_NETIF_ERROR);
	} else {
		frame = pv_burst_next(burst, packet.bytes);
		if (!frame || is_over_credit(netback, packet.bytes, now_ns))
			return 0;
		add(netback, batch, burst, frame, &packet);
	}
	netback->first_request += packet.n_requests;
	netback->n_requests -= packet.n_requests;
	return 1;
}

/* After the copies: what came of each packet. Frames that are none move out of the burst. */
static uint32_t settle(struct pv_netback *netback, const struct batch *batch, struct pv_burst *burst, uint32_t first)
{
	uint32_t kept = first;

	for (uint32_t i = 0; i < batch->n_packets; i++) {
		const struct under_way *packet = &batch->packets[i];
		struct pv_frame *frame = &burst->frames[first + i];
		int status = PV_NETIF_OKAY;

		for (uint32_t op = 0; op < packet->n_ops; op++)
			if (batch->ops[packet->first_op + op].status)
				status = PV_NETIF_ERROR;
		answer(netback, packet->first_request, packet->n_requests, packet->n_extras, status);
		if (status) {
			netback->counters.tx_copy_errors++;
			continue;
		}
		if (frame->gso_type)
			frame->flags |= PV_FRAME_CSUM_BLANK | PV_FRAME_VALIDATED;
		if (!pv_offload_fits(burst->memory + frame->offset, frame)) {
			netback->counters.tx_checksums++;
			continue;
		}
		netback->counters.tx_packets++;
		netback->counters.tx_bytes += frame->length;
		burst->frames[kept++] = *frame;
	}
	burst->n = kept;
	return kept - first;
}

static int64_t push_answers(struct pv_netback *netback)
{
	int64_t result = 0;

	if (netback->n_answers)
		result = pv_ring_push(netback->tx, netback->answers, netback->n_answers);
	netback->n_answers = 0;
	if (result < 0)
		return result;
	if (result >> 32 & PV_RING_STALE)
		netback->stale = 1;
	return 0;
}

int64_t pv_netback_take(struct pv_netback *netback, struct pv_burst *burst, uint32_t max, int64_t now_ns)
{
	struct batch batch;
	uint32_t first = burst->n, added;
	int64_t result = 0, pushed;

	batch.n_packets = batch.n_ops = 0;
	if (netback->fatal)
		return -EPROTO;
	if (netback->resume_ns) {
		if (now_ns < netback->resume_ns)
			return 0;
		netback->resume_ns = 0;
	}
	if (max > PV_NETBACK_PACKETS)
		max = PV_NETBACK_PACKETS;
	/* What was left of the last time first; more only before any packet of this batch refers to its requests. */
	if (netback->n_requests < PV_NETBACK_TAKE / 2) {
		result = take_more(netback);
		if (result < 0)
			return result;
	}
	while (netback->n_requests && batch.n_packets < max) {
		result = take_packet(netback, &batch, burst, now_ns);
		if (result <= 0)
			break;
	}
	if (batch.n_ops)
		pv_grant_copy(netback->mapper, batch.ops, batch.n_ops, burst->memory, burst->capacity, 0);
	added = settle(netback, &batch, burst, first);
	pushed = push_answers(netback);
	if (pushed < 0)
		return pushed;
	if (result == -EAGAIN && !batch.n_packets) {
		/* Its beginning is here and its end is not: frontends publish whole packets. */
		uint32_t before = netback->n_requests;

		result = take_more(netback);
		if (result < 0)
			return result;
		if (netback->n_requests == before)
			return give_up(netback, pv_netif_missing(&netback->requests[netback->first_request], before));
	}
	return result == -EPROTO ? result : (int64_t)added;
}
