/* SPDX-License-Identifier: MIT */
/*
 * A load on a disk: keeps so many requests in flight over a block frontend, measures each, and on request checks every
 * byte it reads against what it wrote before.
 *
 * Nothing is copied out of the pages of a read, which is how a frontend is used that reads into its own I/O buffers; with
 * `verify` they are copied to private memory first and compared there. What is written is copied in, as of any caller.
 *
 * Threads: one, which has frontend and ring for itself meanwhile. Fork: as the frontend.
 */
#ifndef PV_BLKLOAD_H
#define PV_BLKLOAD_H

#include <stdint.h>
#include "pv_blkfront.h"
#include "pv_histogram.h"
#include "pv_pattern.h"

#define PV_BLKLOAD_DONE 0         /* everything is answered */
#define PV_BLKLOAD_PAUSED 1       /* run it again, on the same or on a new ring with the same requests in flight */
#define PV_BLKLOAD_WRONG 2        /* as a short pv_blkfront_complete */

/* A request in flight. */
struct pv_blkload_slot {
	int64_t issued_ns;
	uint64_t block;          /* its number in the region */
	uint32_t is_write;
	uint32_t generation;     /* `verify`: of what is written, or of what is to be read; 0: not known */
};

/* Private. The owner fills the first two parts and calls pv_blkload_begin. */
struct pv_blkload {
	uint64_t start;          /* bytes on the disk: first byte of the region, a multiple of 512 */
	uint64_t n_blocks;       /* of the region; with `verify` at least `depth` */
	uint32_t block_bytes;    /* of a request, a multiple of 512 */
	uint32_t depth;          /* requests in flight, at most */
	uint32_t refill;         /* requests that are sent together at least, while others are in flight; 1 to depth */
	uint32_t read_per_mille; /* how many of 1000 are reads */
	uint32_t is_random;      /* 0: one block after the other, and again from the first */
	uint32_t verify;
	uint64_t seed;           /* not 0; of the places, and of the patterns: those of another run are another's */
	uint64_t max_requests;   /* 0: no limit */
	int64_t length_ns;       /* 0: no limit. One of these is */
	int64_t spin_ns;         /* for pv_ring_take_spin */
	int64_t wait_spin_ns;    /* for pv_ring_wait, when that found nothing */
	int64_t timeout_ns;      /* without any answer: -ETIMEDOUT */
	int64_t slice_ns;        /* pv_blkload_run comes back so often: for signal handlers, and for who wants the ring */

	struct pv_blkfront_ask *asks;            /* depth */
	struct pv_blkload_slot *in_asks;         /* depth */
	uint32_t *chosen;                        /* depth */
	struct pv_blkif_response *responses;     /* depth */
	struct pv_blkfront_answer *answers;      /* depth */
	struct pv_blkload_slot *in_slots;        /* n_slots of the frontend */
	uint8_t *data;                           /* block_bytes; with `verify` depth times that */
	uint8_t *read;                           /* `verify`: block_bytes */
	uint32_t *generations;                   /* `verify`: n_blocks; 0 at first. They may be kept for a next load */
	struct pv_histogram *read_latency;
	struct pv_histogram *write_latency;

	uint64_t random;
	uint64_t position;       /* next block, one after the other */
	uint32_t in_flight;
	uint32_t stopping;       /* 1: nothing more is sent */
	int64_t start_ns;        /* 0: not started */
	int64_t answered_ns;     /* when the last answer came */
	uint64_t issued;
	uint64_t reads;          /* answered well */
	uint64_t writes;
	uint64_t errors;         /* answered with an error */
	uint64_t batches;        /* times that something was sent */
	uint64_t verified;       /* blocks that were as they were written */
	uint64_t unknown;        /* blocks that were read, but never written by this load */
	uint64_t wrong;          /* sectors that were not as they were written */
	struct pv_pattern_mismatch first_wrong;
	uint64_t cpu_ns;         /* CPU time of the thread in pv_blkload_run */
};

/* Ready it for a first pv_blkload_run. 0; -EINVAL for what cannot be run. */
int pv_blkload_begin(struct pv_blkload *load, const struct pv_blkfront *front);

/*
 * Run it for a while. PV_BLKLOAD_*; PV_BLKLOAD_PAUSED | PV_RING_* << 32: the backend is to be told first; a negative
 * errno: -ETIMEDOUT; -EBUSY the backend keeps pages of answered requests, so that none can be sent; as
 * pv_blkfront_issue, pv_ring_take and pv_ring_wait. Unless it is done requests are in flight still.
 */
int64_t pv_blkload_run(struct pv_blkload *load, struct pv_blkfront *front, struct pv_ring *ring);

#endif
