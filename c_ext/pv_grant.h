/* SPDX-License-Identifier: MIT */
/*
 * Xen v1 grant entries over an arena chunk, both sides.
 *
 * A chunk is what one domain (the granter) shares with one other (the mapper): an object of grant entries, written by
 * both, and an object of data pages. Entry i of the chunk has reference `base + i`; a page's frame number (gfn) is its
 * reference. Membership is what the MMU enforces; the entries are the protocol of ownership inside it. So each side
 * decides from private copies: the granter of what it granted, the mapper of the frame and flags it pinned.
 *
 * Source: Xen public/grant_table.h (entry layout, GTF_*, GNTST_*), grant_table.c for the order of checks.
 */
#ifndef PV_GRANT_H
#define PV_GRANT_H

#include <stdint.h>

#define PV_GTF_PERMIT_ACCESS 1
#define PV_GTF_TYPE_MASK 3
#define PV_GTF_READONLY 4
#define PV_GTF_READING 8
#define PV_GTF_WRITING 16
#define PV_GTF_SUB_PAGE 256

#define PV_GNTST_OKAY 0
#define PV_GNTST_GENERAL_ERROR -1
#define PV_GNTST_BAD_DOMAIN -2
#define PV_GNTST_BAD_GNTREF -3
#define PV_GNTST_BAD_HANDLE -4
#define PV_GNTST_BAD_VIRT_ADDR -5
#define PV_GNTST_BAD_DEV_ADDR -6
#define PV_GNTST_NO_DEVICE_SPACE -7
#define PV_GNTST_PERMISSION_DENIED -8
#define PV_GNTST_BAD_PAGE -9
#define PV_GNTST_BAD_COPY_ARG -10
#define PV_GNTST_ADDRESS_TOO_BIG -11
#define PV_GNTST_EAGAIN -12
#define PV_GNTST_NO_SPACE -13

#define PV_MAPTRACK_MAGIC 0x544D5650   /* "PVMT" */

/* Shared. Always read and written as one 64-bit word, so that flags, domid and frame belong together. */
struct pv_grant_entry {
	uint16_t flags;
	uint16_t domid;
	uint32_t frame;
};

/*
 * Shared, behind the entries: what the granter says of a grant for whoever looks on, in milliseconds of CLOCK_MONOTONIC
 * to a tick, modulo 2^32. Nobody decides anything by it.
 */
struct pv_grant_note {
	uint32_t granted_ms;    /* 0: not known */
	uint32_t recalled_ms;   /* when the granter first wanted the page back and could not have it; 0: it did not */
};

/* What the granter remembers of an entry. Private. */
struct pv_grant_private {
	uint32_t frame;
	uint16_t flags;     /* 0: not granted */
	uint16_t domid;
	uint64_t turns;     /* how often it was granted or taken back; odd: it is granted */
};

/* Private: the granter's view of one chunk. Threads: any number, but one at a time for one reference. */
struct pv_granter {
	struct pv_grant_entry *entries;     /* shared, n_pages */
	struct pv_grant_private *granted;   /* private, n_pages */
	uint32_t base;
	uint32_t n_pages;
	uint64_t busy;                      /* revokes refused because the peer still uses the page */
	struct pv_grant_note *notes;        /* shared, n_pages; NULL: none are taken */
};

/*
 * One row a grant of the chunk, in an object made by the broker and shared by it and one mapping process. A row is written
 * before the entry's reading and writing bits are set and after they are cleared: whatever a dying process leaves set
 * in an entry, its row tells.
 */
struct pv_pin {
	uint16_t readers;
	uint16_t writers;
};

struct pv_maptrack {
	uint32_t magic;
	uint32_t version;
	uint32_t base;
	uint32_t n_pages;
	uint32_t pad[12];
	/* followed by struct pv_pin pins[n_pages] */
};

/* What the mapper pinned. Private. */
struct pv_pinned {
	uint32_t frame;
	uint16_t flags;
	uint16_t pad;
};

/*
 * Private: one mapping process' view of one chunk. Threads: any number. The reading and writing bits do not count
 * processes: two processes of a domain should not map the same reference.
 */
struct pv_mapper {
	struct pv_grant_entry *entries;     /* shared, n_pages */
	uint8_t *data;                      /* shared, n_pages * 4096 */
	struct pv_pin *pins;                /* shared with the broker only */
	struct pv_pinned *pinned;           /* private, n_pages */
	uint32_t base;
	uint32_t n_pages;
	uint16_t self;                      /* our domid: entries must name it */
	uint16_t read_only;                 /* 1: the data is mapped read-only, writable maps are refused */
	uint32_t lock;                      /* guards pins, pinned and the counters */
	uint32_t pinned_pages;              /* references pinned now */
	uint32_t max_handles;               /* maps that are not undone yet; 0: no limit */
	uint64_t maps;
	uint64_t unmaps;
	uint64_t copies;                    /* copy operations that succeeded */
	uint64_t copied_bytes;
	uint64_t failures;                  /* maps, unmaps and copies with a status other than okay */
};

/* 0; -EINVAL reference or frame outside the chunk; -EBUSY already granted. What was written to the page before is visible
 * to whoever maps it. */
int pv_grant_access(struct pv_granter *granter, uint32_t gref, uint16_t domid, uint32_t frame, int read_only);
/* The same, noted as of `ms`: what pv_grant_now said when a batch began (0 where nothing is noted). */
int pv_grant_access_at(struct pv_granter *granter, uint32_t gref, uint16_t domid, uint32_t frame, int read_only, uint32_t ms);
uint32_t pv_grant_now(const struct pv_granter *granter);
/* 0 revoked; -EBUSY still read or written by the peer, or the peer keeps changing the entry (the page must not be used for
 * anything else; try later); -EINVAL not granted. */
int pv_grant_revoke(struct pv_granter *granter, uint32_t gref);
/* The same for many pages, each granted under the reference that is its own. How many, fewer than n when the next one was
 * refused. */
uint32_t pv_grant_access_many(struct pv_granter *granter, const uint32_t *grefs, uint32_t n, uint16_t domid, int read_only);
/* How often pages were granted and taken back, over all of them. */
void pv_grant_counts(const struct pv_granter *granter, uint64_t *grants, uint64_t *revokes);
/* As pv_grant_expect, for the other end: references that will be taken back. */
void pv_grant_expect_back(const struct pv_granter *granter, uint32_t gref);
/* Take back as many as can be; the others are moved to the front of `grefs`. How many these are. */
uint32_t pv_grant_revoke_many(struct pv_granter *granter, uint32_t *grefs, uint32_t n);
/* The reading and writing bits now set; -EINVAL outside the chunk. A hint: the peer can write them. */
int pv_grant_in_use(struct pv_granter *granter, uint32_t gref);

/*
 * Pin one reference. GNTST status; on okay *frame_offset is the byte offset of the page in `data`. Checks in Xen's order:
 * NO_SPACE for max_handles; BAD_GNTREF outside the chunk; GENERAL_ERROR for too many pins of one reference (65,535), an entry that is not
 * permit_access for our domid, or a writable map of a read-only one; BAD_PAGE for a frame outside the chunk. At most 4
 * tries against a peer that keeps changing the entry, then GENERAL_ERROR. A reference that is pinned already keeps the
 * frame and flags of its first pin, whatever the entry says by now.
 */
int pv_grant_map(struct pv_mapper *mapper, uint32_t gref, int read_only, uint64_t *frame_offset);
/* Undo one pv_grant_map with the same read_only. BAD_HANDLE when it was not mapped so. */
int pv_grant_unmap(struct pv_mapper *mapper, uint32_t gref, int read_only);

/*
 * Many in a row: between `begin` and `end` (a lock, so nothing that waits stands there), the same two calls without what
 * each of them takes for itself. `expect` before them fetches the entries of all, which the peer's CPU has, at the same
 * time instead of one after the other; any `gref` will do.
 */
void pv_grant_begin(struct pv_mapper *mapper);
void pv_grant_end(struct pv_mapper *mapper);
int pv_grant_map_next(struct pv_mapper *mapper, uint32_t gref, int read_only, uint64_t *frame_offset);
int pv_grant_unmap_next(struct pv_mapper *mapper, uint32_t gref, int read_only);
void pv_grant_expect(const struct pv_mapper *mapper, uint32_t gref);

struct pv_grant_copy_op {
	uint32_t gref;
	uint16_t offset;        /* bytes into the page */
	uint16_t length;        /* bytes; offset + length <= 4096 */
	uint64_t local_offset;  /* bytes into the local buffer */
	int16_t status;         /* out: GNTST, of each operation, whatever happened to the others */
	uint16_t pad[3];
};
/*
 * Copy between granted pages and a private buffer (to_grant: 1 writes the pages). length 0 is okay and nothing else is
 * looked at; then the checks of pv_grant_map; then BAD_COPY_ARG for a range outside the page or the local buffer.
 *
 * A page that is written is pinned during its copy, and with its neighbours in the batch; those with one reference share
 * the pin. A page that is read is not, unless it is pinned already: its entry is looked at before and after, and when it has
 * changed the page is copied once more, with a pin. So a copy is okay only of a page that was granted, and never has a byte
 * of what the granter used the page for after it was revoked; the part of the local buffer that a copy was for may be
 * written even if it fails. One thing is left to the granter: if it takes a page back that a request in flight still names
 * and grants it again, under the same reference, with the same frame and rights, a copy under way cannot tell the two grants
 * apart, is okay, and may have bytes of both and of what the page held between. Who revokes only after the answer, as Xen's
 * frontends do, never sees that.
 */
void pv_grant_copy(struct pv_mapper *mapper, struct pv_grant_copy_op *ops, uint32_t n, uint8_t *local, uint64_t local_bytes, int to_grant);

struct pv_grant_copy_pair {
	uint32_t from_gref;
	uint32_t to_gref;
	uint16_t from_offset;   /* bytes into the page */
	uint16_t to_offset;
	uint16_t length;        /* bytes */
	int16_t status;         /* out: GNTST, of each operation */
};
/*
 * Copy from granted page to granted page, of two granters or of one (`from` and `to` the same). No lock is held while one
 * of the other is taken. As pv_grant_copy; first the source is checked, then the destination, then the ranges.
 */
void pv_grant_copy_between(struct pv_mapper *from, struct pv_mapper *to, struct pv_grant_copy_pair *ops, uint32_t n);

/*
 * The broker, for a mapping process that is gone: clear the reading and writing bits of what its rows say it had pinned,
 * but not what a row of one of the `n_others` other processes of that domain still holds. Returns the references cleared.
 * A lying row only changes bits in entries that its process could write itself.
 */
uint32_t pv_grant_release(
	struct pv_grant_entry *entries, uint32_t n_pages, struct pv_pin *pins, struct pv_pin **others, uint32_t n_others);

/* Replace what is mapped at `address` by bytes of `fd`, not inherited by forked children. 0 or -errno. */
int pv_map_pages(void *address, uint64_t n_bytes, int fd, uint64_t offset, int read_only);

#endif
