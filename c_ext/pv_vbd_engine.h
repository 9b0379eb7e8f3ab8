/* SPDX-License-Identifier: MIT */
/*
 * The data path of a block backend in a thread of its own: take -> private copy -> validate -> grants -> disk -> answer,
 * a batch at a time, for one connected ring.
 *
 * Discovery, negotiation and policy are the caller's. What it has to know of (a peer that broke the protocol, a binding
 * that has changed, an operation that the disk does not have) stands on a *board* that all engines of a process share and
 * one thread of the caller reads.
 *
 * Trust: requests are looked at in private copies only; the limits, the disk and the counters are private memory.
 *
 * Threads: each call from any; start, stop and free of one engine from one at a time. The engine's thread has all signals
 * blocked. Fork: a child's calls do nothing, and its copy of an engine cannot be freed.
 */
#ifndef PV_VBD_ENGINE_H
#define PV_VBD_ENGINE_H

#include <stdint.h>

#include "pv_blkif.h"
#include "pv_ring.h"
#include "pv_vbd_throttle.h"

#define PV_VBD_BATCH 16                 /* requests answered at once, at most */
#define PV_VBD_REFUSAL_PAUSE_NS 1000000 /* after a batch with a request that is none: no guest has more than 1000 a second */

/* `what` of a notice. */
#define PV_VBD_PEER 1           /* the ring is dead: the engine has ended */
#define PV_VBD_FAILED 2         /* the engine has ended with `failure` */
#define PV_VBD_STALE 4          /* a notification waits for its binding to be asked for (PV_NOTIFY_STALE) */
#define PV_VBD_UNSUPPORTED 8    /* the disk does not have the operations in `unsupported` */
#define PV_VBD_DISK 16          /* the disk has failed with `error`, an errno that it had not failed with before */
#define PV_VBD_REFUSED 32       /* a request was refused for `reason`, one that no request was refused for before */

struct pv_vbd_notice {
	uint64_t token;         /* of the engine */
	uint32_t what;          /* PV_VBD_*, together */
	int32_t failure;        /* a positive errno */
	int32_t error;
	uint32_t unsupported;   /* 1 << operation */
	uint32_t reason;        /* PV_BLKIF_REFUSED_* */
	uint32_t pad;
};

struct pv_vbd_board;
struct pv_vbd_engine;

/* What an engine serves, and how. All of it stays the caller's, and in place, until the engine has stopped. */
struct pv_vbd_setup {
	struct pv_ring *ring;           /* a back end, with a port */
	struct pv_mapper *mapper;
	struct pv_vbd_board *board;
	uint64_t token;                 /* names the engine in notices */
	struct pv_blkif_limits limits;
	uint8_t *memory;                /* as in pv_blkif_batch */
	uint64_t memory_bytes;
	int32_t fd;
	uint32_t kind;                  /* PV_BLKIF_DISK_* */
	uint32_t uring;                 /* 1: FILE, DEVICE: by io_uring, where the kernel allows it */
	uint32_t direct;                /* 1: with that: the file passes the page cache by */
	uint32_t x86_32;                /* 1: requests have the layout of that ABI */
	uint32_t batch;                 /* 0: PV_VBD_BATCH */
	struct pv_vbd_throttle *throttle; /* of the disk; NULL: it has no limits, ever */
	struct pv_blkif_grants *grants; /* of the mapper, where grants are persistent; else NULL */
	int64_t take_spin_ns;           /* as of pv_ring_take_spin */
	int64_t wait_spin_ns;           /* as of pv_ring_wait, which follows it */
	struct pv_blkif_counters *counters;
};

/* NULL: no memory. */
struct pv_vbd_board *pv_vbd_board_new(void);
/* Nobody may wait on it, and no engine use it. */
void pv_vbd_board_free(struct pv_vbd_board *board);
/* Sleep until an engine has something to say: 1, and it is forgotten here. 0: pv_vbd_board_close was called. */
int pv_vbd_board_wait(struct pv_vbd_board *board, struct pv_vbd_notice *notice);
/* From now on nobody waits. */
void pv_vbd_board_close(struct pv_vbd_board *board);

/* 0 and *engine; -ENOMEM. */
int pv_vbd_engine_new(const struct pv_vbd_setup *setup, struct pv_vbd_engine **engine);
/* Begin serving, once. 0; -errno of the thread that could not be made. */
int pv_vbd_engine_start(struct pv_vbd_engine *engine);
/*
 * Finish what was taken, then end: 0, and nothing is in use any more; also when it has ended, or never began. -ETIMEDOUT:
 * the disk is still at it after timeout_ns; call again. -ECHILD.
 */
int pv_vbd_engine_stop(struct pv_vbd_engine *engine, int64_t timeout_ns);
/* NULL: nothing to do. One that has not stopped is left as it is, for ever. */
void pv_vbd_engine_free(struct pv_vbd_engine *engine);
/* For the batches from now on. */
void pv_vbd_engine_set_limits(struct pv_vbd_engine *engine, const struct pv_blkif_limits *limits);
/* 1: the disk is asked through io_uring; 0: by blocking calls; -errno: by these, as the kernel refuses the other. */
int pv_vbd_engine_uring(const struct pv_vbd_engine *engine);
/* The version of liburing in this core; empty: none, so that disks are asked by blocking calls alone. */
const char *pv_vbd_liburing(void);
/* Times it has found something in the ring. */
uint64_t pv_vbd_engine_batches(const struct pv_vbd_engine *engine);

#endif
