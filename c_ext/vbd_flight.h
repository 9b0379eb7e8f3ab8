/* SPDX-License-Identifier: MIT */
/* Requests that are in flight together, for an engine whose disk is asked through io_uring. */
#ifndef VBD_FLIGHT_H
#define VBD_FLIGHT_H

#include <sys/uio.h>

#ifdef PV_LIBURING
#include <liburing.h>
#endif

#include "vbd_private.h"

enum vbd_state { VBD_FREE, VBD_BLOCKED, VBD_GOING };
enum vbd_step { VBD_FLUSH_BEFORE, VBD_WRITE, VBD_FLUSH_AFTER };  /* of a barrier */

struct vbd_io {
	struct pv_blkif_request request;
	struct pv_blkif_plan plan;
	struct pv_blkif_pool pool;
	struct iovec *pieces;
	uint32_t n_room;            /* of `pieces` */
	enum vbd_state state;
	enum vbd_step step;
	uint32_t blocked_by;        /* how many of those before it have to be done first */
	uint32_t abandoned;         /* 1: is not answered, because the engine stops */
	int error;                  /* what it has ended with */
	struct vbd_io *next_ended;
	uint64_t done;              /* bytes */
	struct vbd_io *next, *before;   /* in the order they came in; free ones by `next` */
};

struct vbd_uring {
	struct pv_vbd_engine *engine;
#ifdef PV_LIBURING
	struct io_uring ring;
#endif
	struct vbd_io **ios;            /* all that were ever needed */
	uint32_t n_ios, n_max;
	struct vbd_io *free;
	struct vbd_io *first, *last;    /* not done yet, the oldest first */
	struct vbd_io *ended;           /* of these: over, and not settled */
	uint32_t n_going, n_blocked;
	uint32_t n_changing;        /* of both: writes, discards, barriers */
	uint32_t fixed;             /* 1: the guest's pages are registered with the kernel */
	uint32_t n_done;            /* responses that were not pushed yet */
	uint32_t n_refused;         /* of these: refused */
	struct pv_blkif_response *responses;
};

/* How many of `wanted` can be taken now; the free list has as many. */
uint32_t vbd_flight_room(struct vbd_uring *uring, uint32_t wanted);
void vbd_flight_free(struct vbd_uring *uring);
/* Whether a request writes. */
int vbd_is_changing(const struct vbd_io *io);
/* Whether one has to wait for the other. */
int vbd_conflict(const struct vbd_io *one, const struct vbd_io *other);
/* It is in flight, behind all others; `blocked_by` says how many have to be done first. */
void vbd_flight_add(struct vbd_uring *uring, struct vbd_io *io);
/* It is not any more; `next` is left as it was. */
void vbd_flight_take_out(struct vbd_uring *uring, struct vbd_io *io);
/* Unmap its pages and make its response, unless it is abandoned; it is free. */
void vbd_flight_answer(struct vbd_uring *uring, struct vbd_io *io);

#endif
