/* SPDX-License-Identifier: MIT */
/* What the files of the block backend's engine (pv_vbd_*.c) keep and call of each other. */
#ifndef VBD_PRIVATE_H
#define VBD_PRIVATE_H

#include <pthread.h>

#include "pv_vbd_engine.h"

#define VBD_ERRNOS 256

struct vbd_uring;

struct pv_vbd_engine {
	struct pv_blkif_batch batch;
	struct pv_ring *ring;
	struct pv_waiter *waiter;       /* of the ring's port */
	struct pv_blkif_request *requests;
	uint8_t *wire;                  /* x86_32: what was taken, before it is converted; else NULL */
	uint32_t capacity;              /* of a batch */
	uint32_t room;                  /* of that: for how many the throttle has room */
	struct pv_vbd_throttle *throttle;   /* of the disk, or NULL */
	uint32_t home;                  /* pv_home_mark */
	int64_t take_spin_ns, wait_spin_ns;
	uint64_t batches;               /* written by the thread, read by others */
	struct vbd_uring *uring;        /* NULL: the disk is asked by blocking calls */
	int32_t uring_error;            /* why it is, though io_uring was asked for: a positive errno */

	pthread_t thread;
	uint32_t started, ended;        /* by the calls of the owner */
	uint32_t stopping;              /* written by stop, read by the thread */

	pthread_mutex_t lock;           /* guards `wanted` */
	struct pv_blkif_limits wanted;
	uint32_t limits_changed;        /* there are limits in `wanted` that no batch has seen */

	struct pv_vbd_board *board;
	struct pv_vbd_notice notice;    /* under the board's lock */
	struct pv_vbd_engine *next;     /* under the board's lock: the next that has something to say */
	uint64_t errors_told[VBD_ERRNOS / 64];  /* errnos of the disk that the board knows of */
	uint32_t reasons_told;
};

/* -- pv_vbd_board.c */

/* Say something. What is said of the same kind and was not read yet is said once. */
void vbd_tell(struct pv_vbd_engine *engine, uint32_t what, const struct pv_vbd_notice *detail);
/* The engine says nothing any more. */
void vbd_hush(struct pv_vbd_engine *engine);

/* -- pv_vbd_serve.c */

/* Take, do and answer what there is, up to a batch: how many; 0 nothing came while it spun; -errno. */
int64_t vbd_serve(struct pv_vbd_engine *engine, int64_t spin_ns);
/* What there is, up to `most` and a batch, is in `requests`, and the limits are the newest. How many; -errno. */
int64_t vbd_take(struct pv_vbd_engine *engine, uint32_t most, int64_t spin_ns);
/* The first n plans are about to be done: the throttle is told. */
void vbd_charge(struct pv_vbd_engine *engine, const struct pv_blkif_plan *plans, uint32_t n);
/* n; -errno. */
int64_t vbd_push(struct pv_vbd_engine *engine, const struct pv_blkif_response *responses, uint32_t n);
/* What the disk has said since `error` and `unsupported` of the batch were cleared, as far as nobody knows of it. */
void vbd_tell_of_disk(struct pv_vbd_engine *engine);
/* A plan that may have been refused: the same of its reason. */
void vbd_note_refusal(struct pv_vbd_engine *engine, const struct pv_blkif_plan *plan);
void vbd_pause_after_refusals(void);

/* -- pv_vbd_engine.c */

/* Sleep until there is something in the ring or to look at: 0; -errno. */
int64_t vbd_rest(struct pv_vbd_engine *engine);

/* -- pv_vbd_uring.c: the same, of an engine whose disk is asked through io_uring */

/* `direct`: the file passes the page cache by. 0; -errno when the kernel refuses, or the core was built without. */
int vbd_uring_new(struct pv_vbd_engine *engine, int direct, struct vbd_uring **made);
/* Nothing may be in flight. NULL: nothing to do. */
void vbd_uring_free(struct vbd_uring *uring);
/* Take, start, answer what is done. How many were taken or answered; -errno. */
int64_t vbd_uring_serve(struct vbd_uring *uring, int64_t spin_ns);
/* Sleep until there is something to take or to answer: 0; -errno. */
int64_t vbd_uring_rest(struct vbd_uring *uring);
/* The same, while nothing may be taken. */
void vbd_uring_rest_throttled(struct vbd_uring *uring);
/* Answer what is in flight, or have the kernel leave it: when this returns it touches none of the guest's pages. */
void vbd_uring_drain(struct vbd_uring *uring);

#endif
