/* SPDX-License-Identifier: MIT */
/*
 * The backend half of one queue of a network device: packets of the guest into private memory, frames into pages that the
 * guest has offered.
 *
 * One thread has a queue at a time; counters may be read by any. Requests, grants, whatever a guest can write, is copied
 * before it is looked at.
 *
 * Source: Xen public/io/netif.h; limits, time-outs and what is fatal as in Linux' drivers/net/xen-netback.
 */
#ifndef PV_NETBACK_H
#define PV_NETBACK_H

#include <stdint.h>

#include "pv_grant.h"
#include "pv_netif.h"
#include "pv_ring.h"

#define PV_NETBACK_TAKE 256        /* requests that are taken together */
#define PV_NETBACK_OPS 64          /* copies that are done together */
#define PV_NETBACK_PACKETS 64      /* of one burst */
#define PV_NETBACK_WAITING_BYTES 524288  /* of frames that wait for the guest's buffers */
#define PV_NETBACK_MCAST 64        /* addresses of a multicast list */
#define PV_NETBACK_MIN_BURST 131072 /* bytes that a guest may send at once, whatever its rate */
#define PV_NETBACK_MAX_SEGMENTS 1024 /* into which one large packet is cut */

/* What the frontend can do with what it gets. */
#define PV_NETBACK_SG 1
#define PV_NETBACK_GSO4 2
#define PV_NETBACK_GSO6 4
#define PV_NETBACK_NO_CSUM 8       /* it wants all checksums filled in */
#define PV_NETBACK_CSUM6 16        /* it takes blank ones of IPv6, too */
#define PV_NETBACK_MCAST_CONTROL 32 /* it gets the multicast that it asks for, no other */
#define PV_NETBACK_RX_NOTIFY 64    /* it says when it has new buffers */

struct pv_netback_counters {
	uint64_t tx_packets;       /* of the guest */
	uint64_t tx_bytes;
	uint64_t tx_errors;        /* malformed, answered ERROR */
	uint64_t tx_copy_errors;   /* pages that could not be copied, answered ERROR */
	uint64_t tx_checksums;     /* dropped: nothing to fill a checksum in, or to cut into segments */
	uint64_t tx_delayed;       /* times the rate was used up */
	uint64_t rx_packets;       /* to the guest */
	uint64_t rx_bytes;
	uint64_t rx_copy_errors;   /* responses with an error */
	uint64_t rx_full;          /* dropped: it has no buffers, and enough waits already */
	uint64_t rx_expired;       /* dropped: waited too long */
	uint64_t rx_stalled;       /* dropped: it has not taken anything for a minute */
	uint64_t rx_too_large;     /* dropped: cannot be brought into a form that it takes */
	uint64_t rx_filtered;      /* not delivered: multicast that it has not asked for */
	uint64_t rx_segmented;     /* large packets that were cut for it */
	uint64_t rx_checksums;     /* filled in for it */
	uint64_t rx_waited;        /* frames that had to wait */
	uint64_t stalls;
	uint64_t mcast_changes;
};

/* What one sender has waiting at guests that have no buffers. The sender and every frame count as a user. */
struct pv_backlog {
	uint64_t bytes;
	uint32_t users;
};

#define PV_BACKLOG_FRAME_BYTES 1024 /* that a frame counts beside its own */

/* What a guest wants of what goes to groups: of all queues of its device. */
struct pv_netback_groups {
	uint32_t n;
	uint8_t addresses[PV_NETBACK_MCAST][6];
};

struct pv_waiting_block;           /* frames that wait for buffers */

struct pv_netback {
	struct pv_ring *tx;
	struct pv_ring *rx;
	struct pv_mapper *mapper;
	uint32_t features;         /* PV_NETBACK_*: of the frontend */
	uint32_t fatal;            /* PV_NETIF_FATAL_*: it broke the protocol here */
	uint32_t stale;            /* 1: it could not be notified; for the owner, who clears it */
	uint32_t stalled;          /* 1: it offers nothing, so nothing is kept for it */
	uint32_t headroom;         /* bytes left free before each frame in a page, for XDP */
	struct pv_netback_counters counters;

	uint32_t first_request;    /* of those that were taken and belong to no packet yet */
	uint32_t n_requests;
	struct pv_netif_tx_request requests[PV_NETBACK_TAKE];
	uint32_t n_answers;
	struct pv_netif_tx_response answers[PV_NETBACK_TAKE];

	uint64_t credit_bytes;     /* a window; 0: no limit */
	int64_t credit_window_ns;
	uint64_t credit_left;
	int64_t credit_next_ns;    /* when the next window begins */
	int64_t resume_ns;         /* nothing is taken until then; 0: it is */

	uint32_t first_buffer;     /* of those that were taken and are not answered */
	uint32_t n_buffers;
	struct pv_netif_rx_request buffers[PV_NETBACK_TAKE];
	uint32_t n_responses;
	struct pv_netif_rx_response responses[PV_NETBACK_TAKE];
	uint32_t n_ops;
	uint16_t op_response[PV_NETBACK_OPS];
	struct pv_grant_copy_op ops[PV_NETBACK_OPS];
	uint8_t *local;            /* memory that the operations copy from */

	struct pv_waiting_block *oldest;
	struct pv_waiting_block *newest;
	struct pv_backlog *sender; /* of what is sent now, as far as it goes to one guest alone; NULL: nobody's */
	uint64_t waiting_bytes;
	uint64_t waiting_frames;
	int64_t drain_ns;          /* how long a frame may wait */
	int64_t stall_ns;          /* how long the guest may take nothing; 0: for ever */
	int64_t no_buffers_ns;     /* since when it has too few; 0: it has enough */
	uint32_t wanted;           /* buffers that it had too few for */
	uint8_t *scratch;          /* one frame; made when first needed */

	struct pv_netback_groups *groups;
	struct pv_netback_groups own_groups; /* `groups`, unless another queue's are these, too */
};

/* Rings are attached to, of this frontend; without copies of anything. `features`: PV_NETBACK_*. */
void pv_netback_init(struct pv_netback *netback, struct pv_ring *tx, struct pv_ring *rx, struct pv_mapper *mapper, uint32_t features);
/* It has the groups of another queue of its device, in the same thread, which must outlive it. */
void pv_netback_share_groups(struct pv_netback *netback, struct pv_netback *with);
/* Whether it gets the groups that it asks for alone, from now on. */
void pv_netback_filter(struct pv_netback *netback, int on);
/* Let frames go that wait. */
void pv_netback_destroy(struct pv_netback *netback);
/* What the guest may send: `bytes` a window of `window_us`; 0: as much as it likes. */
void pv_netback_set_rate(struct pv_netback *netback, uint64_t bytes, uint64_t window_us);

/*
 * Packets of the guest, at most `max`, to the end of `burst`, as far as it has room; their requests are answered. How many;
 * -EPROTO: the ring is dead, or `fatal` says what was wrong; another -errno.
 */
int64_t pv_netback_take(struct pv_netback *netback, struct pv_burst *burst, uint32_t max, int64_t now_ns);
/*
 * Frames to the guest, in order. What it has no buffers for waits, up to a limit, behind what waits already. `memory` may
 * be changed: checksums are filled in. 0; -EPROTO: the ring is dead; another -errno.
 */
int64_t pv_netback_send(struct pv_netback *netback, uint8_t *memory, struct pv_frame *frames, uint32_t n, int64_t now_ns);
/* Deliver what waits, as far as there are buffers by now; drop what waited too long. As pv_netback_send. */
int64_t pv_netback_deliver(struct pv_netback *netback, int64_t now_ns);
/* When the next thing is due without an event of the guest, in ns; 0: nothing. */
int64_t pv_netback_due(const struct pv_netback *netback);
/* Let all frames go that wait. */
void pv_netback_forget(struct pv_netback *netback);

/* Nothing waits, one user. NULL: no memory. */
struct pv_backlog *pv_backlog_new(void);
/* One user less. */
void pv_backlog_release(struct pv_backlog *backlog);

#endif
