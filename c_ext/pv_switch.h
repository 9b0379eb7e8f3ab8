/* SPDX-License-Identifier: MIT */
/*
 * A learning Ethernet switch as a data structure: which ports a frame goes to. It moves nothing, has no thread, looks at no
 * clock and makes no system call but one for random numbers; who moves frames asks it for a verdict on each.
 *
 * Frames are hostile. `header` is the caller's private copy of a frame's first bytes: never more than header_bytes of them
 * are read, and what they say is never a length or an index here that was not checked. The hash of the table of addresses
 * is seeded, so nobody can choose addresses that push others out; a port can be allowed so many addresses.
 *
 * Threads: one at a time, the owner's or under its lock; so there are no atomics. Fork: a child has a switch of its own.
 * Times are the caller's, CLOCK_MONOTONIC or any other that does not go back. Calls of configuration return 0, or -ENOENT
 * where there is no such port, and the errors that stand with them; nothing has changed then. pv_switch_forward allocates
 * nothing.
 *
 * VLANs are those of IEEE 802.1Q (type 0x8100, one tag; others are not looked into) with the rules of Open vSwitch: VLAN 0
 * is that of frames without a tag where nobody gave them another one, and a tag of vid 0 (priority only) counts as none.
 * Addresses are learnt for each VLAN.
 */
#ifndef PV_SWITCH_H
#define PV_SWITCH_H

#include <stdint.h>

#define PV_SWITCH_PORTS 4096             /* at most */
#define PV_SWITCH_HEADER_BYTES 64        /* of a frame, for all decisions but one: see pv_switch_set_locking */
#define PV_SWITCH_ADDRESSES 16384        /* learnt at most, unless told otherwise */
#define PV_SWITCH_MOST_ADDRESSES 1048576 /* what can be told */
#define PV_SWITCH_AGEING_NS 300000000000 /* unless told otherwise; IEEE 802.1D's default */
#define PV_SWITCH_GROUPS 64              /* of a port: XEN_NETBK_MCAST_MAX of Linux' xen-netback */
#define PV_SWITCH_LOCKED_ADDRESSES 16    /* of a locked port, of IPv4 and of IPv6 each */
#define PV_SWITCH_MAP_BYTES 512          /* a map of VLANs: that of `vid` is bit vid % 8 of byte vid / 8 */
#define PV_SWITCH_MOST_VID 4094
#define PV_SWITCH_NO_VID -1
#define PV_SWITCH_NO_PORT -1

/* What becomes of a frame. */
#define PV_SWITCH_DROP 0
#define PV_SWITCH_UNICAST 1
#define PV_SWITCH_FLOOD 2

/* Why it is dropped. */
#define PV_SWITCH_DROP_NONE 0
#define PV_SWITCH_DROP_NO_PORT 1         /* it came from a port that there is not; counted nowhere */
#define PV_SWITCH_DROP_BAD_FRAME 2       /* too short, or its source is no station's: zero, or a group */
#define PV_SWITCH_DROP_VLAN 3            /* its port does not carry its VLAN */
#define PV_SWITCH_DROP_SPOOF 4           /* its port is locked to other addresses */
#define PV_SWITCH_DROP_LIMIT 5           /* too many of its kind */
#define PV_SWITCH_DROP_SAME_PORT 6       /* it is for a station at the port it came from */
#define PV_SWITCH_DROP_BLOCKED 7         /* link-local, 01:80:c2:00:00:0x: bridges never pass these on */
#define PV_SWITCH_DROP_TABLE 8           /* its source is one address too many for its port */
#define PV_SWITCH_DROP_DISABLED 9        /* its port is disabled */
#define PV_SWITCH_DROP_MIRROR 10         /* it came from the mirror port, which only listens */
#define PV_SWITCH_DROPS 11

/* What is done with the tag (the four bytes at 12) for a port. */
#define PV_SWITCH_TAG_KEEP 0             /* nothing: it has one, or none, as it should */
#define PV_SWITCH_TAG_STRIP 1            /* taken out */
#define PV_SWITCH_TAG_INSERT 2           /* put in: 0x8100 and `vid`, priority 0 */
#define PV_SWITCH_TAG_SET 3              /* there is one of vid 0: `vid` goes into its lower 12 bits, the priority stays */

/* What pv_switch_set_limit limits. */
#define PV_SWITCH_LIMIT_BROADCAST 0
#define PV_SWITCH_LIMIT_MULTICAST 1
#define PV_SWITCH_LIMIT_UNKNOWN 2        /* to stations that were not heard of */
#define PV_SWITCH_LIMITS 3

#define PV_SWITCH_UNLOCKED 0
#define PV_SWITCH_LOCKED 1
#define PV_SWITCH_DISABLED 2

/* Where a copy of the frame goes. */
struct pv_switch_out {
	uint16_t port;
	uint16_t tag;                   /* PV_SWITCH_TAG_* */
};

struct pv_switch_verdict {
	uint32_t kind;
	uint32_t reason;                /* of a drop */
	int32_t mirror;                 /* a port that gets one copy more, as the frame came in, whatever the kind is; or -1 */
	uint32_t vid;                   /* for TAG_INSERT and TAG_SET */
	uint32_t n_ports;               /* DROP: 0; UNICAST: 1; FLOOD: any number, 0 too, in ascending order */
	struct pv_switch_out ports[PV_SWITCH_PORTS];  /* written up to n_ports */
};

struct pv_switch_statistics {
	uint64_t rx_frames;             /* that the port gave to the switch, with those that were dropped */
	uint64_t rx_bytes;
	uint64_t tx_frames;             /* that a verdict sent to the port, mirrored ones too */
	uint64_t tx_bytes;              /* as they are after their tag was dealt with */
	uint64_t flooded;               /* of those received */
	uint64_t moved;                 /* stations that came here from another port */
	uint64_t addresses;             /* learnt here, now; some may be too old and not yet forgotten */
	uint64_t drops[PV_SWITCH_DROPS];  /* of those received, by reason */
};

struct pv_switch_locking {
	uint32_t mode;                  /* PV_SWITCH_UNLOCKED, _LOCKED, _DISABLED; all else is for LOCKED */
	uint32_t n_ipv4;
	uint32_t n_ipv6;
	uint8_t mac[6];
	uint8_t pad[2];
	uint8_t ipv4[PV_SWITCH_LOCKED_ADDRESSES][4];
	uint8_t ipv6[PV_SWITCH_LOCKED_ADDRESSES][16];
};

/* A station that was learnt. */
struct pv_switch_address {
	int64_t seen_ns;                /* when it was last heard, to a 256th of the ageing time */
	uint32_t port;
	uint16_t vid;
	uint8_t mac[6];
	uint8_t pad[4];
};

/* The ends of a list of addresses, by when they were seen. Private. */
struct pv_switch_list {
	uint32_t oldest;
	uint32_t newest;
};

struct switch_port;
struct switch_address;

/* Private. */
/* The last frame, if it went to one known station: one with the same addresses and tag that follows goes there, too. */
struct pv_switch_last {
	struct switch_port *to;    /* NULL: it did not, or something has changed */
	uint32_t in_port;
	uint32_t header_bytes;     /* addresses and tag */
	uint8_t header[18];
	int32_t tag;
	uint32_t vid;
	int64_t now_ns;
};

struct pv_switch {
	struct switch_port **ports;     /* by number, NULL: none */
	uint32_t n_slots;               /* of these */
	uint32_t n_ports;               /* that there are */
	int32_t mirror;
	struct pv_switch_last last;
	uint32_t max_addresses;
	uint32_t n_addresses;
	uint32_t bucket_bits;           /* the table has 2 ** bucket_bits buckets */
	struct pv_switch_list list;     /* of all addresses */
	uint64_t *keys;                 /* of each place of the table: MAC, VLAN and a mark; 0: free */
	struct switch_address *addresses;   /* the rest of each place */
	uint64_t seeds[2];
	int64_t ageing_ns;              /* 0: for ever */
	int64_t refresh_ns;             /* how much older than it says an address may be */
	uint64_t evicted;               /* addresses that were forgotten because there was no place */
};

/*
 * Without ports. `max_addresses`: 0 for PV_SWITCH_ADDRESSES. `seed`: of the hash; 0: a random one, any other for tests.
 * 0; -EINVAL for too many addresses; -ENOMEM; an errno of getrandom(2). After an error there is nothing to destroy.
 */
int pv_switch_init(struct pv_switch *sw, uint32_t max_addresses, uint64_t seed);
/* Harmless when repeated. */
void pv_switch_destroy(struct pv_switch *sw);

/*
 * The lowest free number; -ENOSPC when there are PV_SWITCH_PORTS; -ENOMEM. It is a trunk for all VLANs, with VLAN 0 for
 * frames without a tag; unlocked, not filtered, not limited, not mirrored.
 */
int pv_switch_add_port(struct pv_switch *sw);
/* With its statistics, and what was learnt there. If it was the mirror port, there is none. */
int pv_switch_remove_port(struct pv_switch *sw, uint32_t port);

/*
 * The port belongs to one VLAN (0 to PV_SWITCH_MOST_VID), whose frames come and go without a tag; any tag but one of vid 0
 * is refused. What was learnt at the port is forgotten. -EINVAL.
 */
int pv_switch_set_access(struct pv_switch *sw, uint32_t port, uint32_t vid);
/*
 * The port carries the VLANs of a map of PV_SWITCH_MAP_BYTES (NULL: all from 1 to PV_SWITCH_MOST_VID), with tags, and
 * `native` without (PV_SWITCH_NO_VID: frames without a tag are refused). What was learnt there is forgotten. -EINVAL.
 */
int pv_switch_set_trunk(struct pv_switch *sw, uint32_t port, const uint8_t *vids, int32_t native);

/*
 * From now on no more than `frames` a second of a kind (PV_SWITCH_LIMIT_*) are let in from the port, and `burst` at once
 * after a rest (0: a tenth of a second's worth, at least 1). frames = 0: no limit. -EINVAL for a kind there is not.
 */
int pv_switch_set_limit(struct pv_switch *sw, uint32_t port, uint32_t kind, uint32_t frames, uint32_t burst);

/*
 * Who may send from the port, like XenServer's locking modes of a VIF.
 *
 * LOCKED: frames of `mac` only, and of these no others than
 *   ARP for Ethernet and IPv4, whose sender is `mac` and 0.0.0.0 or one of `ipv4`;
 *   IPv4 from one of `ipv4`, or what a DHCP client sends that has no address: UDP from 0.0.0.0 to port 67;
 *   IPv6 from one of `ipv6`, that is not a router's (advertisement, redirect, mobile prefix, multicast router) nor the
 *   advertisement of a neighbour that is not one of `ipv6`.
 * What cannot be told from the header (IPv6's extension headers go on beyond it, neighbour discovery in fragments) is not
 * let through. With one exception: of the address that a neighbour advertises only the bytes within the header are compared.
 * It stands at 62 to 77, 4 further behind a tag: who wants it looked at gives 96 bytes for a locked port, not 64.
 *
 * DISABLED: nothing, and nothing is sent to it.
 *
 * What was learnt at the port is forgotten, but for UNLOCKED. -EINVAL: a mode there is not, too many addresses, a MAC that
 * is not a station's.
 */
int pv_switch_set_locking(struct pv_switch *sw, uint32_t port, const struct pv_switch_locking *locking);

/* The port gets of multicast no other groups than those that were added; broadcast, too. Off at first. */
int pv_switch_set_multicast_filter(struct pv_switch *sw, uint32_t port, int on);
/* -EINVAL: no group's address, or broadcast; -ENOSPC: there are PV_SWITCH_GROUPS. One that is there already: 0. */
int pv_switch_mcast_add(struct pv_switch *sw, uint32_t port, const uint8_t *mac);
/* -ENOENT, also for a group that was not added. */
int pv_switch_mcast_del(struct pv_switch *sw, uint32_t port, const uint8_t *mac);

/*
 * The port that gets a copy of what mirrored ports send (what is dropped too, as long as it is a frame) and are sent;
 * PV_SWITCH_NO_PORT: none. It gets nothing else, nothing is taken from it, what was learnt there is forgotten.
 */
int pv_switch_set_mirror(struct pv_switch *sw, int32_t port);
int pv_switch_set_mirrored(struct pv_switch *sw, uint32_t port, int on);

/*
 * A port has at most so many addresses (0: as many as there are); the oldest of more are forgotten. Frames from a further
 * station are dropped.
 */
int pv_switch_set_address_limit(struct pv_switch *sw, uint32_t port, uint32_t most);
/*
 * Addresses that were not heard of for so long are forgotten; 0: never. With a longer time than before, those count again
 * that nobody has forgotten yet. -EINVAL for less than 0.
 */
int pv_switch_set_ageing(struct pv_switch *sw, int64_t ageing_ns);
/* Forget what is too old; how many. It does not count any more either way: this only makes room, and statistics exact. */
uint32_t pv_switch_age(struct pv_switch *sw, int64_t now_ns);
/* Forget what was learnt at a port. */
int pv_switch_forget(struct pv_switch *sw, uint32_t port);

/* The port of a station; -ENOENT. */
int pv_switch_find(const struct pv_switch *sw, const uint8_t *mac, uint32_t vid, int64_t now_ns);
/* Up to `most` addresses, from the oldest on; how many. There are sw->n_addresses at most. */
uint32_t pv_switch_list(const struct pv_switch *sw, struct pv_switch_address *addresses, uint32_t most, int64_t now_ns);
int pv_switch_statistics(const struct pv_switch *sw, uint32_t port, struct pv_switch_statistics *statistics);
/* "bad_frame" and so on; "?" for what is none. */
const char *pv_switch_drop_name(uint32_t reason);

/*
 * A frame of frame_bytes came from in_port: learn where its source is, and say in *out where it goes. `header`: its first
 * header_bytes, PV_SWITCH_HEADER_BYTES or as many as there are; more are used if there are more. Returns out->kind.
 */
uint32_t pv_switch_forward(struct pv_switch *sw, uint32_t in_port, const uint8_t *header, uint32_t header_bytes,
			   uint32_t frame_bytes, int64_t now_ns, struct pv_switch_verdict *out);

#endif
