/* SPDX-License-Identifier: MIT */
/*
 * A disk that blocks: reads, writes, flushes and discards over a block ring, from any number of threads.
 *
 * Each call issues its requests and waits for them. One of the waiting callers at a time watches the ring for all of them;
 * when it has its own answer, it hands the watch on. What is in flight when a backend goes away stays in the shadow, and
 * is sent again, oldest first, on the ring of the next one: callers see a pause, nothing else.
 *
 * Who follows xenstore tells it what happens: pv_blkdisk_make and _go for each backend, _pause when it is gone.
 *
 * Threads: calls that move data and pv_blkdisk_shape_now from any; the others from one at a time. Fork: a child must not use it.
 */
#ifndef PV_BLKDISK_H
#define PV_BLKDISK_H

#include <stdint.h>

#include "pv_front.h"

struct pv_blkdisk;

/* What the disk is and what its backend takes. */
struct pv_blkdisk_shape {
	uint64_t size;               /* bytes */
	uint32_t sector;             /* bytes: offsets and lengths are multiples of it */
	uint32_t physical_sector;    /* bytes */
	uint32_t max_request;        /* bytes; longer transfers are several requests */
	uint32_t read_only;          /* 1 or 0, as the rest */
	uint32_t flush;
	uint32_t barrier;
	uint32_t discard;
};

/* What the requests came to. */
struct pv_blkdisk_counters {
	uint64_t reads;              /* requests answered well */
	uint64_t writes;
	uint64_t flushes;
	uint64_t discards;
	uint64_t errors;             /* answered with an error */
	uint64_t in_flight;
	uint64_t reissued;           /* sent once more, to another backend */
	uint64_t sleeps;             /* of the callers that watched the ring */
};

/* Called by a thread that has met a backend that breaks the protocol; nothing is sent to that one any more. */
typedef void pv_blkdisk_complain(void *context, const char *text);

/*
 * Over a connected broker socket, which is the disk's from then on, also when it fails: NULL with *error a negative errno,
 * as pv_front_open.
 */
struct pv_blkdisk *pv_blkdisk_open(int broker_fd, pv_blkdisk_complain *complain, void *context, int *error);
/* No thread may be inside a call: pv_blkdisk_fail, and let them return. */
void pv_blkdisk_close(struct pv_blkdisk *disk);

/* A new ring and port for a backend, while paused. As pv_front_make; the first one decides how large the ring is. */
int pv_blkdisk_make(struct pv_blkdisk *disk, uint32_t backend, uint32_t ring_order, int64_t max_spin_ns,
		    struct pv_front_keys *keys);
/*
 * The backend is connected: send again what is in flight, and go on. 0; -EINVAL for a shape that cannot be or that does
 * not take what is in flight; -ENOTCONN without a ring; or as pv_blkfront_reissue.
 */
int pv_blkdisk_go(struct pv_blkdisk *disk, const struct pv_blkdisk_shape *shape);
/* The backend has said something new of its disk. 0; -EINVAL. */
int pv_blkdisk_reshape(struct pv_blkdisk *disk, const struct pv_blkdisk_shape *shape);
/* The backend is gone: when this returns nobody uses the ring, which is let go. Callers wait. */
void pv_blkdisk_pause(struct pv_blkdisk *disk);
/* No request will be answered any more: all calls, also those that wait, return -error. */
void pv_blkdisk_fail(struct pv_blkdisk *disk, int error);

/* Wait until the disk was connected once. 0, or what pv_blkdisk_fail said. */
int pv_blkdisk_await(struct pv_blkdisk *disk);
void pv_blkdisk_shape_now(struct pv_blkdisk *disk, struct pv_blkdisk_shape *shape);
void pv_blkdisk_count(struct pv_blkdisk *disk, struct pv_blkdisk_counters *counters);

/*
 * Move bytes. 0; -EINVAL outside of the disk or not in whole sectors; -EROFS; -EIO the backend answered with an error;
 * -EOPNOTSUPP it does not have that, or answered so; -ENOMEM; or what pv_blkdisk_fail said. Writes of several callers to the same
 * place have no order.
 */
int pv_blkdisk_read(struct pv_blkdisk *disk, void *to, uint64_t length, uint64_t offset);
int pv_blkdisk_write(struct pv_blkdisk *disk, const void *from, uint64_t length, uint64_t offset);
int pv_blkdisk_zero(struct pv_blkdisk *disk, uint64_t length, uint64_t offset);
/* When it returns 0 all writes that had returned before are on stable storage, as far as the backend says. */
int pv_blkdisk_flush(struct pv_blkdisk *disk);
/* Bytes that are not needed: they read as zeroes or as they were. */
int pv_blkdisk_discard(struct pv_blkdisk *disk, uint64_t length, uint64_t offset);

#endif
