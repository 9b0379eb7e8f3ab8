/* SPDX-License-Identifier: MIT */
/*
 * blkif: the messages, and what a block backend does with a batch of requests that were copied to private memory.
 *
 * Validation follows Xen public/io/blkif.h and what Linux' blkback refuses; sectors are 512 bytes everywhere.
 */
#ifndef PV_BLKIF_H
#define PV_BLKIF_H

#include <stdint.h>
#include "pv_blkif_grants.h"
#include "pv_grant.h"
#include "pv_ring.h"

#define PV_BLKIF_MAX_SEGMENTS 11
#define PV_BLKIF_INDIRECT_PAGES 8            /* of segments, in an indirect request */
#define PV_BLKIF_INDIRECT_PAGE_SEGMENTS 512  /* in each */
#define PV_BLKIF_MAX_INDIRECT_SEGMENTS 4096

#define PV_BLKIF_OP_READ 0
#define PV_BLKIF_OP_WRITE 1
#define PV_BLKIF_OP_WRITE_BARRIER 2
#define PV_BLKIF_OP_FLUSH_DISKCACHE 3
#define PV_BLKIF_OP_DISCARD 5
#define PV_BLKIF_OP_INDIRECT 6

#define PV_BLKIF_DISCARD_SECURE 1        /* `flag` of a discard */

#define PV_BLKIF_RSP_OKAY 0
#define PV_BLKIF_RSP_ERROR -1
#define PV_BLKIF_RSP_EOPNOTSUPP -2

/* `status` of a plan that still needs the disk. Never a wire value. */
#define PV_BLKIF_PENDING 1

/* `reason` of a plan that was refused. */
#define PV_BLKIF_REFUSED_NOTHING 0
#define PV_BLKIF_REFUSED_OPERATION 1     /* unknown or not offered */
#define PV_BLKIF_REFUSED_SEGMENTS 2      /* nr_segments 0 (but for flushes and barriers) or above what was offered */
#define PV_BLKIF_REFUSED_BOUNDS 3        /* first_sect > last_sect, or last_sect above 7 */
#define PV_BLKIF_REFUSED_RANGE 4         /* beyond the end of the disk */
#define PV_BLKIF_REFUSED_ALIGNMENT 5     /* not on the disk's sector size */
#define PV_BLKIF_REFUSED_READ_ONLY 6
#define PV_BLKIF_REFUSED_GRANT 7         /* a grant could not be mapped */
#define PV_BLKIF_REFUSED_MEMORY 8        /* no memory for its segments */
#define PV_BLKIF_REFUSED_INDIRECT 9      /* indirect_op is neither a read nor a write */
#define PV_BLKIF_REFUSED_IN_USE 10       /* a persistent grant that another request is using */

struct pv_blkif_segment {
	uint32_t gref;
	uint8_t first_sect;
	uint8_t last_sect;
	uint16_t pad;
};

/* The x86_64 ABI: 112 bytes. */
struct pv_blkif_request {
	uint8_t operation;
	uint8_t nr_segments;
	uint16_t handle;
	uint32_t pad;
	uint64_t id;
	uint64_t sector;
	struct pv_blkif_segment seg[PV_BLKIF_MAX_SEGMENTS];
};

/* The same place in a ring, when `operation` is a discard. */
struct pv_blkif_discard {
	uint8_t operation;
	uint8_t flag;
	uint16_t handle;
	uint32_t pad;
	uint64_t id;
	uint64_t sector;
	uint64_t nr_sectors;
};

/* And when it is indirect: the segments stand in granted pages. */
struct pv_blkif_indirect {
	uint8_t operation;
	uint8_t indirect_op;
	uint16_t nr_segments;
	uint32_t pad;
	uint64_t id;
	uint64_t sector;
	uint16_t handle;
	uint16_t pad2;
	uint32_t indirect_grefs[PV_BLKIF_INDIRECT_PAGES];
	uint32_t pad3;
};

/* 16 bytes; every byte is written (XSA-216). */
struct pv_blkif_response {
	uint64_t id;
	uint8_t operation;
	uint8_t pad0;
	int16_t status;
	uint32_t pad1;
};

/* What a disk is and what was offered. The last ones are 1 or 0. */
struct pv_blkif_limits {
	uint64_t sectors;        /* of 512 bytes */
	uint32_t sector_size;    /* bytes */
	uint32_t max_indirect_segments;  /* at most 4096; 0: no INDIRECT */
	uint8_t read_only;
	uint8_t flush;
	uint8_t barrier;
	uint8_t discard;
	uint8_t discard_secure;
	uint8_t pad[3];
};

/* A piece of the mapper's data that is contiguous in memory. */
struct pv_blkif_extent {
	uint64_t offset;         /* bytes into the mapper's data */
	uint64_t length;         /* bytes */
};

/*
 * Segments and extents of all requests of a batch: a request with many of them takes no room from those with few. It
 * grows as requests need it. `pad` of a segment, which is a copy, says how its page is mapped: the place in `grants`, or 0.
 * Private.
 */
struct pv_blkif_pool {
	struct pv_blkif_extent *extents;
	struct pv_blkif_segment *segments;
	uint32_t used;
	uint32_t capacity;
	struct pv_blkif_grants *grants;  /* of the same mapper, where grants are persistent; else NULL. The owner's */
};

/* What one validated request asks of the disk. */
struct pv_blkif_plan {
	int16_t status;          /* PV_BLKIF_PENDING, or the response's status */
	uint16_t reason;         /* PV_BLKIF_REFUSED_* */
	uint16_t operation;      /* of an indirect request: what it is underneath */
	uint16_t secure;         /* 1: a discard after which nobody can read the old data */
	uint32_t first;          /* where its extents begin in the pool, and its segments */
	uint32_t n_extents;
	uint32_t pinned;         /* segments whose grants are mapped */
	uint32_t n_segments;
	uint64_t offset;         /* bytes on the disk */
	uint64_t length;         /* bytes */
};

/*
 * What one end of a queue has done: the backend as it answers (pv_blkif_finish), the frontend as it is answered. Words
 * only: they may stand where Dom0 looks at them (PV_LOOK_COUNTS_BLKIF).
 */
struct pv_blkif_counters {
	uint64_t reads;          /* back: answered requests that needed the disk; front: those answered well */
	uint64_t writes;         /* barriers, too */
	uint64_t barriers;       /* of the writes */
	uint64_t flushes;
	uint64_t discards;
	uint64_t read_bytes;     /* of those that succeeded */
	uint64_t written_bytes;
	uint64_t discarded_bytes;
	uint64_t copied_bytes;   /* of these: copied by this end, not by the kernel and not left where they are */
	uint64_t errors;         /* requests the disk failed; front: answered with an error */
	uint64_t refused;        /* back: requests that failed validation, ... */
	uint64_t no_memory;      /* ...of them for lack of memory */
};

/* Room for `segments` at first, and no persistent grants. 0 or -ENOMEM. */
int pv_blkif_pool_init(struct pv_blkif_pool *pool, uint32_t segments);
void pv_blkif_pool_free(struct pv_blkif_pool *pool);

/* Add what a batch has done, a word at a time: other threads and Dom0 see no torn value. One thread adds. */
void pv_blkif_count(struct pv_blkif_counters *counters, const struct pv_blkif_counters *more);

/* n requests of the x86_32 ABI (108 bytes each, back to back) in the one form that everything here knows. */
void pv_blkif_from_x86_32(const uint8_t *wire, struct pv_blkif_request *requests, uint32_t n);

/*
 * Validate n requests and map their grants. A request that fails has its grants unmapped again and its final status set;
 * the others get PV_BLKIF_PENDING. How many are pending. The segments of an indirect request are copied before anything is
 * made of them. The pool is emptied first.
 */
uint32_t pv_blkif_prepare(struct pv_mapper *mapper, const struct pv_blkif_limits *limits,
			  const struct pv_blkif_request *requests, uint32_t n, struct pv_blkif_plan *plans,
			  struct pv_blkif_pool *pool);

/*
 * Unmap the grants of all n requests and write the responses, in order. A plan still pending becomes an error. `plans`,
 * `pool` and `requests` are those given to pv_blkif_prepare, from private memory.
 */
void pv_blkif_finish(struct pv_mapper *mapper, const struct pv_blkif_request *requests, struct pv_blkif_plan *plans,
		     uint32_t n, const struct pv_blkif_pool *pool, struct pv_blkif_response *responses,
		     struct pv_blkif_counters *counters);

/* What a disk is that is served here. */
#define PV_BLKIF_DISK_FILE 0         /* `fd`: a file */
#define PV_BLKIF_DISK_DEVICE 1       /* `fd`: a block device */
#define PV_BLKIF_DISK_MEMORY 2       /* private memory of its own, mapped anonymously */
#define PV_BLKIF_DISK_NULL 3         /* keeps nothing, and gives nothing: the guest's pages stay as they are */
#define PV_BLKIF_DISK_ZERO 4         /* keeps nothing, and reads as zeroes */

/* A backend's batch and the disk behind it. Private. */
struct pv_blkif_batch {
	struct pv_mapper *mapper;
	struct pv_blkif_limits limits;
	struct pv_blkif_counters *counters;
	struct pv_blkif_pool pool;
	const struct pv_blkif_request *requests;
	struct pv_blkif_plan *plans;
	struct pv_blkif_response *responses;
	uint8_t *disk;           /* MEMORY: disk_bytes of it */
	uint64_t disk_bytes;
	int32_t fd;              /* FILE, DEVICE: open */
	uint32_t kind;           /* PV_BLKIF_DISK_* */
	int32_t error;           /* out: the first errno of the disk, or 0 */
	uint32_t unsupported;    /* out: operations the disk has said it has not, 1 << operation */
};

/*
 * Do one validated request: 0 or a positive errno; EOPNOTSUPP: the disk does not have the operation. Files and devices are
 * read and written with preadv and pwritev, flushed with fdatasync; a file that ends early is EIO, and so is memory. A
 * discard makes a hole in a file, is the device's own, and gives whole pages of memory back; of a file and of memory what
 * was discarded reads as zeroes. Blocks as the file does.
 */
int pv_blkif_do(const struct pv_blkif_batch *batch, const struct pv_blkif_plan *plan);
/* What an errno of fdatasync means: EOPNOTSUPP for the several ways in which files say that they cannot be flushed. */
int pv_blkif_flush_error(int error);
/* What `error` of pv_blkif_do means for the status of a plan, `error` and `unsupported` of the batch. */
void pv_blkif_settle(struct pv_blkif_batch *batch, struct pv_blkif_plan *plan, int error);
/* Do all pending requests in order, and settle them. */
void pv_blkif_do_all(struct pv_blkif_batch *batch, uint32_t n);

#define PV_BLKIF_UNSERVED -1000000

/*
 * Prepare, do, finish and push n requests in one go. As pv_ring_push; PV_BLKIF_UNSERVED: they are prepared, and no more,
 * because there is a discard among them, which the caller's disk does in its own way.
 */
int64_t pv_blkif_serve(struct pv_blkif_batch *batch, struct pv_ring *ring, uint32_t n);

#endif
