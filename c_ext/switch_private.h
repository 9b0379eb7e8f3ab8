/* SPDX-License-Identifier: MIT */
/* What the files of the switch (pv_switch*.c) keep and call of each other. */
#ifndef SWITCH_PRIVATE_H
#define SWITCH_PRIVATE_H

#include "pv_switch.h"

#define SWITCH_NONE UINT32_MAX  /* no place of the table */
#define SWITCH_BROADCAST 0xffffffffffffull
#define SWITCH_IS_GROUP(mac) ((mac) >> 40 & 1)

/* The two lists an address is in. */
#define SWITCH_OF_ALL 0
#define SWITCH_OF_PORT 1

struct switch_address {
	int64_t seen_ns;
	struct {
		uint32_t older, newer;
	} links[2];
	uint32_t port;
	uint32_t pad;
};

struct switch_limit {
	uint32_t rate;          /* frames a second; 0: no limit */
	int64_t level;          /* of what may come, in 1e-9 frames: rate * ns without a division */
	int64_t most;
	int64_t filled_ns;      /* when the level was right */
};

struct switch_port {
	uint32_t number;
	int32_t vid;            /* whose frames have no tag here: access, or native; PV_SWITCH_NO_VID */
	uint8_t is_trunk;
	uint8_t is_mirrored;
	uint8_t is_filtered;
	uint8_t pad;
	uint32_t n_addresses;
	uint32_t max_addresses; /* 0: no limit */
	struct pv_switch_list list;     /* of its addresses */
	struct pv_switch_statistics statistics;
	struct switch_limit limits[PV_SWITCH_LIMITS];
	struct pv_switch_locking locking;
	uint32_t n_groups;
	uint64_t groups[PV_SWITCH_GROUPS];
	uint8_t vids[PV_SWITCH_MAP_BYTES];  /* of a trunk; never 0 nor 4095 */
};

/* What was read of a frame. */
struct switch_frame {
	const uint8_t *header;
	uint32_t header_bytes;  /* no more than there are of the frame */
	uint32_t bytes;
	uint64_t to, from;
	uint32_t type_at;       /* where the type stands that is not a tag's */
	int32_t tag;            /* its vid; -1: there is none */
	uint32_t vid;           /* of its VLAN */
};

static inline uint32_t switch_be16(const uint8_t *bytes)
{
	return (uint32_t)bytes[0] << 8 | bytes[1];
}

/* As a number that reads like the address. */
static inline uint64_t switch_mac(const uint8_t *bytes)
{
	return (uint64_t)switch_be16(bytes) << 32 | (uint64_t)switch_be16(bytes + 2) << 16 | switch_be16(bytes + 4);
}

static inline int switch_is_station(uint64_t mac)
{
	return mac && !SWITCH_IS_GROUP(mac);
}

static inline struct switch_port *switch_port(const struct pv_switch *sw, uint32_t port)
{
	return port < sw->n_slots ? sw->ports[port] : NULL;
}

/* -- pv_switch_table.c */

/* For sw->max_addresses. 0; -ENOMEM. */
int switch_make_table(struct pv_switch *sw);
/* The port of a station that was heard of not too long ago; NULL. */
struct switch_port *switch_look_up(const struct pv_switch *sw, uint64_t mac, uint32_t vid, int64_t now_ns);
/* It is at this port. 0: the port has too many already. */
int switch_learn(struct pv_switch *sw, struct switch_port *port, uint64_t mac, uint32_t vid, int64_t now_ns);
/* Forget the oldest of a port until it has no more than `most`. */
void switch_trim(struct pv_switch *sw, struct switch_port *port, uint32_t most);

/* -- pv_switch_guard.c */

/* Whether a frame may come from a locked port. */
int switch_is_allowed(const struct pv_switch_locking *locking, const struct switch_frame *frame);

#endif
