/* SPDX-License-Identifier: MIT */
/*
 * What callers ask of a block frontend, over the slots of pv_blkfront: transfers of any number of pieces are cut into
 * requests, neighbours become one request, data is copied (or not), and each caller hears when all of his is done.
 *
 * A transfer (`struct pv_blkqueue_io`) is a list of pieces; they go out in their order, after those of the transfers before,
 * as far as there are slots. Nothing overtakes what waits. Pieces that lie side by side on the disk, one after the other in
 * that order, become one request as long as it is not larger than the backend takes; reads and writes only, so nothing is
 * merged across a flush, a barrier or a discard. An error of a merged request is that of all its transfers.
 *
 * Memory is copied, unless it stands in a buffer: pages of the arena that the caller has and that are granted as long.
 *
 * Cancelling: after pv_blkqueue_forget nothing is written to the memory of that transfer, but into buffers, whose pages are
 * `in_flight` until they are answered.
 *
 * Threads: the owner's lock guards all calls. Addresses are those of memory the owner keeps until the transfer is done or
 * forgotten.
 */
#ifndef PV_BLKQUEUE_H
#define PV_BLKQUEUE_H

#include <stdint.h>
#include "pv_blkfront.h"

/* A transfer. The pieces are the owner's until the transfer is done or forgotten; their `gref` is not looked at. */
struct pv_blkqueue_io {
	const struct pv_blkfront_ask *pieces;
	uint32_t n_pieces;
	uint32_t next_piece;        /* to be sent */
	uint64_t next_byte;         /* of that piece */
	uint32_t n_shares;          /* in requests that are not answered */
	int32_t status;             /* of the first request that failed, else PV_BLKIF_RSP_OKAY */
	uint32_t done;              /* everything is answered */
	uint32_t announce;          /* put it on the list of `done` then */
	uint64_t number;            /* the owner's */
	uint64_t failed_offset;     /* its part of the request that failed, in bytes on the disk */
	uint64_t failed_length;
	uint32_t failed_operation;
	struct pv_blkqueue_io *next;   /* that waits, or is done, after it */
};

/* The part of a transfer that is in a request, or of one that was forgotten (io is NULL). */
struct pv_blkqueue_share {
	struct pv_blkqueue_io *io;
	uint64_t data;              /* address; 0: nothing is copied */
	uint64_t length;
	uint32_t next;              /* of the same request, or PV_BLKFRONT_NONE */
};

#define PV_BLKQUEUE_MAX_SHARES 256   /* of one request */

/* Private. The arrays are the owner's. */
struct pv_blkqueue {
	struct pv_blkfront *front;
	struct pv_blkqueue_share *shares;        /* n_shares, more than the slots of `front` */
	uint32_t *first_share;                   /* by slot */
	uint32_t *run_of_slot;                   /* by slot: buffer its data is in; 0: none */
	struct pv_blkif_response *responses;     /* by slot: scratch */
	struct pv_blkfront_answer *answers;      /* by slot: scratch */
	uint32_t n_shares;
	uint32_t free_share;
	uint32_t n_free_shares;
	uint32_t sector_bytes;                   /* every piece is a multiple of it */
	uint64_t disk_bytes;
	uint64_t max_bytes;                      /* of one request, whole pages */
	uint32_t merge;                          /* 0: each piece is a request of its own */
	uint32_t n_taken;                        /* responses that stand in `responses` for pv_blkqueue_complete */
	struct pv_blkqueue_io *first, *last;     /* that wait to be sent */
	struct pv_blkqueue_io *done_first, *done_last;
	uint64_t waiting;                        /* transfers that do */
	uint64_t buffers_start;                  /* address of the arena */
	uint32_t buffers_pages;                  /* of the arena; 0: no buffers */
	uint32_t buffers_gref;                   /* of its first page */
	uint32_t *run_of_page;                   /* by page: buffer that it belongs to, 1 to buffers_pages; 0: none */
	uint32_t *in_flight;                     /* by buffer: requests */
	uint64_t merged;                         /* pieces that went with the request of the one before */
};

/* All shares free, nothing waits. */
void pv_blkqueue_init(struct pv_blkqueue *queue);

/*
 * Pieces of one kind: the i-th at offsets[i], its memory at data + i * length (data 0: none), if each is inside the disk
 * and whole sectors. How many were; fewer than n: the next one is not.
 */
uint32_t pv_blkqueue_fill(const struct pv_blkqueue *queue, struct pv_blkfront_ask *pieces, const int64_t *offsets,
			  uint32_t n, uint64_t data, uint64_t length, uint32_t operation);

/* A buffer of n pages from page `first` of the arena on, under a number; 0 takes it away, when nothing of it is in flight. */
void pv_blkqueue_set_buffer(struct pv_blkqueue *queue, uint32_t first, uint32_t n, uint32_t number);

/* Put a transfer behind those that wait. `pieces`, `n_pieces` (at least 1), `announce` and `number` are set, the rest is 0. */
void pv_blkqueue_submit(struct pv_blkqueue *queue, struct pv_blkqueue_io *io);

/*
 * Send what waits, as far as there is room. As pv_ring_push; -EBUSY: nothing is in flight and the backend keeps the pages of
 * so many answered requests that the next one cannot be sent. After another negative errno those that were to be sent are
 * failed.
 */
int64_t pv_blkqueue_issue(struct pv_blkqueue *queue, struct pv_ring *ring);

/* Take what is answered into `responses`, n_taken: after spinning as pv_ring_take_spin. How many; negative as that. */
int64_t pv_blkqueue_take(struct pv_blkqueue *queue, struct pv_ring *ring, int64_t spin_ns);

/* Make of what was taken what it means for transfers. 1; 0: a response matches no request, as a short pv_blkfront_complete. */
int pv_blkqueue_complete(struct pv_blkqueue *queue);

/*
 * Send what waits, spin for answers, complete, and again, until `io` is done, nothing comes for spin_ns, or `most` requests
 * were answered; one call for a whole batch. 1 it is done; 0 not yet; | PV_RING_* << 32; -EBADMSG: a response matches no
 * request; else as pv_blkqueue_issue.
 */
int64_t pv_blkqueue_run(struct pv_blkqueue *queue, struct pv_ring *ring, const struct pv_blkqueue_io *io, int64_t spin_ns,
			uint32_t most);

#define PV_BLKQUEUE_LATER 0
#define PV_BLKQUEUE_ANSWERED 1
#define PV_BLKQUEUE_IN_FLIGHT 2
#define PV_BLKQUEUE_FAILED 3

/*
 * The short way for one read or write of at most 44 KiB when nothing else is under way: one call. PV_BLKQUEUE_ANSWERED: a
 * read's data is at byte `*at` of the slots' pages until the next call; PV_BLKQUEUE_FAILED: with status `*at`.
 * PV_BLKQUEUE_IN_FLIGHT: it is in slot `*at`, for pv_blkqueue_adopt; | PV_RING_* << 32. PV_BLKQUEUE_LATER: nothing was done,
 * it has to go the long way, or is not inside the disk. -EBADMSG as pv_blkqueue_run; else as pv_ring_push.
 */
int64_t pv_blkqueue_read(struct pv_blkqueue *queue, struct pv_ring *ring, int64_t offset, int64_t length, int64_t spin_ns,
			 int64_t *at);
int64_t pv_blkqueue_write(struct pv_blkqueue *queue, struct pv_ring *ring, int64_t offset, const uint8_t *data,
			  int64_t length, int64_t spin_ns, int64_t *at);
/* Make the request in that slot one of a transfer of one piece. */
void pv_blkqueue_adopt(struct pv_blkqueue *queue, uint32_t slot, struct pv_blkqueue_io *io);

/* Nothing of this transfer is sent any more, and nothing is written to its memory. Harmless when it is done. */
void pv_blkqueue_forget(struct pv_blkqueue *queue, struct pv_blkqueue_io *io);

/* The next of the transfers that are done and were to be announced: its number; 0: there is none. */
uint64_t pv_blkqueue_next_done(struct pv_blkqueue *queue);

#endif
