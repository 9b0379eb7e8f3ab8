/* SPDX-License-Identifier: MIT */
/* What frames come from and go to: one place for what differs between the kinds of legs. */
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "netloop_private.h"
#include "pv_atomic.h"
#include "pv_offload.h"

/* What the kernel puts before each frame of a TAP interface (linux/virtio_net.h). */
struct vnet_header {
	uint8_t flags;
	uint8_t gso_type;
	uint16_t header_bytes;
	uint16_t gso_size;
	uint16_t csum_start;
	uint16_t csum_offset;
};

#define VNET_NEEDS_CSUM 1
#define VNET_DATA_VALID 2
#define VNET_GSO_TCPV4 1
#define VNET_GSO_TCPV6 4
#define VNET_GSO_ECN 0x80

#define LARGEST_SLOTS 20u

void netleg_fail(struct pv_netleg *leg, int64_t error)
{
	leg->state = error == -EPROTO ? PV_NETLEG_PEER : PV_NETLEG_FAILED;
	leg->error = (int32_t)-error;
}

/* ---- TAP ---- */

/* What a header says of a frame. What the kernel says is believed as far as the frame bears it out. */
static int read_header(uint8_t *bytes, struct pv_frame *frame, const struct vnet_header *header)
{
	if (header->flags & VNET_DATA_VALID)
		frame->flags |= PV_FRAME_VALIDATED;
	if (header->flags & VNET_NEEDS_CSUM)
		frame->flags |= PV_FRAME_CSUM_BLANK | PV_FRAME_VALIDATED;
	switch (header->gso_type & ~VNET_GSO_ECN) {
	case 0:
		return 1;
	case VNET_GSO_TCPV4:
		frame->gso_type = PV_NETIF_GSO_TCPV4;
		break;
	case VNET_GSO_TCPV6:
		frame->gso_type = PV_NETIF_GSO_TCPV6;
		break;
	default:
		return 0;
	}
	frame->gso_size = header->gso_size;
	return pv_offload_fits(bytes, frame);
}

static int64_t take_tap(struct pv_netleg *leg, struct pv_burst *burst)
{
	uint32_t before = burst->n;

	for (uint32_t tries = 0; tries < PV_NETLOOP_BURST; tries++) {
		struct pv_frame *frame = pv_burst_next(burst, PV_NETIF_MAX_FRAME);
		struct vnet_header header = { .flags = 0 };
		uint8_t *bytes;
		ssize_t n;

		if (!frame)
			break;
		bytes = burst->memory + frame->offset;
		n = read(leg->fd, bytes - leg->vnet_bytes, PV_NETIF_MAX_FRAME + leg->vnet_bytes);
		if (n < 0) {
			if (errno == EAGAIN || errno == EINTR)
				break;
			return -errno;
		}
		if (n < (ssize_t)(leg->vnet_bytes + PV_NETIF_MIN_FRAME))
			continue;
		if (leg->vnet_bytes)
			memcpy(&header, bytes - leg->vnet_bytes, sizeof(header));
		frame->length = (uint32_t)n - leg->vnet_bytes;
		if (read_header(bytes, frame, &header))
			pv_burst_keep(burst, frame);
	}
	return burst->n - before;
}

static struct vnet_header header_of(uint8_t *bytes, struct pv_frame *frame)
{
	struct vnet_header header = { .flags = 0 };
	struct pv_l4 l4;

	if (frame->flags & PV_FRAME_CSUM_BLANK && pv_offload_look(bytes, frame->length, &l4)) {
		pv_offload_prepare(bytes, &l4);
		header.flags = VNET_NEEDS_CSUM;
		header.csum_start = l4.l4;
		header.csum_offset = (uint16_t)(l4.checksum - l4.l4);
		if (frame->gso_type) {
			header.gso_type = frame->gso_type == PV_NETIF_GSO_TCPV4 ? VNET_GSO_TCPV4 : VNET_GSO_TCPV6;
			header.gso_size = frame->gso_size;
			header.header_bytes = l4.payload;
		}
	} else if (frame->flags & PV_FRAME_VALIDATED) {
		header.flags = VNET_DATA_VALID;
	}
	return header;
}

static int write_all(struct pv_netleg *leg, const uint8_t *bytes, uint32_t n)
{
	ssize_t written;

	do
		written = write(leg->fd, bytes, n);
	while (written < 0 && errno == EINTR);
	return written == (ssize_t)n;
}

/* For an interface that takes no headers. `room`: for a segment. */
static int write_plain(struct pv_netleg *leg, uint8_t *bytes, struct pv_frame *frame, uint8_t *room)
{
	struct pv_l4 l4;
	uint32_t n;

	if (!(frame->flags & PV_FRAME_CSUM_BLANK))
		return write_all(leg, bytes, frame->length);
	if (!pv_offload_look(bytes, frame->length, &l4))
		return 0;
	if (!frame->gso_type) {
		pv_offload_finish(bytes, &l4);
		return write_all(leg, bytes, frame->length);
	}
	n = pv_offload_segments(&l4, frame->gso_size);
	if (!n || n > PV_NETBACK_MAX_SEGMENTS)
		return 0;
	for (uint32_t i = 0; i < n; i++)
		if (!write_all(leg, room, pv_offload_segment(bytes, &l4, frame->gso_size, i, room)))
			return 0;
	return 1;
}

static void send_tap(struct pv_netleg *leg, uint8_t *memory, struct pv_frame *frames, uint32_t n)
{
	/* Behind the frames of a burst there is room for one more. */
	uint8_t *room = leg->loop->burst.memory + NETLOOP_BURST_BYTES;

	for (uint32_t i = 0; i < n; i++) {
		uint8_t *bytes = memory + frames[i].offset;
		int well;

		if (leg->vnet_bytes) {
			struct vnet_header header = header_of(bytes, &frames[i]);
			uint8_t *start = bytes - leg->vnet_bytes;

			memset(start, 0, leg->vnet_bytes);
			memcpy(start, &header, sizeof(header));
			well = write_all(leg, start, frames[i].length + leg->vnet_bytes);
		} else {
			well = write_plain(leg, bytes, &frames[i], room);
		}
		if (well)
			leg->counters.out_packets++;
		else
			leg->counters.dropped++;
		leg->counters.out_bytes += well ? frames[i].length : 0;
	}
}

/* ---- control rings ---- */

/* No frames come of it. */
static int64_t serve_ctrl(struct pv_netleg *leg)
{
	int64_t n = pv_netctrl_serve(leg->ctrl);

	if (n > 0)
		leg->had_work = 1;
	if (leg->ctrl->stale)
		leg->stale = 1;
	return n < 0 ? n : 0;
}

/* ---- all kinds ---- */

/* An event that told of requests was none too many, whatever came of them: groups that are joined, packets that are malformed. */
static int64_t take_back(struct pv_netleg *leg, struct pv_burst *burst)
{
	uint32_t before = leg->back->tx->cons;
	int64_t n = pv_netback_take(leg->back, burst, PV_NETLOOP_BURST, leg->loop->now_ns);

	if (leg->back->tx->cons != before)
		leg->had_work = 1;
	return n;
}

int64_t netleg_take(struct pv_netleg *leg, struct pv_burst *burst)
{
	switch (leg->kind) {
	case PV_NETLEG_BACK:
		return take_back(leg, burst);
	case PV_NETLEG_FRONT:
		return pv_netfront_take(leg->front, burst, PV_NETLOOP_BURST);
	case PV_NETLEG_TAP:
		return take_tap(leg, burst);
	case PV_NETLEG_USER:
		return netleg_take_user(leg, burst);
	case PV_NETLEG_CTRL:
		return serve_ctrl(leg);
	default:
		return 0;
	}
}

static void send_front(struct pv_netleg *leg, uint8_t *memory, struct pv_frame *frames, uint32_t n)
{
	int64_t sent = pv_netfront_send(leg->front, memory, frames, n);

	if (sent < 0) {
		netleg_fail(leg, sent);
		sent = 0;
	}
	for (int64_t i = 0; i < sent; i++) {
		leg->counters.out_packets += !frames[i].status;
		leg->counters.out_bytes += frames[i].status ? 0 : frames[i].length;
	}
	leg->counters.dropped += n - (uint64_t)sent;
	if (leg->front->untold)
		leg->stale = 1;
}

static void send_back(struct pv_netleg *leg, uint8_t *memory, struct pv_frame *frames, uint32_t n)
{
	int64_t result;

	leg->back->sender = leg->loop->sender;
	result = pv_netback_send(leg->back, memory, frames, n, leg->loop->now_ns);

	if (result < 0)
		netleg_fail(leg, result);
	for (uint32_t i = 0; i < n; i++)
		leg->counters.out_bytes += frames[i].length;
	leg->counters.out_packets += n;
	if (leg->back->stale)
		leg->stale = 1;
}

void netleg_send(struct pv_netleg *leg, uint8_t *memory, struct pv_frame *frames, uint32_t n)
{
	if (leg->state)
		return;
	switch (leg->kind) {
	case PV_NETLEG_BACK:
		send_back(leg, memory, frames, n);
		break;
	case PV_NETLEG_FRONT:
		send_front(leg, memory, frames, n);
		break;
	case PV_NETLEG_TAP:
		send_tap(leg, memory, frames, n);
		break;
	case PV_NETLEG_USER:
		netleg_send_user(leg, memory, frames, n);
		break;
	default:
		for (uint32_t i = 0; i < n; i++)
			leg->counters.out_bytes += frames[i].length;
		leg->counters.out_packets += n;
		break;
	}
}

int netleg_has_room(struct pv_netleg *leg)
{
	uint32_t wanted = PV_NETLOOP_BURST, before;

	if (leg->kind != PV_NETLEG_FRONT || leg->state)
		return 1;
	/* A burst of small ones, or at least one of the largest. */
	if (leg->front->tx->size <= 2 * wanted)
		wanted = LARGEST_SLOTS;
	if (leg->front->n_free >= wanted && pv_ring_room(leg->front->tx) >= wanted)
		return 1;
	before = leg->front->n_free;
	if (pv_netfront_reap(leg->front) < 0) {
		netleg_fail(leg, -EPROTO);
		return 1;
	}
	if (leg->front->n_free != before)
		leg->had_work = 1;
	return leg->front->n_free >= wanted && pv_ring_room(leg->front->tx) >= wanted;
}

void netleg_look(struct pv_netleg *leg)
{
	int64_t result;

	if (leg->kind != PV_NETLEG_BACK || leg->state)
		return;
	if (leg->back->waiting_frames || leg->back->stalled || leg->back->no_buffers_ns) {
		uint64_t delivered = leg->back->counters.rx_packets;

		result = pv_netback_deliver(leg->back, leg->loop->now_ns);
		if (result < 0)
			netleg_fail(leg, result);
		/* The event that told of buffers was none too many. */
		if (leg->back->counters.rx_packets != delivered)
			leg->had_work = 1;
	}
}

int64_t netleg_due(const struct pv_netleg *leg)
{
	int64_t due = leg->kind == PV_NETLEG_BACK && !leg->state ? pv_netback_due(leg->back) : 0;

	return leg->held_ns && (!due || leg->held_ns < due) ? leg->held_ns : due;
}

static void set_held(struct pv_netleg *leg, int64_t until_ns)
{
	leg->loop->n_held += (until_ns != 0) - (uint32_t)(leg->held_ns != 0);
	leg->held_ns = until_ns;
}

/* A guest that takes slowly holds a sender back for a moment only: then its frames are dropped, and the others' go on. */
int netleg_is_held(struct pv_netleg *leg)
{
	uint64_t waiting = leg->backlog->bytes;
	int64_t now_ns = leg->loop->now_ns;

	if (waiting <= PV_NETLOOP_FREED_BYTES) {
		leg->overdrawn = 0;
		if (leg->held_ns)
			set_held(leg, 0);
	} else if (leg->held_ns && now_ns >= leg->held_ns) {
		leg->overdrawn = 1;
		set_held(leg, 0);
	} else if (!leg->held_ns && !leg->overdrawn && leg->loop->hold_ns && waiting > PV_NETLOOP_HELD_BYTES) {
		leg->counters.held++;
		set_held(leg, now_ns + leg->loop->hold_ns);
	}
	return leg->held_ns != 0;
}

/* ---- sleeping ---- */

/* The leg's i-th waiter: one, or a second one if its rings have one each. NULL: there is none. */
static struct pv_waiter *waiter_of(const struct pv_netleg *leg, int i)
{
	if (!leg->events[i] || (i && leg->events[1]->waiter == leg->events[0]->waiter))
		return NULL;
	return leg->events[i]->waiter;
}

int netleg_fd(const struct pv_netleg *leg, int i)
{
	const struct pv_waiter *waiter = waiter_of(leg, i);

	if (leg->kind == PV_NETLEG_TAP)
		return i ? -1 : leg->fd;
	return waiter ? waiter->epoll_fd : -1;
}

static void take_events(struct pv_netleg *leg)
{
	for (int i = 0; i < 2; i++)
		if (leg->events[i] && pv_port_take_pending(leg->events[i]))
			leg->unended[i] = leg->events[i]->late_eoi;
}

static void end_events(struct pv_netleg *leg)
{
	for (int i = 0; i < 2; i++) {
		if (leg->unended[i])
			pv_port_eoi(leg->events[i], !leg->had_work);
		leg->unended[i] = 0;
	}
	leg->had_work = 0;
}

/* The rings that are to wake us: 1 when one has something already, 0, or -errno. */
static int check_rings(struct pv_netleg *leg)
{
	struct pv_ring *in, *other;
	int result;

	if (leg->kind == PV_NETLEG_CTRL)
		return pv_ring_final_check(leg->ctrl->ring);
	if (leg->kind == PV_NETLEG_BACK) {
		int is_paused = leg->back->resume_ns || leg->held_ns;

		/* Requests that were taken from the ring and not looked at yet. */
		if (leg->back->n_requests && !is_paused)
			return 1;
		in = is_paused ? NULL : leg->back->tx;
		other = leg->back->waiting_frames || leg->back->stalled || leg->back->no_buffers_ns ? leg->back->rx : NULL;
	} else {
		in = leg->front->rx;
		other = leg->wants_room ? leg->front->tx : NULL;
	}
	result = in ? pv_ring_final_check(in) : 0;
	if (!result && other)
		result = pv_ring_final_check(other);
	return result;
}

static void disarm_all(struct pv_netleg *leg)
{
	for (int i = 0; i < 2; i++)
		if (waiter_of(leg, i))
			pv_waiter_disarm(waiter_of(leg, i), NULL);
}

int netleg_arm(struct pv_netleg *leg)
{
	int result;

	if (leg->kind == PV_NETLEG_TAP || leg->kind == PV_NETLEG_NULL)
		return 1;
	if (leg->kind == PV_NETLEG_USER)
		return !netleg_has_user(leg);
	end_events(leg);
	result = check_rings(leg);
	if (result)
		return result < 0 ? result : 0;
	for (int i = 0; i < 2 && result == PV_WAIT_TIMEOUT; i++)
		if (waiter_of(leg, i))
			result = pv_waiter_arm(waiter_of(leg, i), NULL);
	if (result == PV_WAIT_TIMEOUT)
		return 1;
	disarm_all(leg);
	if (result < 0)
		return result;
	take_events(leg);
	return 0;
}

void netleg_disarm(struct pv_netleg *leg, int rung)
{
	if (leg->kind != PV_NETLEG_BACK && leg->kind != PV_NETLEG_FRONT && leg->kind != PV_NETLEG_CTRL)
		return;
	for (int i = 0; rung && i < 2; i++)
		if (waiter_of(leg, i))
			pv_waiter_drain(waiter_of(leg, i));
	disarm_all(leg);
	take_events(leg);
}
