/* SPDX-License-Identifier: MIT */
/*
 * The frontend half of one queue of a network device: frames from private memory into granted pages, packets of the
 * backend out of them.
 *
 * Each request of a ring has a page of its own, which stays granted as long as the queue is connected. One thread sends
 * and one receives; they may be two. Responses are copied before they are looked at, and believed as far as they fit
 * what was asked.
 *
 * Source: Xen public/io/netif.h.
 */
#ifndef PV_NETFRONT_H
#define PV_NETFRONT_H

#include <stdint.h>

#include "pv_netif.h"
#include "pv_ring.h"

#define PV_NETFRONT_TAKE 256

/* What the backend takes. */
#define PV_NETFRONT_SG 1
#define PV_NETFRONT_GSO4 2
#define PV_NETFRONT_GSO6 4
#define PV_NETFRONT_CSUM6 16

struct pv_netfront_counters {
	uint64_t tx_packets;
	uint64_t tx_bytes;
	uint64_t tx_errors;        /* responses other than okay */
	uint64_t tx_refused;       /* frames that cannot be sent: too short, too large, of no form that the backend takes */
	uint64_t tx_segmented;     /* large packets cut here, because the backend does not take them */
	uint64_t tx_checksums;     /* filled in here */
	uint64_t rx_packets;
	uint64_t rx_bytes;
	uint64_t rx_errors;        /* packets that were dropped: an error of the backend, or malformed */
	uint64_t rx_checksums;     /* of these: no checksum to be filled in, or nothing to cut, where that was said */
	uint64_t rx_too_long;      /* of these: more than a frame may have */
};

struct pv_netfront {
	struct pv_ring *tx;
	struct pv_ring *rx;
	uint8_t *tx_pages;         /* shared; page i is of request id i, granted under tx_gref + i */
	uint8_t *rx_pages;
	uint32_t tx_gref;
	uint32_t rx_gref;
	uint32_t features;         /* PV_NETFRONT_*: of the backend */
	uint32_t untold;           /* 1: the backend could not be notified; for the owner, who clears it */
	uint32_t tx_broken;        /* 1: it answered what it was not asked */
	struct pv_netfront_counters counters;

	uint16_t *free_ids;        /* of the transmit ring, a stack */
	uint8_t *in_flight;        /* 1: the id is with the backend, 2: for a wish */
	uint32_t n_free;
	uint32_t extras_out;       /* slots of extra information that are not answered */
	uint32_t wishes_out;       /* requests to join or leave a group that are not answered */
	uint32_t wishes_refused;
	uint8_t *scratch;          /* one frame; made when first needed */

	uint16_t *slot_ids;        /* which id was asked for in each slot of the receive ring */
	uint32_t rx_cons;          /* of the responses that were looked at */
	uint32_t rx_prod;          /* of the requests */
	uint32_t first_response;
	uint32_t n_responses;
	struct pv_netif_rx_response responses[PV_NETFRONT_TAKE];
	uint32_t n_posts;
	struct pv_netif_rx_request posts[PV_NETFRONT_TAKE];
};

/* New rings, nothing in flight; the pages are granted, `rx` ones to be written. 0 or -ENOMEM. */
int pv_netfront_init(struct pv_netfront *front, struct pv_ring *tx, struct pv_ring *rx, uint8_t *tx_pages, uint32_t tx_gref,
		     uint8_t *rx_pages, uint32_t rx_gref);
void pv_netfront_destroy(struct pv_netfront *front);
/* Offer all pages of the receive ring to the backend. 0 or -errno. */
int64_t pv_netfront_post_all(struct pv_netfront *front);
/*
 * Send frames in order, as many as there is room for; what the backend does not take is brought into a form that it does.
 * How many, a refused one included (`status` of each: 0, or -EINVAL); -EPROTO: the backend broke the protocol; -errno.
 */
int64_t pv_netfront_send(struct pv_netfront *front, uint8_t *memory, struct pv_frame *frames, uint32_t n);
/*
 * Ask for what goes to a group, or no more: `type` is PV_NETIF_EXTRA_MCAST_ADD or _DEL. 1, and `wishes_out` and
 * `wishes_refused` say what comes of it; 0: there is no room; -EPROTO; -errno.
 */
int64_t pv_netfront_wish(struct pv_netfront *front, uint8_t type, const uint8_t address[6]);
/* Take responses to what was sent. 0; -EPROTO; -errno. */
int64_t pv_netfront_reap(struct pv_netfront *front);
/* Packets of the backend, at most `max`, to the end of `burst`. How many; -EPROTO; -errno. */
int64_t pv_netfront_take(struct pv_netfront *front, struct pv_burst *burst, uint32_t max);

#endif
