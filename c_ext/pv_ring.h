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
#include "pv_spin.h"

#define PV_RING_HEADER_BYTES 64
#define PV_RING_MAX_BYTES 65536

/* The head of the shared memory; the entries follow. */
struct pv_ring_header {
	uint32_t req_prod;      /* front: requests before this one are visible */
	uint32_t req_event;     /* back: notify me when req_prod passes this */
	uint32_t rsp_prod;      /* back: responses before this one are visible */
	uint32_t rsp_event;     /* front: notify me when rsp_prod passes this */
	uint8_t pvt[40];        /* 0 */
	uint32_t front_cpu;     /* Xen: 0. With an asymmetric fence: 1 + the CPU on which that end waited last */
	uint32_t back_cpu;
};

/*
 * Who pays for "publish, then look whether the peer sleeps": both ends, with a barrier in every push; or the sleeper, with
 * membarrier(2), so that a push has none. The second needs a peer that does its part: for ends of equal trust that have
 * agreed on it before the first message. FULL is Xen's and works with everybody.
 */
#define PV_FENCE_FULL 0
#define PV_FENCE_PROCESS 1  /* both ends in one process */
#define PV_FENCE_HOST 2     /* both processes have called pv_fence_register(PV_FENCE_HOST) */

/* At which message an end that sleeps wants to be woken. */
#define PV_EVENT_NEXT 0     /* at the next one: RING_FINAL_CHECK */
#define PV_EVENT_HALF 1     /* front: after half of the responses that are outstanding */
#define PV_EVENT_RATE 2     /* front: after as many responses as come within a delay that grows with their rate */
#define PV_EVENT_WINDOW_NS 10000000

struct pv_ring;

/* Told of every batch of an end, by the thread that moves it. */
struct pv_ring_observer {
	/* n messages stand in the slots from prod on; the peer does not know of them yet. */
	void (*pushing)(struct pv_ring *ring, uint32_t n);
	/* n messages were copied out; their slots, from cons on, are still this end's. */
	void (*taking)(struct pv_ring *ring, const void *messages, uint32_t n);
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
	uint32_t fence;             /* PV_FENCE_*; never changes on a live ring */
	uint32_t prod;              /* next index to produce: req_prod_pvt or rsp_prod_pvt */
	uint32_t checked;           /* what was published before this has had its look at the peer's event index */
	uint32_t max_outstanding;   /* most requests without a response, seen by this end */
	uint64_t produced;          /* messages */
	uint64_t batches;           /* publications of the producer index */
	uint64_t notified;          /* of these: the peer had asked for an event */
	uint64_t suppressed;        /* of these: it had not */
	uint32_t cons;              /* next index to consume: rsp_cons or req_cons */
	uint32_t peer_prod_checked; /* the last peer index that was found right */
	uint32_t cons_at_event;     /* cons when the last event came */
	uint64_t consumed;          /* messages */
	uint64_t events;            /* events received while waiting */
	uint64_t spurious;          /* of these: nothing had come since the event before */
	uint64_t waits;             /* waits that found nothing at first */
	uint64_t spins;             /* of these: ended within the spin */
	uint64_t sleeps;            /* times this end slept */
	uint64_t heavy_fences;      /* calls of membarrier(2) */
	uint32_t event_policy;      /* PV_EVENT_* */
	uint32_t event_ahead;       /* RATE: messages to wait for at the rate of the last window */
	uint64_t event_threshold;   /* RATE: responses a second up to which each one wakes */
	int64_t event_delay_ns;     /* RATE: delay at the threshold */
	int64_t window_start_ns;
	uint64_t window_consumed;   /* `consumed` when the window began */
	struct pv_spin spin;        /* for spins of the learnt length */
	int64_t empty_since_ns;     /* when a spin began that found nothing... */
	uint32_t empty_cons;        /* ...at this index */
	uint32_t cpu;               /* what own_cpu was set to last */
	uint32_t *own_cpu;          /* shared, written here */
	const uint32_t *peer_cpu;   /* shared, written by the peer: a hint */
	const struct pv_ring_observer *observer;  /* NULL: nobody */
	uint32_t untold;            /* 1: PV_RING_STALE was returned; its owner clears it when the peer is notified */
};

/* A run of slots in shared memory. */
struct pv_ring_slots {
	uint8_t *first;             /* entry_bytes from one to the next */
	uint32_t index;             /* of the first in the ring: 0 to size - 1 */
	uint32_t n;
};

#define PV_RING_STALE 1     /* the peer was not notified: the port's binding changed (PV_NOTIFY_STALE) */
#define PV_RING_LEARNT_NS (-1)  /* as spin_ns: as long as pv_spin says */

/* Entries in n_bytes: the largest power of two that fits; 0 when none does or n_bytes is more than 16 pages. */
uint32_t pv_ring_entries(uint32_t n_bytes, uint32_t entry_bytes);

/*
 * Front: make a new, empty ring in zeroed or stale memory; the peer must not be attached yet. `memory` is aligned to 8.
 * `start` is where the indexes begin: 0 for Xen, anything for a test of the wrap, because a back end that attaches
 * takes the index from the idle ring. 0; -EINVAL. (SHARED_RING_INIT, FRONT_RING_INIT, XEN_FRONT_RING_INIT)
 */
int pv_ring_create(struct pv_ring *ring, void *memory, uint32_t n_bytes, uint32_t entry_bytes, uint32_t request_bytes,
		   uint32_t response_bytes, struct pv_port *port, uint32_t start);
/*
 * Join an existing ring that is idle, as back or (is_front) as a new front. 0; -EINVAL; -EBUSY when requests are
 * outstanding: which of them were answered out of order cannot be known, so only a new ring helps. (BACK_RING_INIT)
 */
int pv_ring_attach(struct pv_ring *ring, void *memory, uint32_t n_bytes, uint32_t entry_bytes, uint32_t request_bytes,
		   uint32_t response_bytes, struct pv_port *port, int is_front);
/* The same at an index that the caller remembers; -EBUSY unless the ring is idle there. (FRONT_, BACK_RING_ATTACH) */
int pv_ring_attach_at(struct pv_ring *ring, void *memory, uint32_t n_bytes, uint32_t entry_bytes, uint32_t request_bytes,
		      uint32_t response_bytes, struct pv_port *port, int is_front, uint32_t index);

/*
 * Have the kernel ready this process for a fence; done once a process, repeated calls cost nothing. 0; -EINVAL;
 * -EOPNOTSUPP or another -errno where the kernel refuses.
 */
int pv_fence_register(uint32_t fence);
/*
 * Choose the fence, right after the ring was made or joined and before any message. PROCESS where the kernel refuses it
 * means FULL, at both ends alike; HOST is an error then, because the peer counts on it. 0; -EBUSY when the ring has been
 * used; else as pv_fence_register.
 */
int pv_ring_set_fence(struct pv_ring *ring, uint32_t fence);
/*
 * When to be woken: PV_EVENT_*. RATE, like SPDK's: up to `threshold` responses a second each one wakes; above, the end
 * waits for what comes in delay_ns x rate / threshold. HALF and RATE never wait for more than is outstanding. They need
 * to know that: -EINVAL for a back end.
 */
int pv_ring_set_event_policy(struct pv_ring *ring, uint32_t policy, uint64_t threshold, int64_t delay_ns);

/* Messages that can be pushed now (front: free slots; back: requests taken and not answered). (RING_FREE_REQUESTS) */
uint32_t pv_ring_room(const struct pv_ring *ring);
/* 1 when there is no room. (RING_FULL) */
int pv_ring_full(const struct pv_ring *ring);
/* Requests that were pushed (front) or taken (back) and have no response yet. */
uint32_t pv_ring_outstanding(const struct pv_ring *ring);
/* What can be taken now; -EPROTO dead; -ECHILD. (XEN_RING_NR_UNCONSUMED_REQUESTS, _RESPONSES) */
int64_t pv_ring_unconsumed(struct pv_ring *ring);
/* Back: 1 when a request at `index` would pass the ring: the end of a loop. (RING_REQUEST_CONS_OVERFLOW) */
int pv_ring_cons_overflow(const struct pv_ring *ring, uint32_t index);
/*
 * 1 when the peer's producer cannot stand at `index` (RING_REQUEST_, RING_RESPONSE_PROD_OVERFLOW, the latter held to the
 * requests that were pushed, too). Taking checks it anyway.
 */
int pv_ring_prod_overflow(const struct pv_ring *ring, uint32_t index);

/*
 * Copy up to n messages (packed, out_bytes each) into the ring, publish them, and notify the
 * peer if it asked for it. Result: how many | PV_RING_* << 32; -EPROTO dead; -ECHILD. A back end that pushes more
 * responses than requests it took gets -EINVAL and nothing is pushed. (RING_PUSH_*_AND_CHECK_NOTIFY)
 */
int64_t pv_ring_push(struct pv_ring *ring, const void *messages, uint32_t n);
/*
 * The same without looking whether the peer sleeps (RING_PUSH_*): more will follow. The next push, or pv_ring_notify,
 * looks for all of them.
 */
int64_t pv_ring_push_quiet(struct pv_ring *ring, const void *messages, uint32_t n);
/* Notify the peer if it asked for any message that was pushed quietly. As pv_ring_push of none. */
int64_t pv_ring_notify(struct pv_ring *ring);
/*
 * In place: up to max free slots from the next one on, as far as they lie side by side; the caller fills them and
 * commits. The slots are shared memory: write, never read back. 0; -EPROTO; -ECHILD.
 */
int pv_ring_reserve(struct pv_ring *ring, uint32_t max, struct pv_ring_slots *slots);
/* Push what stands in the first n slots that pv_ring_reserve gave. As pv_ring_push; -EINVAL for more than there is room. */
int64_t pv_ring_commit(struct pv_ring *ring, uint32_t n);

/*
 * Copy up to max messages to `messages` (packed, in_bytes each). How many; -EPROTO dead; -ECHILD. The slots of taken
 * responses are the front's to fill again.
 */
int64_t pv_ring_take(struct pv_ring *ring, void *messages, uint32_t max);
/* The same after spinning up to spin_ns, at most PV_SPIN_SLICE_NS, for the first; or PV_RING_LEARNT_NS. */
int64_t pv_ring_take_spin(struct pv_ring *ring, void *messages, uint32_t max, int64_t spin_ns);

/*
 * Front, with nothing outstanding: push one request and spin as pv_ring_take_spin for its response. 1: it came; 0: it is
 * still to come, for pv_ring_wait and pv_ring_take; 0 | PV_RING_* << 32: so it is, and the peer is to be told first. -EBUSY:
 * requests are outstanding, whose responses would come first; -EINVAL a back end; -EPROTO; -ECHILD.
 */
int64_t pv_ring_exchange(struct pv_ring *ring, const void *request, void *response, int64_t spin_ns);

/* Whether there is something to take: 1 or 0; -EPROTO dead; -ECHILD. (RING_HAS_UNCONSUMED_*) */
int pv_ring_poll(struct pv_ring *ring);
/*
 * The same, and if there is nothing the peer notifies with the message that the policy names. Call it before sleeping
 * elsewhere. Also -errno of membarrier(2). (RING_FINAL_CHECK_FOR_*)
 */
int pv_ring_final_check(struct pv_ring *ring);
/*
 * Wait for something to take: spin (or PV_RING_LEARNT_NS), final check, sleep. PV_WAIT_EVENT when there is, else PV_WAIT_*
 * as pv_wait on the port's waiter; -EPROTO dead; -ECHILD; -EBADF the port is closed; -errno. Without a port it spins till
 * the timeout.
 */
int pv_ring_wait(struct pv_ring *ring, int64_t spin_ns, int64_t timeout_ns);
/*
 * For who sleeps on other descriptors, too: final check, then senders ring. PV_WAIT_TIMEOUT: sleep until the epoll_fd of the
 * port's waiter is readable, or another one is; PV_WAIT_*: do not. Then disarm. -errno as pv_ring_wait: it is not armed.
 */
int pv_ring_arm(struct pv_ring *ring);
/* `rung`: the epoll_fd was readable. 0; -errno. */
int pv_ring_disarm(struct pv_ring *ring, int rung);

#endif
