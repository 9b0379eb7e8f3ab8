/* SPDX-License-Identifier: MIT */
/* What the files of the frontend call of each other. */
#ifndef BLKFRONT_PRIVATE_H
#define BLKFRONT_PRIVATE_H

#include "pv_blkfront.h"

#define SLOT_PAGES PV_BLKFRONT_SLOT_PAGES

_Static_assert(SLOT_PAGES == PV_BLKIF_MAX_SEGMENTS, "a direct request fills a slot");

/*
 * Grant a page of the slots, counted from the first one, for a request whose first `bytes` there (4096 at most count) are
 * what it is about: what earlier requests have left behind them is zeroed. 0 or as pv_grant_access.
 */
int blkfront_grant_page(struct pv_blkfront *front, uint32_t page, uint64_t bytes, int read_only);

/* As pv_grant_revoke; 0 for one that stays granted. */
int blkfront_revoke_page(struct pv_blkfront *front, uint32_t page);

/* pv_blkfront_purge when that is due. */
void blkfront_purge_now_and_then(struct pv_blkfront *front);

#endif
