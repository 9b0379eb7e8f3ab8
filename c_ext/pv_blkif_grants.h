/* SPDX-License-Identifier: MIT */
/*
 * blkif: pages of a frontend that stay mapped between requests (persistent grants).
 *
 * A frontend with "feature-persistent" uses the same references again and again, and leaves them granted: what a backend
 * has mapped once it need not map again. One cache for each ring. It is bounded: when it is full, the least recently used
 * are let go; when all are in use, a page is mapped for one request only. What it says of a page is decided from its own
 * memory alone: whatever a frontend makes of an entry meanwhile, the page stays the one that was pinned.
 *
 * Numbers and rules are those of Linux' xen-blkback; Xen public/io/blkif.h. Threads: one at a time. Nothing here waits.
 */
#ifndef PV_BLKIF_GRANTS_H
#define PV_BLKIF_GRANTS_H

#include <stdint.h>
#include "pv_grant.h"

#define PV_BLKIF_PERSISTENT_GRANTS 1056  /* blkback's max_persistent_grants */
#define PV_BLKIF_PERSISTENT_MOST 65534   /* a place is 16 bits */
#define PV_BLKIF_UNUSED_MS 60000         /* blkback's persistent_grant_unused_seconds */
#define PV_BLKIF_AGE_MS 100              /* between two looks for such, at least */
#define PV_BLKIF_PURGE_PERCENT 5         /* let go at once when there is no place */

/* A cached reference, or a free place. Private. */
struct pv_blkif_cached {
	uint64_t offset;         /* of its page: bytes into the mapper's data */
	uint32_t gref;
	uint32_t used_ms;        /* when its last use ended */
	uint16_t next;           /* of the idle ones the next recently used; of the free ones any other; 0: none */
	uint16_t previous;
	uint8_t in_use;
	uint8_t read_only;       /* pinned for reading only */
	uint8_t pad[2];
};

/* Private. */
struct pv_blkif_grants {
	struct pv_mapper *mapper;
	struct pv_blkif_cached *places;  /* 1 to max; 0 is the end of the list of idle ones, both ways */
	uint16_t *by_page;               /* the place of each page of the chunk; 0: none. No hash: nothing to collide */
	uint32_t max;
	uint32_t unused_ms;              /* 0: nothing ages */
	uint32_t now_ms;                 /* at the last look at the clock, CLOCK_MONOTONIC modulo 2^32 */
	uint32_t aged_ms;                /* when what is old was let go */
	uint32_t cached;                 /* places with a page, now */
	uint32_t in_use;                 /* of these */
	uint16_t free;                   /* first free place */
	uint16_t pad;
	uint32_t pad2;
	uint64_t hits;
	uint64_t misses;
	uint64_t purged;                 /* let go because there were too many */
	uint64_t aged;                   /* let go because nobody had used them for long */
	uint64_t transient;              /* mapped for one use, because all places were in use */
};

/* For at most `max` pages of a mapper, which stays the caller's. 0; -EINVAL for a max that cannot be; -ENOMEM. */
int pv_blkif_grants_init(struct pv_blkif_grants *grants, struct pv_mapper *mapper, uint32_t max, uint32_t unused_ms);

/* Unmap all, also what is in use: nobody may touch these pages any more. Harmless when repeated, and after a failed init. */
void pv_blkif_grants_free(struct pv_blkif_grants *grants);

/*
 * The page of a reference, mapped until pv_blkif_grants_give at least. 0, or PV_BLKIF_REFUSED_GRANT when it cannot be
 * mapped, PV_BLKIF_REFUSED_IN_USE when another request is using it. *place is for pv_blkif_grants_give.
 */
uint16_t pv_blkif_grants_take(struct pv_blkif_grants *grants, uint32_t gref, int read_only, uint64_t *offset, uint16_t *place);

/* The end of one use, with what was given to and came from pv_blkif_grants_take. */
void pv_blkif_grants_give(struct pv_blkif_grants *grants, uint32_t gref, int read_only, uint16_t place);

/* Let go of what nobody has used for unused_ms at the time `now_ms`; how many. */
uint32_t pv_blkif_grants_age(struct pv_blkif_grants *grants, uint32_t now_ms);

/* Look at the clock, and age when that is due: once a batch. So nothing ages, and nothing wakes up, while no I/O flows. */
void pv_blkif_grants_tick(struct pv_blkif_grants *grants);

#endif
