/* SPDX-License-Identifier: MIT */
/* What the files of pv_blkdisk.h share. */
#ifndef BLKDISK_PRIVATE_H
#define BLKDISK_PRIVATE_H

#include <pthread.h>

#include "pv_blkdisk.h"
#include "pv_blkfront.h"

/* A request and the caller that waits for it, on whose stack it stands. */
struct call {
	struct pv_blkfront_ask ask;
	uint8_t *into;               /* of a read */
	struct call *next;           /* in the queue of those that wait for slots */
	struct call *parked_next;    /* in the list of those that sleep */
	struct call *parked_before;
	pthread_cond_t wake;
	int parked;
	int done;
	int status;                  /* PV_BLKIF_RSP_* */
};

struct pv_blkdisk {
	pthread_mutex_t lock;        /* guards all of it; not held while a caller watches the ring */
	pthread_cond_t changed;      /* `watching` has ended, or the disk has become ready */
	struct pv_front *front;
	struct pv_ring *ring;        /* requests may be sent; NULL: paused */
	struct pv_blkfront slots;
	struct pv_blkif_counters counters;
	struct pv_blkif_response *responses;
	struct pv_blkfront_answer *answers;
	struct call **calls;         /* by slot; NULL: its caller has gone */
	struct call *first_queued;   /* calls that wait for slots, in order */
	struct call *last_queued;
	struct call *parked;
	uint8_t *zeroes;             /* of one request */
	struct pv_blkdisk_shape shape;
	int connected;               /* once */
	int watching;                /* a caller watches the ring, for all of them */
	int error;                   /* errno; 0: none */
	int64_t spin_ns;             /* of pv_ring_take_spin */
	uint64_t reissued;
	uint64_t sleeps;
	pv_blkdisk_complain *complain;
	void *context;
};

#endif
