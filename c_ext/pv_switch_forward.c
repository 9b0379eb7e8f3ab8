/* SPDX-License-Identifier: MIT */
/* The path of a frame through the switch. */
#include <string.h>

#include "switch_private.h"

#define TYPE_AT 12
#define TAG_BYTES 4
#define TAGGED 0x8100
#define RESERVED 0x0180c2000000ull  /* and the 15 behind it: IEEE 802.1D, 7.12.6 */
#define FRAME 1000000000            /* in the unit of a limit's level */

/* What there is of a header; the reason to drop it, if it is none. */
static uint32_t parse(struct switch_frame *frame)
{
	const uint8_t *header = frame->header;

	if (frame->header_bytes < TYPE_AT + 2)
		return PV_SWITCH_DROP_BAD_FRAME;
	frame->to = switch_mac(header);
	frame->from = switch_mac(header + 6);
	frame->type_at = TYPE_AT;
	frame->tag = -1;
	if (!switch_is_station(frame->from))
		return PV_SWITCH_DROP_BAD_FRAME;
	if (switch_be16(header + TYPE_AT) == TAGGED) {
		if (frame->header_bytes < TYPE_AT + TAG_BYTES + 2)
			return PV_SWITCH_DROP_BAD_FRAME;
		frame->tag = (int32_t)(switch_be16(header + TYPE_AT + 2) & 0xfff);
		frame->type_at = TYPE_AT + TAG_BYTES;
	}
	return PV_SWITCH_DROP_NONE;
}

/* VLANs. */

static int is_in(const uint8_t *map, uint32_t vid)
{
	return map[vid / 8] >> vid % 8 & 1;
}

static int carries(const struct switch_port *port, uint32_t vid)
{
	return port->vid == (int32_t)vid || (port->is_trunk && is_in(port->vids, vid));
}

/* The VLAN of a frame from this port; PV_SWITCH_NO_VID: none that it carries. */
static int32_t vlan_of(const struct switch_port *port, int32_t tag)
{
	if (tag <= 0)
		return port->vid;
	return port->is_trunk && carries(port, (uint32_t)tag) ? tag : PV_SWITCH_NO_VID;
}

static uint32_t tag_for(const struct switch_port *port, const struct switch_frame *frame)
{
	if (port->vid == (int32_t)frame->vid)
		return frame->tag < 0 ? PV_SWITCH_TAG_KEEP : PV_SWITCH_TAG_STRIP;
	return frame->tag < 0 ? PV_SWITCH_TAG_INSERT : frame->tag == 0 ? PV_SWITCH_TAG_SET : PV_SWITCH_TAG_KEEP;
}

/* Where it goes. */

static void count_sent(struct switch_port *port, uint32_t bytes)
{
	port->statistics.tx_frames++;
	port->statistics.tx_bytes += bytes;
}

static void send_to(struct switch_port *port, const struct switch_frame *frame, struct pv_switch_verdict *out,
		    uint32_t *mirrored)
{
	uint32_t tag = tag_for(port, frame);

	out->ports[out->n_ports++] = (struct pv_switch_out){.port = (uint16_t)port->number, .tag = (uint16_t)tag};
	*mirrored |= port->is_mirrored;
	count_sent(port, frame->bytes + (tag == PV_SWITCH_TAG_INSERT ? TAG_BYTES : 0) -
				 (tag == PV_SWITCH_TAG_STRIP ? TAG_BYTES : 0));
}

static int wants(const struct switch_port *port, uint64_t group)
{
	if (!port->is_filtered)
		return 1;
	for (uint32_t i = 0; i < port->n_groups; i++)
		if (port->groups[i] == group)
			return 1;
	return 0;
}

static void flood(struct pv_switch *sw, const struct switch_port *from, const struct switch_frame *frame,
		  struct pv_switch_verdict *out, uint32_t *mirrored)
{
	int to_group = SWITCH_IS_GROUP(frame->to) && frame->to != SWITCH_BROADCAST;

	for (uint32_t i = 0; i < sw->n_slots; i++) {
		struct switch_port *port = sw->ports[i];

		if (port && port != from && (int32_t)i != sw->mirror && carries(port, frame->vid) &&
		    port->locking.mode != PV_SWITCH_DISABLED && (!to_group || wants(port, frame->to)))
			send_to(port, frame, out, mirrored);
	}
}

/* Whether the limit lets one frame through. Over any time t that is rate * t + burst of them. */
static int take(struct switch_limit *limit, int64_t now_ns)
{
	int64_t passed_ns = now_ns - limit->filled_ns, missing = limit->most - limit->level;

	if (!limit->rate)
		return 1;
	if (passed_ns > 0) {
		limit->filled_ns = now_ns;
		limit->level = passed_ns > missing / limit->rate ? limit->most : limit->level + passed_ns * limit->rate;
	}
	if (limit->level < FRAME)
		return 0;
	limit->level -= FRAME;
	return 1;
}

/* The reason to drop a frame of the port before it is asked where it goes. */
static uint32_t admit(struct pv_switch *sw, struct switch_port *port, struct switch_frame *frame, int64_t now_ns)
{
	int32_t vid = vlan_of(port, frame->tag);

	if (vid == PV_SWITCH_NO_VID)
		return PV_SWITCH_DROP_VLAN;
	frame->vid = (uint32_t)vid;
	if (port->locking.mode == PV_SWITCH_LOCKED && !switch_is_allowed(&port->locking, frame))
		return PV_SWITCH_DROP_SPOOF;
	if ((frame->to & ~15ull) == RESERVED)
		return PV_SWITCH_DROP_BLOCKED;
	return switch_learn(sw, port, frame->from, frame->vid, now_ns) ? PV_SWITCH_DROP_NONE : PV_SWITCH_DROP_TABLE;
}

static uint32_t route(struct pv_switch *sw, struct switch_port *port, const struct switch_frame *frame, int64_t now_ns,
		      struct pv_switch_verdict *out, uint32_t *mirrored)
{
	uint32_t limit = PV_SWITCH_LIMIT_UNKNOWN;

	if (SWITCH_IS_GROUP(frame->to)) {
		limit = frame->to == SWITCH_BROADCAST ? PV_SWITCH_LIMIT_BROADCAST : PV_SWITCH_LIMIT_MULTICAST;
	} else {
		/* It is forgotten when its port stops to carry its VLAN, to be open, or becomes the mirror. */
		struct switch_port *to = switch_look_up(sw, frame->to, frame->vid, now_ns);

		if (to == port)
			return PV_SWITCH_DROP_SAME_PORT;
		if (to) {
			out->kind = PV_SWITCH_UNICAST;
			send_to(to, frame, out, mirrored);
			return PV_SWITCH_DROP_NONE;
		}
	}
	if (!take(&port->limits[limit], now_ns))
		return PV_SWITCH_DROP_LIMIT;
	out->kind = PV_SWITCH_FLOOD;
	port->statistics.flooded++;
	flood(sw, port, frame, out, mirrored);
	return PV_SWITCH_DROP_NONE;
}

static void copy_to_mirror(struct pv_switch *sw, const struct switch_frame *frame, struct pv_switch_verdict *out)
{
	struct switch_port *mirror = sw->mirror == PV_SWITCH_NO_PORT ? NULL : sw->ports[sw->mirror];

	if (!mirror || mirror->locking.mode == PV_SWITCH_DISABLED)
		return;
	out->mirror = sw->mirror;
	count_sent(mirror, frame->bytes);
}

/* Frames come in runs: of one station to another, in a burst. */

static int is_repeated(const struct pv_switch_last *last, uint32_t in_port, const struct switch_frame *frame, int64_t now_ns)
{
	return last->to && last->in_port == in_port && last->now_ns == now_ns && frame->header_bytes >= last->header_bytes &&
	       !memcmp(frame->header, last->header, last->header_bytes);
}

static void remember(struct pv_switch *sw, const struct switch_port *port, const struct switch_frame *frame, int64_t now_ns,
		     const struct pv_switch_verdict *out)
{
	struct pv_switch_last *last = &sw->last;

	last->to = NULL;
	/* Of what a locked port sends, more than this is looked at. */
	if (out->kind != PV_SWITCH_UNICAST || port->locking.mode == PV_SWITCH_LOCKED)
		return;
	last->to = sw->ports[out->ports[0].port];
	last->in_port = port->number;
	last->header_bytes = frame->type_at + 2;
	memcpy(last->header, frame->header, last->header_bytes);
	last->tag = frame->tag;
	last->vid = frame->vid;
	last->now_ns = now_ns;
}

static void repeat(struct pv_switch *sw, const struct switch_port *port, struct switch_frame *frame,
		   struct pv_switch_verdict *out)
{
	uint32_t mirrored = port->is_mirrored;

	frame->tag = sw->last.tag;
	out->vid = frame->vid = sw->last.vid;
	out->kind = PV_SWITCH_UNICAST;
	out->reason = PV_SWITCH_DROP_NONE;
	send_to(sw->last.to, frame, out, &mirrored);
	if (mirrored)
		copy_to_mirror(sw, frame, out);
}

uint32_t pv_switch_forward(struct pv_switch *sw, uint32_t in_port, const uint8_t *header, uint32_t header_bytes,
			   uint32_t frame_bytes, int64_t now_ns, struct pv_switch_verdict *out)
{
	struct switch_port *port = switch_port(sw, in_port);
	struct switch_frame frame = {
		.header = header,
		.header_bytes = header_bytes < frame_bytes ? header_bytes : frame_bytes,
		.bytes = frame_bytes,
	};

	out->kind = PV_SWITCH_DROP;
	out->reason = PV_SWITCH_DROP_NO_PORT;
	out->mirror = PV_SWITCH_NO_PORT;
	out->vid = out->n_ports = 0;
	if (!port)
		return PV_SWITCH_DROP;
	port->statistics.rx_frames++;
	port->statistics.rx_bytes += frame_bytes;
	if (is_repeated(&sw->last, in_port, &frame, now_ns)) {
		repeat(sw, port, &frame, out);
		return PV_SWITCH_UNICAST;
	}
	out->reason = port->locking.mode == PV_SWITCH_DISABLED ? PV_SWITCH_DROP_DISABLED :
		      sw->mirror == (int32_t)in_port	       ? PV_SWITCH_DROP_MIRROR :
								 parse(&frame);
	if (!out->reason) {
		uint32_t mirrored = port->is_mirrored;

		out->reason = admit(sw, port, &frame, now_ns);
		if (!out->reason)
			out->reason = route(sw, port, &frame, now_ns, out, &mirrored);
		out->vid = frame.vid;
		if (mirrored)
			copy_to_mirror(sw, &frame, out);
	}
	remember(sw, port, &frame, now_ns, out);
	if (out->reason)
		port->statistics.drops[out->reason]++;
	return out->kind;
}
