/* SPDX-License-Identifier: MIT */
/*
 * blkif: the request side of a frontend. Slots, their pages and grants, and the shadow of what is in flight.
 *
 * A slot owns eleven pages of an arena, so the buffers of a request are found by its id, which is the slot's number. A
 * request of more pages borrows those of other slots, and is indirect: its segments stand in the pages after its data. The
 * shadow is private: a response is believed only as far as it matches it, and after a backend is replaced the same
 * requests are sent again on a new ring.
 *
 * Threads: the owner's lock guards all calls. Fork: the ring's calls fail in a child (-ECHILD).
 */
#ifndef PV_BLKFRONT_H
#define PV_BLKFRONT_H

#include <stdint.h>
#include "pv_blkif.h"
#include "pv_grant.h"
#include "pv_ring.h"

/* What a caller asks. */
struct pv_blkfront_ask {
	uint64_t offset;         /* bytes on the disk, a multiple of 512 */
	uint64_t data;           /* address of the bytes to write; 0 for all else */
	uint64_t length;         /* bytes, a multiple of 512; reads and writes: at most 4096 pages; a barrier: 0 to 11 */
	uint32_t operation;      /* PV_BLKIF_OP_*, but not INDIRECT */
	uint32_t flag;           /* of a discard */
};

struct pv_blkfront_answer {
	uint32_t slot;
	int32_t status;          /* PV_BLKIF_RSP_* */
};

/* `violation`: how a response was wrong. */
#define PV_BLKFRONT_UNKNOWN_ID 1
#define PV_BLKFRONT_WRONG_OPERATION 2
#define PV_BLKFRONT_UNKNOWN_STATUS 3

#define PV_BLKFRONT_NONE 0xFFFFFFFF

/* What we remember of a request beside its message. */
struct pv_blkfront_slot {
	uint64_t sequence;       /* when it was issued; 0: not in flight */
	uint64_t length;         /* bytes */
	uint32_t n_pages;        /* granted: those with its data, then those with its segments */
	uint32_t next;           /* slot whose pages it uses, too, or PV_BLKFRONT_NONE */
};

/* Private. The arrays have n_slots entries and are the owner's. */
struct pv_blkfront {
	struct pv_granter *granter;
	uint8_t *pages;                      /* n_slots times eleven pages of the arena */
	struct pv_blkif_request *shadow;     /* by slot */
	struct pv_blkif_request *batch;      /* scratch */
	struct pv_blkfront_slot *slots;      /* by slot */
	uint32_t *free;                      /* stack of free slots */
	uint32_t *held;                      /* first slots of answered requests with a page the backend has not let go */
	uint32_t n_slots;
	uint32_t n_free;
	uint32_t n_held;
	uint32_t n_in_flight;
	uint32_t first_gref;                 /* of the first page */
	uint16_t backend;                    /* domid */
	uint16_t violation;                  /* PV_BLKFRONT_*, set when pv_blkfront_complete stops early */
	struct pv_blkif_response wrong;      /* the response that was wrong */
	uint64_t issued;                     /* requests so far */
	uint64_t reads;                      /* answered well */
	uint64_t writes;                     /* barriers, too */
	uint64_t flushes;
	uint64_t discards;
	uint64_t read_bytes;
	uint64_t written_bytes;
	uint64_t errors;                     /* answered with an error */
};

/* Fill the arrays: all slots free. */
void pv_blkfront_init(struct pv_blkfront *front);

/* How many slots a request of so many bytes takes. */
uint32_t pv_blkfront_slots_of(uint64_t length);

/*
 * Issue n requests, which take at most n_free slots: copy in the data of writes, grant the pages, push, notify. slots[i] gets the slot of
 * asks[i]. As pv_ring_push: n | PV_RING_* << 32, or a negative errno and nothing was issued.
 */
int64_t pv_blkfront_issue(struct pv_blkfront *front, struct pv_ring *ring, const struct pv_blkfront_ask *asks, uint32_t n,
			  uint32_t *slots);

/* Copy out the first `length` bytes of an answered read, before anything else is issued. */
void pv_blkfront_gather(const struct pv_blkfront *front, uint32_t slot, uint8_t *to, uint64_t length);

/* Push everything in flight once more, oldest first, on a new ring; the pages are granted still. As pv_ring_push. */
int64_t pv_blkfront_reissue(struct pv_blkfront *front, struct pv_ring *ring);

/*
 * Match n responses (private copies) with the shadow, take the grants back, free the slots. How many were right, with
 * their answers; fewer than n means that the next one is in `wrong` and `violation` says why.
 */
uint32_t pv_blkfront_complete(struct pv_blkfront *front, const struct pv_blkif_response *responses, uint32_t n,
			      struct pv_blkfront_answer *answers);

/* Look again at the slots that the backend kept pages of; those it has let go of are free. How many are free now. */
uint32_t pv_blkfront_reclaim(struct pv_blkfront *front);

#define PV_BLKFRONT_IN_FLIGHT 0
#define PV_BLKFRONT_ANSWERED 1
#define PV_BLKFRONT_WRONG 2       /* as a short pv_blkfront_complete */

/*
 * The short way for a frontend with nothing in flight: issue one request and spin up to spin_ns for its answer.
 * PV_BLKFRONT_ANSWERED with *answer; PV_BLKFRONT_IN_FLIGHT: not answered yet; both | PV_RING_* << 32; PV_BLKFRONT_WRONG;
 * or a negative errno as pv_blkfront_issue.
 */
int64_t pv_blkfront_exchange(struct pv_blkfront *front, struct pv_ring *ring, const struct pv_blkfront_ask *ask,
			     int64_t spin_ns, uint32_t *slot, struct pv_blkfront_answer *answer);

#endif
