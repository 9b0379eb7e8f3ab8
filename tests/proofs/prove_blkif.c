/* SPDX-License-Identifier: MIT */
/* pv_blkif_prepare for any request: what is let through lies on the disk and in granted pages. */
/* The checker has its own. */
#define __iovec_defined 1
#include "prove.h"
#include "pv_blkif.c"

#define PAGES 4u
#ifndef SEGMENTS
#define SEGMENTS PV_BLKIF_MAX_SEGMENTS
#endif

static struct pv_mapper mapper;
static int n_mapped;

static int is_shared(const void *at)
{
	return 0;
}

/* Any answer that prove_grant.c allows. */
int pv_grant_map(struct pv_mapper *of, uint32_t gref, int read_only, uint64_t *frame_offset)
{
	uint64_t page = nondet_any();

	assume(page < PAGES);
	if (nondet_any() & 1)
		return PV_GNTST_GENERAL_ERROR;
	must(read_only || !of->read_only);
	*frame_offset = page * 4096;
	n_mapped++;
	return PV_GNTST_OKAY;
}

int pv_grant_unmap(struct pv_mapper *of, uint32_t gref, int read_only)
{
	n_mapped--;
	return PV_GNTST_OKAY;
}

int64_t pv_ring_push(struct pv_ring *ring, const void *messages, uint32_t n) { return n; }

static void what_is_let_through_is_right(uint32_t sector_size)
{
	struct pv_blkif_request request;
	struct pv_blkif_limits limits;
	struct pv_blkif_plan plan;
	uint64_t bytes = 0;
	uint32_t pending;

	limits.sectors = nondet_any();
	limits.sector_size = sector_size;
	assume(limits.sectors <= UINT64_MAX >> 9);
	assume(request.nr_segments <= SEGMENTS || request.nr_segments > PV_BLKIF_MAX_SEGMENTS);
	pending = pv_blkif_prepare(&mapper, &limits, &request, 1, &plan);
	must(pending == (plan.status == PV_BLKIF_PENDING) && n_mapped == (int)plan.pinned);
	must(plan.n_extents <= PV_BLKIF_MAX_SEGMENTS && plan.pinned <= PV_BLKIF_MAX_SEGMENTS);
	if (!pending) {
		must(plan.pinned == 0 && plan.status != PV_BLKIF_RSP_OKAY);
		return;
	}
	for (uint32_t i = 0; i < plan.n_extents; i++) {
		bytes += plan.extents[i].length;
		must(plan.extents[i].offset < PAGES * 4096 && plan.extents[i].length <= PAGES * 4096 - plan.extents[i].offset);
	}
	if (plan.operation == PV_BLKIF_OP_FLUSH_DISKCACHE)
		return;
	must(plan.operation == PV_BLKIF_OP_READ || (plan.operation == PV_BLKIF_OP_WRITE && !limits.read_only));
	must(bytes == plan.length && (plan.offset & 511) == 0);
	must(plan.offset >> 9 <= limits.sectors && plan.length >> 9 <= limits.sectors - (plan.offset >> 9));
}

void sectors_of_512(void) { what_is_let_through_is_right(512); }
void sectors_of_4096(void) { what_is_let_through_is_right(4096); }
