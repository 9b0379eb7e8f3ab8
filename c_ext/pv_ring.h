/* SPDX-License-Identifier: MIT */
/*
 * Xen's shared ring, either end, for any size of messages and 1 to 16 pages.
 *
 * One memory layout, byte for byte that of Xen's public/io/ring.h: a header of 64 bytes with four indexes, then a power of
 * two of entries. Requests and responses share the entries, so an entry is as large as the larger of the two. Indexes run
 * freely over 32 bits and are compared by unsigned difference.
 *
 * The two ends differ only in which of the shared words they write, so there is one struct and one set of calls:
 *
 *            produces     publishes   asks "tell me at"   reads
 *   front    requests     req_prod    rsp_event           rsp_prod, req_event
 *   back     responses    rsp_prod    req_event           req_prod, rsp_event
 *
 * Trust: the peer may write anything at any time. Its producer index is read once a batch and checked against what this
 * end knows from private memory; entries are copied out before anybody looks at them; what this end wrote is never read
 * back. A wrong index kills the ring (-EPROTO from then on): only the front can make a new one.
 *
 * Threads: one thread pushes, one takes and waits; they may be two. Fork: a child's calls get -ECHILD.
 * Not promised: order of responses, a response to each request, fairness.
 */
#ifndef PV_RING_H
#define PV_RING_H

#include <stdint.h>

#include "pv_event.h"

#define PV_RING_HEADER_BYTES 64
#define PV_RING_MAX_BYTES 65536

/* The head of the shared memory; the entries follow. */
struct pv_ring_header {
	uint32_t req_prod;      /* front: requests before this one are visible */
	uint32_t req_event;     /* back: notify me when req_prod passes this */
	uint32_t rsp_prod;      /* back: responses before this one are visible */
	uint32_t rsp_event;     /* front: notify me when rsp_prod passes this */
	uint8_t pvt[48];
};

/* Private: one end. */
struct pv_ring {
	uint8_t *entries;           /* shared */
	uint32_t *own_prod;         /* shared, written here */
	uint32_t *own_event;        /* shared, written here */
	const uint32_t *peer_prod;  /* shared, written by the peer */
	const uint32_t *peer_event; /* shared, written by the peer */
	struct pv_port *port;       /* where to notify and what to sleep on; NULL: neither */
	const uint32_t *home_word;  /* pv_home_word */
	uint32_t home;              /* pv_home_mark */
	uint32_t is_front;
	uint32_t size;              /* entries, a power of two */
	uint32_t entry_bytes;
	uint32_t out_bytes;         /* of a message that this end produces */
	uint32_t in_bytes;          /* of a message that this end consumes */
	uint32_t dead;              /* 1: the peer broke the protocol */
	uint32_t prod;              /* next index to produce: req_prod_pvt or rsp_prod_pvt */
	uint32_t cons;              /* next index to consume: rsp_cons or req_cons */
	uint32_t peer_prod_checked; /* the last peer index that was found right */
	uint32_t cons_at_event;     /* cons when the last event came */
	uint32_t max_outstanding;   /* most requests without a response, seen by this end */
	uint64_t produced;          /* messages */
	uint64_t consumed;          /* messages */
	uint64_t batches;           /* publications of the producer index */
	uint64_t notified;          /* of these: the peer had asked for an event */
	uint64_t suppressed;        /* of these: it had not */
	uint64_t events;            /* events received while waiting */
	uint64_t spurious;          /* of these: nothing had come since the event before */
	uint64_t waits;             /* waits that found nothing at first */
	uint64_t spins;             /* of these: ended within the spin */
	uint64_t sleeps;            /* times this end slept */
};

#define PV_RING_STALE 1     /* the peer was not notified: the port's binding changed (PV_NOTIFY_STALE) */

/* Entries in n_bytes: the largest power of two that fits; 0 when none does or n_bytes is more than 16 pages. */
uint32_t pv_ring_entries(uint32_t n_bytes, uint32_t entry_bytes);

/*
 * Front: make a new, empty ring in zeroed or stale memory; the peer must not be attached yet. `memory` is aligned to 8.
 * `start` is where the indexes begin: 0 for Xen, anything for a test of the wrap, because a back end that attaches
 * takes the index from the idle ring. 0; -EINVAL.
 */
int pv_ring_create(struct pv_ring *ring, void *memory, uint32_t n_bytes, uint32_t entry_bytes, uint32_t request_bytes,
		   uint32_t response_bytes, struct pv_port *port, uint32_t start);
/*
 * Join an existing ring that is idle, as back or (is_front) as a new front. 0; -EINVAL; -EBUSY when requests are
 * outstanding: which of them were answered out of order cannot be known, so only a new ring helps.
 */
int pv_ring_attach(struct pv_ring *ring, void *memory, uint32_t n_bytes, uint32_t entry_bytes, uint32_t request_bytes,
		   uint32_t response_bytes, struct pv_port *port, int is_front);

/* Messages that can be pushed now (front: free slots; back: requests taken and not answered). */
uint32_t pv_ring_room(const struct pv_ring *ring);
/* Requests that were pushed (front) or taken (back) and have no response yet. */
uint32_t pv_ring_outstanding(const struct pv_ring *ring);

/*
 * Copy up to n messages (packed, out_bytes each) into the ring, publish them, and notify the
 * peer if it asked for it. Result: how many | PV_RING_* << 32; -EPROTO dead; -ECHILD. A back end that pushes more
 * responses than requests it took gets -EINVAL and nothing is pushed.
 */
int64_t pv_ring_push(struct pv_ring *ring, const void *messages, uint32_t n);
/*
 * Copy up to max messages to `messages` (packed, in_bytes each). How many; -EPROTO dead; -ECHILD. The slots of taken
 * responses are the front's to fill again.
 */
int64_t pv_ring_take(struct pv_ring *ring, void *messages, uint32_t max);
/* The same after spinning up to spin_ns, at most PV_SPIN_SLICE_NS, for the first. */
int64_t pv_ring_take_spin(struct pv_ring *ring, void *messages, uint32_t max, int64_t spin_ns);

/* Whether there is something to take: 1 or 0; -EPROTO dead; -ECHILD. */
int pv_ring_poll(struct pv_ring *ring);
/* The same, and if there is nothing the peer notifies with the next message. Call it before sleeping elsewhere. */
int pv_ring_final_check(struct pv_ring *ring);
/*
 * Wait for something to take: spin, final check, sleep. PV_WAIT_EVENT when there is, else PV_WAIT_* as pv_wait on the
 * port's waiter; -EPROTO dead; -ECHILD; -EBADF the port is closed; -errno. Without a port it spins till the timeout.
 */
int pv_ring_wait(struct pv_ring *ring, int64_t spin_ns, int64_t timeout_ns);

#endif
