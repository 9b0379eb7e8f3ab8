/* SPDX-License-Identifier: MIT */
/*
 * blkif: the messages, and what a block backend does with a batch of requests that were copied to private memory.
 *
 * Validation follows Xen public/io/blkif.h and what Linux' blkback refuses; sectors are 512 bytes everywhere.
 */
#ifndef PV_BLKIF_H
#define PV_BLKIF_H

#include <stdint.h>
#include "pv_grant.h"
#include "pv_ring.h"

#define PV_BLKIF_MAX_SEGMENTS 11

#define PV_BLKIF_OP_READ 0
#define PV_BLKIF_OP_WRITE 1
#define PV_BLKIF_OP_WRITE_BARRIER 2
#define PV_BLKIF_OP_FLUSH_DISKCACHE 3
#define PV_BLKIF_OP_DISCARD 5
#define PV_BLKIF_OP_INDIRECT 6

#define PV_BLKIF_RSP_OKAY 0
#define PV_BLKIF_RSP_ERROR -1
#define PV_BLKIF_RSP_EOPNOTSUPP -2

/* `status` of a plan that still needs the disk. Never a wire value. */
#define PV_BLKIF_PENDING 1

/* `reason` of a plan that was refused. */
#define PV_BLKIF_REFUSED_NOTHING 0
#define PV_BLKIF_REFUSED_OPERATION 1     /* unknown or not offered */
#define PV_BLKIF_REFUSED_SEGMENTS 2      /* nr_segments 0 (except flush) or above 11 */
#define PV_BLKIF_REFUSED_BOUNDS 3        /* first_sect > last_sect, or last_sect above 7 */
#define PV_BLKIF_REFUSED_RANGE 4         /* beyond the end of the disk */
#define PV_BLKIF_REFUSED_ALIGNMENT 5     /* not on the disk's sector size */
#define PV_BLKIF_REFUSED_READ_ONLY 6
#define PV_BLKIF_REFUSED_GRANT 7         /* a grant could not be mapped */

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

/* 16 bytes; every byte is written (XSA-216). */
struct pv_blkif_response {
	uint64_t id;
	uint8_t operation;
	uint8_t pad0;
	int16_t status;
	uint32_t pad1;
};

struct pv_blkif_limits {
	uint64_t sectors;        /* of 512 bytes */
	uint32_t sector_size;    /* bytes */
	uint8_t read_only;
	uint8_t flush;           /* 1: FLUSH_DISKCACHE is offered */
	uint16_t pad;
};

/* A piece of the mapper's data that is contiguous in memory. */
struct pv_blkif_extent {
	uint64_t offset;         /* bytes into the mapper's data */
	uint64_t length;         /* bytes */
};

/* What one validated request asks of the disk. */
struct pv_blkif_plan {
	int16_t status;          /* PV_BLKIF_PENDING, or the response's status */
	uint16_t reason;         /* PV_BLKIF_REFUSED_* */
	uint16_t operation;
	uint16_t n_extents;
	uint32_t pinned;         /* segments whose grants are mapped */
	uint32_t pad;
	uint64_t offset;         /* bytes on the disk */
	uint64_t length;         /* bytes */
	struct pv_blkif_extent extents[PV_BLKIF_MAX_SEGMENTS];
};

/* What a backend has done. Private, counted in pv_blkif_finish. */
struct pv_blkif_counters {
	uint64_t reads;          /* answered requests that needed the disk */
	uint64_t writes;
	uint64_t flushes;
	uint64_t read_bytes;     /* of those that succeeded */
	uint64_t written_bytes;
	uint64_t refused;        /* requests that failed validation */
	uint64_t errors;         /* requests the disk failed */
};

/*
 * Validate n requests and map their grants. A request that fails has its grants unmapped again and its final status set;
 * the others get PV_BLKIF_PENDING. How many are pending.
 */
uint32_t pv_blkif_prepare(struct pv_mapper *mapper, const struct pv_blkif_limits *limits,
			  const struct pv_blkif_request *requests, uint32_t n, struct pv_blkif_plan *plans);

/* Serve the pending reads and writes from a disk that is plain memory, and flushes (nothing to do). */
void pv_blkif_copy(struct pv_mapper *mapper, struct pv_blkif_plan *plans, uint32_t n, uint8_t *disk, uint64_t disk_bytes);

/*
 * Serve the pending requests from a file or block device with preadv, pwritev and fdatasync, in order. The first errno
 * (positive), or 0; what failed is an error in its plan. A file that ends early is EIO. Blocks as the file does.
 */
int pv_blkif_transfer(struct pv_mapper *mapper, struct pv_blkif_plan *plans, uint32_t n, int fd);

/*
 * Unmap the grants of all n requests and write the responses, in order. A plan still pending becomes an error. `plans`
 * and `requests` are those given to pv_blkif_prepare, from private memory.
 */
void pv_blkif_finish(struct pv_mapper *mapper, const struct pv_blkif_request *requests, struct pv_blkif_plan *plans,
		     uint32_t n, struct pv_blkif_response *responses, struct pv_blkif_counters *counters);

/* A backend's batch and the disk behind it, for pv_blkif_serve. Private. */
struct pv_blkif_batch {
	struct pv_mapper *mapper;
	struct pv_blkif_limits limits;
	struct pv_blkif_counters counters;
	const struct pv_blkif_request *requests;
	struct pv_blkif_plan *plans;
	struct pv_blkif_response *responses;
	uint8_t *disk;           /* memory of disk_bytes, or NULL */
	uint64_t disk_bytes;
	int32_t fd;              /* an open file when disk is NULL */
	int32_t error;           /* out: the first errno of the file, or 0 */
};

/* Prepare, do, finish and push n requests in one go. As pv_ring_push. */
int64_t pv_blkif_serve(struct pv_blkif_batch *batch, struct pv_ring *ring, uint32_t n);

#endif
