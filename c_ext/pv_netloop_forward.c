/* SPDX-License-Identifier: MIT */
/* Where the frames of a burst go: through a wire, or as the switch says. */
#include <string.h>

#include "netloop_private.h"
#include "pv_netcapture.h"
#include "pv_offload.h"

#define LOOK_BYTES 128u            /* of a frame, for the switch */
#define MACS 12u
#define TAG_BYTES 4u

static void add(struct pv_netloop *loop, struct pv_netleg *leg, const struct pv_frame *frame)
{
	if (leg->n_out == 2 * PV_NETLOOP_BURST)
		return;
	if (!leg->n_out)
		loop->touched[loop->n_touched++] = leg;
	leg->out[leg->n_out++] = *frame;
}

/* The queue of a port that a frame goes to: all of a flow to the same. Its hash is what the port's guest asks for. */
static struct pv_netleg *leg_of(struct pv_netloop *loop, uint32_t port, struct pv_frame *frame)
{
	struct pv_netleg *first = port < loop->n_by_port ? loop->by_port[port] : NULL, *leg = first;
	const uint8_t *bytes = loop->burst.memory + frame->offset;
	uint32_t n = 0;

	frame->flags &= (uint16_t)~PV_FRAME_HASH;
	if (first && first->hash && first->hash->algorithm != PV_NETHASH_NONE) {
		pv_nethash_of(first->hash, bytes, frame);
		n = pv_nethash_queue(first->hash, frame);
		/* There may be fewer queues at the moment. */
		for (; n && leg->next_of_port; n--)
			leg = leg->next_of_port;
		return leg;
	}
	if (!first || !first->next_of_port)
		return first;
	for (; leg; leg = leg->next_of_port)
		n++;
	n = pv_offload_flow(bytes, frame->length) % n;
	for (leg = first; n; n--)
		leg = leg->next_of_port;
	return leg;
}

/* A copy of a frame at the end of the burst; NULL: there is no room. */
static struct pv_frame *copy(struct pv_burst *burst, const struct pv_frame *frame)
{
	struct pv_frame *made = pv_burst_next(burst, frame->length + TAG_BYTES);
	uint32_t offset;

	if (!made)
		return NULL;
	offset = made->offset;
	*made = *frame;
	made->offset = offset;
	memcpy(burst->memory + offset, burst->memory + frame->offset, frame->length);
	pv_burst_keep(burst, made);
	return made;
}

/* Before each frame there is room for a tag. */
static void change_tag(uint8_t *memory, struct pv_frame *frame, uint32_t tag, uint32_t vid)
{
	uint8_t *bytes = memory + frame->offset;

	if (tag == PV_SWITCH_TAG_STRIP) {
		memmove(bytes + TAG_BYTES, bytes, MACS);
		frame->offset += TAG_BYTES;
		frame->length -= TAG_BYTES;
	} else if (tag == PV_SWITCH_TAG_INSERT) {
		bytes -= TAG_BYTES;
		memmove(bytes, bytes + TAG_BYTES, MACS);
		bytes[MACS] = 0x81;
		bytes[MACS + 1] = 0;
		bytes[MACS + 2] = (uint8_t)(vid >> 8);
		bytes[MACS + 3] = (uint8_t)vid;
		frame->offset -= TAG_BYTES;
		frame->length += TAG_BYTES;
	} else if (tag == PV_SWITCH_TAG_SET) {
		bytes[MACS + 2] = (uint8_t)((bytes[MACS + 2] & 0xF0) | vid >> 8);
		bytes[MACS + 3] = (uint8_t)vid;
	}
}

static void go_out(struct pv_netloop *loop, const struct pv_switch_out *out, uint32_t vid, struct pv_frame *frame, int is_alone)
{
	struct pv_netleg *leg = leg_of(loop, out->port, frame);

	if (!leg)
		return;
	if (out->tag == PV_SWITCH_TAG_KEEP) {
		add(loop, leg, frame);
		return;
	}
	if (frame->length > PV_NETIF_MAX_FRAME - TAG_BYTES && out->tag == PV_SWITCH_TAG_INSERT) {
		leg->counters.dropped++;
		return;
	}
	if (!is_alone)
		frame = copy(&loop->burst, frame);
	if (!frame) {
		leg->counters.dropped++;
		return;
	}
	change_tag(loop->burst.memory, frame, out->tag, vid);
	add(loop, leg, frame);
}

static void switch_one(struct pv_netloop *loop, struct pv_netleg *from, struct pv_frame *frame)
{
	struct pv_switch_verdict *verdict = loop->verdict;
	const uint8_t *header = loop->burst.memory + frame->offset;
	uint32_t n = frame->length < LOOK_BYTES ? frame->length : LOOK_BYTES;

	pv_switch_forward(&loop->sw, (uint32_t)from->port, header, n, frame->length, loop->now_ns, verdict);
	if (verdict->mirror >= 0) {
		struct pv_netleg *mirror = leg_of(loop, (uint32_t)verdict->mirror, frame);

		if (mirror) {
			uint16_t flags = frame->flags;

			/* A mirror that is slow holds nobody back. */
			frame->flags |= PV_FRAME_FLOODED;
			add(loop, mirror, frame);
			frame->flags = flags;
		}
	}
	if (verdict->n_ports > 1)
		frame->flags |= PV_FRAME_FLOODED;
	for (uint32_t i = 0; i < verdict->n_ports; i++)
		go_out(loop, &verdict->ports[i], verdict->vid, frame, verdict->n_ports == 1 && verdict->mirror < 0);
}

/* The same without looking at it. */
static void wire_one(struct pv_netloop *loop, const struct pv_netleg *from, struct pv_frame *frame)
{
	int32_t other = from->port == loop->ends[0] ? loop->ends[1] : from->port == loop->ends[1] ? loop->ends[0] : PV_SWITCH_NO_PORT;
	struct pv_netleg *leg = other < 0 ? NULL : leg_of(loop, (uint32_t)other, frame);

	if (leg)
		add(loop, leg, frame);
}

void pv_netloop_set_wire(struct pv_netloop *loop, int is_wire, int32_t one, int32_t other)
{
	loop->is_wire = is_wire != 0;
	loop->ends[0] = one;
	loop->ends[1] = other;
}

static void send(struct pv_netleg *leg, uint8_t *memory, struct pv_frame *frames, uint32_t n)
{
	if (leg->taps)
		netcapture_take(leg, PV_NETCAPTURE_OUT, memory, frames, n);
	netleg_send(leg, memory, frames, n);
	netloop_settle(leg);
}

void netloop_forward(struct pv_netleg *from, uint32_t n)
{
	struct pv_netloop *loop = from->loop;
	struct pv_frame *frames = loop->burst.frames;

	for (uint32_t i = 0; i < n; i++)
		from->counters.in_bytes += frames[i].length;
	from->counters.in_packets += n;
	loop->sender = from->backlog;
	if (from->taps)
		netcapture_take(from, PV_NETCAPTURE_IN, loop->burst.memory, frames, n);
	if (from->wire) {
		send(from->wire, loop->burst.memory, frames, n);
		return;
	}
	if (from->port < 0)
		return;
	loop->n_touched = 0;
	for (uint32_t i = 0; i < n; i++)
		if (loop->is_wire)
			wire_one(loop, from, &frames[i]);
		else
			switch_one(loop, from, &frames[i]);
	for (uint32_t i = 0; i < loop->n_touched; i++) {
		struct pv_netleg *leg = loop->touched[i];

		send(leg, loop->burst.memory, leg->out, leg->n_out);
		leg->n_out = 0;
	}
}
