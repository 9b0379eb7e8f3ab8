/* SPDX-License-Identifier: MIT */
/* The grants of a frontend's pages: for one request, or for as long as the backend likes to keep them mapped. */
#include "pv_blkfront.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "blkfront_private.h"

#define SECTOR_BYTES 512u

/* How a page is granted: PV_GTF_*, or 0. */
static uint16_t granted(const struct pv_blkfront *front, uint32_t page)
{
	return front->granter->granted[front->first_gref + page - front->granter->base].flags;
}

/* It is granted as any request may need it, and stays so. */
static int is_kept(const struct pv_blkfront *front, uint32_t page)
{
	return front->persistent && granted(front, page) == PV_GTF_PERMIT_ACCESS;
}

int blkfront_revoke_page(struct pv_blkfront *front, uint32_t page)
{
	return is_kept(front, page) ? 0 : pv_grant_revoke(front->granter, front->first_gref + page);
}

/* Few requests fill less of a page than the one before: mostly there is nothing to do. */
static void clear_rest(struct pv_blkfront *front, uint32_t page, uint32_t bytes)
{
	uint8_t *filled = &front->slots[page / SLOT_PAGES].filled[page % SLOT_PAGES];
	uint32_t before = *filled * SECTOR_BYTES;

	if (bytes < before)
		memset(front->pages + (uint64_t)page * PV_PAGE_BYTES + bytes, 0, before - bytes);
	*filled = (uint8_t)((bytes + SECTOR_BYTES - 1) / SECTOR_BYTES);
}

int blkfront_grant_page(struct pv_blkfront *front, uint32_t page, uint64_t bytes, int read_only)
{
	uint32_t gref = front->first_gref + page;

	clear_rest(front, page, bytes < PV_PAGE_BYTES ? (uint32_t)bytes : PV_PAGE_BYTES);
	if (is_kept(front, page)) {
		front->granted_before++;
		return 0;
	}
	return pv_grant_access_at(front->granter, gref, front->backend, gref, read_only && !front->persistent, front->now_ms);
}

/* Of all free slots those with a page that the backend does not let go of are put aside. */
static void revoke_free(struct pv_blkfront *front)
{
	uint32_t kept = 0;

	for (uint32_t i = 0; i < front->n_free; i++) {
		uint32_t slot = front->free[i];
		int busy = 0;

		for (uint32_t page = slot * SLOT_PAGES; page < (slot + 1) * SLOT_PAGES; page++)
			busy |= blkfront_revoke_page(front, page) == -EBUSY;
		front->slots[slot].n_pages = SLOT_PAGES;
		front->slots[slot].next = PV_BLKFRONT_NONE;
		if (busy)
			front->held[front->n_held++] = slot;
		else
			front->free[kept++] = slot;
	}
	front->n_free = kept;
}

void pv_blkfront_persist(struct pv_blkfront *front, int persistent)
{
	uint32_t before = front->persistent;

	front->persistent = (uint32_t)!!persistent;
	if (!before || persistent)
		return;
	/* With a request in flight all pages of its slots go, also those it does not use itself. */
	for (uint32_t slot = 0; slot < front->n_slots; slot++) {
		if (!front->slots[slot].sequence)
			continue;
		front->slots[slot].n_pages = 0;
		for (uint32_t of = slot; of != PV_BLKFRONT_NONE; of = front->slots[of].next)
			front->slots[slot].n_pages += SLOT_PAGES;
	}
	revoke_free(front);
}

uint32_t pv_blkfront_purge(struct pv_blkfront *front)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < front->n_free * SLOT_PAGES; i++) {
		uint32_t page = front->free[i / SLOT_PAGES] * SLOT_PAGES + i % SLOT_PAGES;
		uint32_t gref = front->first_gref + page;

		/* Looked at first: that a mapped one cannot be had is nothing to be noted of the backend. */
		if (granted(front, page) && !pv_grant_in_use(front->granter, gref))
			n += !pv_grant_revoke(front->granter, gref);
	}
	return n;
}

void blkfront_purge_now_and_then(struct pv_blkfront *front)
{
	struct timespec now;
	uint32_t now_ms;

	clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	now_ms = (uint32_t)now.tv_sec * 1000u + (uint32_t)(now.tv_nsec / 1000000);
	if (now_ms - front->purged_ms < PV_BLKFRONT_PURGE_MS)
		return;
	front->purged_ms = now_ms;
	pv_blkfront_purge(front);
}
