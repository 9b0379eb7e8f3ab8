/* SPDX-License-Identifier: MIT */
/*
 * A load on one queue of a network device: sends numbered frames in bursts, takes what comes and checks it, measures
 * round trips, or sends back what comes.
 *
 * A frame of a load: two addresses, type 0x88B5, its number (u64) and the time it was sent at (i64, ns), then bytes that
 * follow from its number. Frames of others are passed over.
 *
 * Threads: one a load. Two loads on one queue, one that sends and one that takes, may be of two threads.
 */
#ifndef PV_NETLOAD_H
#define PV_NETLOAD_H

#include <stdint.h>

#include "pv_histogram.h"
#include "pv_netfront.h"

#define PV_NETLOAD_SEND 0          /* as fast as they go */
#define PV_NETLOAD_TAKE 1
#define PV_NETLOAD_TRIP 2          /* a burst, and the next one when all of it is back */
#define PV_NETLOAD_REFLECT 3       /* what comes goes back to whom it came from */
#define PV_NETLOAD_HEADER 30       /* bytes of a frame that its number and time take, addresses included */
#define PV_NETLOAD_SIZES 8
#define PV_NETLOAD_BURST 256

struct pv_netload {
	uint32_t way;
	uint32_t burst;            /* frames, 1 to PV_NETLOAD_BURST */
	uint32_t n_sizes;
	uint32_t sizes[PV_NETLOAD_SIZES]; /* bytes of frames, in turn */
	uint8_t to[6];
	uint8_t from[6];
	uint32_t verify;           /* fill and check what is behind the header, too */
	int64_t length_ns;         /* of the load; of TAKE and REFLECT: without any frame, it ends before */
	int64_t spin_ns;           /* before it sleeps; 0: at once */
	uint32_t stop;             /* another thread sets it to 1, by pv_netload_stop */

	uint64_t sent;
	uint64_t sent_bytes;
	uint64_t taken;
	uint64_t taken_bytes;
	uint64_t misplaced;        /* of these: a number that is not larger than the one before */
	uint64_t missing;          /* numbers that were passed over */
	uint64_t wrong;            /* of these: with other bytes than they were sent with */
	uint64_t foreign;          /* frames of others */
	uint64_t bursts;
	uint64_t waits;            /* times that it waited for the other side */
	uint64_t next_number;      /* to be sent */
	uint64_t next_seen;        /* to be taken */
	int64_t seconds_ns;        /* what it took */
	uint64_t cpu_ns;
	struct pv_histogram *latency; /* TRIP: of each frame */

	struct pv_burst *out;      /* room for a burst of frames */
	struct pv_burst *in;
};

/* -EINVAL for what is no load; else 0 when it is over; -ETIMEDOUT: TRIP, a frame did not come back; as pv_netfront_*. */
int64_t pv_netload_run(struct pv_netload *load, struct pv_netfront *front);
/* From another thread: it ends soon. */
void pv_netload_stop(struct pv_netload *load);

#endif
