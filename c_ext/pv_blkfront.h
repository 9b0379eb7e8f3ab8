/* SPDX-License-Identifier: MIT */
/*
 * blkif: the request side of a frontend. Slots, their pages and grants, and the shadow of what is in flight.
 *
 * A slot owns eleven pages of an arena, so the buffers of a request are found by its id, which is the slot's number. A
 * request of more pages borrows those of other slots, and is indirect: its segments stand in the pages after its data. Or
 * the data is in pages of the caller's, which are granted as long as he has them: then nothing is copied, and one slot is
 * enough whatever the length. The shadow is private: a response is believed only as far as it matches it, and after a
 * backend is replaced the same requests are sent again on a new ring. A slot's pages are of one disk alone, and what
 * earlier requests have left in them beside the bytes of the present one is zeroed before it is granted (XSA-403).
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
	uint32_t gref;           /* of the caller's first page, its others follow; 0: the pages of the slots */
	uint32_t first_sector;   /* in the caller's first page: 0 to 7 */
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
#define PV_BLKFRONT_SLOT_PAGES 11        /* PV_BLKIF_MAX_SEGMENTS */
#define PV_BLKFRONT_PURGE_MS 10000        /* as Linux' blkfront */

/* What we remember of a request beside its message. */
struct pv_blkfront_slot {
	uint64_t sequence;       /* when it was issued; 0: not in flight */
	uint64_t length;         /* bytes */
	uint32_t n_pages;        /* granted: those with its data, then those with its segments */
	uint32_t gref;           /* of the caller's first page, where its data is; 0: in the slots' */
	uint32_t first_sector;   /* in that page */
	uint32_t next;           /* slot whose pages it uses, too, or PV_BLKFRONT_NONE */
	uint8_t filled[PV_BLKFRONT_SLOT_PAGES];  /* sectors of each own page that may have bytes of earlier requests */
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
	uint32_t n_in_flight;                /* those that are staged, too */
	uint32_t n_staged;
	uint32_t first_gref;                 /* of the first page */
	uint16_t backend;                    /* domid */
	uint16_t violation;                  /* PV_BLKFRONT_*, set when pv_blkfront_complete stops early */
	uint32_t persistent;                 /* 1: see pv_blkfront_persist */
	uint32_t purged_ms;                  /* when pv_blkfront_purge was last called by itself */
	uint32_t now_ms;                     /* pv_grant_now when the batch that is staged began */
	struct pv_blkif_response wrong;      /* the response that was wrong */
	uint64_t issued;                     /* requests so far */
	uint64_t granted_before;             /* pages of requests that did not have to be granted */
	struct pv_blkif_counters *counters;  /* the owner's */
};

/* Fill the arrays: all slots free. */
void pv_blkfront_init(struct pv_blkfront *front);

/*
 * With `persistent` 1, pages stay granted when a request is answered, for the backend to keep them mapped: both ends have
 * said "feature-persistent". 0: no longer, and those that nobody uses are taken back. To be called for each new backend
 * before pv_blkfront_reissue.
 */
void pv_blkfront_persist(struct pv_blkfront *front, int persistent);

/*
 * Take back the persistent grants of free slots that the backend does not have mapped (any more); how many. By itself
 * every PV_BLKFRONT_PURGE_MS while answers come.
 */
uint32_t pv_blkfront_purge(struct pv_blkfront *front);

/* How many slots a request of so many bytes takes. */
uint32_t pv_blkfront_slots_of(uint64_t length);

/*
 * Issue n requests, which take at most n_free slots: copy in the data of writes, grant the pages, push, notify. slots[i] gets the slot of
 * asks[i]. As pv_ring_push: n | PV_RING_* << 32, or a negative errno and nothing was issued.
 */
int64_t pv_blkfront_issue(struct pv_blkfront *front, struct pv_ring *ring, const struct pv_blkfront_ask *asks, uint32_t n,
			  uint32_t *slots);

/*
 * The same in steps. Stage takes slots for one request, fills it in and grants its pages; unless `ask` names its data, the
 * caller copies that in. 0; -ENOSPC, -EINVAL or the error of a grant: then it is not staged. Send pushes what was staged,
 * in order; but for staging and copying in, no other call comes before it. As pv_ring_push; with a negative errno (-ENOSPC:
 * the ring has less room) nothing was sent, and nothing is staged any more.
 */
int pv_blkfront_stage(struct pv_blkfront *front, const struct pv_blkfront_ask *ask, uint32_t *slot);
int64_t pv_blkfront_send(struct pv_blkfront *front, struct pv_ring *ring);

/* Copy into the pages of a staged request, or out of those of an answered read before anything else is staged: `length`
 * bytes from byte `at` of its data on, which is not in the caller's pages. */
void pv_blkfront_copy_in(const struct pv_blkfront *front, uint32_t slot, uint64_t at, const uint8_t *from, uint64_t length);
void pv_blkfront_copy_out(const struct pv_blkfront *front, uint32_t slot, uint64_t at, uint8_t *to, uint64_t length);
/* The whole of it. */
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
