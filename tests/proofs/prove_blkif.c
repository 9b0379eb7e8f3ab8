/* SPDX-License-Identifier: MIT */
/* pv_blkif_prepare for any request: what is let through lies on the disk and in granted pages. */
/* The checker has its own. */
#define __iovec_defined 1
#include "prove.h"
#include "pv_blkif.c"

#define PAGES 4u
#define FEW_SEGMENTS 3u         /* where each is mapped: the solver's time grows fast */

static struct pv_mapper mapper;
static struct pv_blkif_limits limits;
static struct pv_blkif_request request;
static struct pv_blkif_plan plan;
static int n_mapped, all_refused;

static int is_shared(const void *at)
{
	return 0;
}

/* Any answer that prove_grant.c allows. */
int pv_grant_map(struct pv_mapper *of, uint32_t gref, int read_only, uint64_t *frame_offset)
{
	uint64_t page = nondet_any();

	assume(page < PAGES);
	must(read_only || !limits.read_only || request.operation == PV_BLKIF_OP_READ);
	if (all_refused || nondet_any() & 1)
		return PV_GNTST_GENERAL_ERROR;
	*frame_offset = page * PV_PAGE_BYTES;
	n_mapped++;
	return PV_GNTST_OKAY;
}

int pv_grant_unmap(struct pv_mapper *of, uint32_t gref, int read_only)
{
	n_mapped--;
	return PV_GNTST_OKAY;
}

int64_t pv_ring_push(struct pv_ring *ring, const void *messages, uint32_t n) { return n; }

static uint32_t prepare_any(uint32_t sector_size)
{
	struct pv_blkif_request any_request;
	struct pv_blkif_plan before;

	request = any_request;
	plan = before;
	limits = (struct pv_blkif_limits){ .sectors = nondet_any(), .sector_size = sector_size,
					   .read_only = nondet_any() & 1, .flush = nondet_any() & 1 };
	/* A disk is not larger than its bytes can be counted. */
	assume(limits.sectors <= UINT64_MAX >> SECTOR_SHIFT);
	if (!all_refused)
		assume(request.nr_segments <= FEW_SEGMENTS || request.nr_segments > PV_BLKIF_MAX_SEGMENTS);
	return pv_blkif_prepare(&mapper, &limits, &request, 1, &plan);
}

static void must_lie_on_the_disk(void)
{
	must(request.nr_segments >= 1 && request.nr_segments <= PV_BLKIF_MAX_SEGMENTS);
	must(plan.operation == PV_BLKIF_OP_READ || (plan.operation == PV_BLKIF_OP_WRITE && !limits.read_only));
	must(plan.offset >> SECTOR_SHIFT == request.sector && plan.length >= 512 && plan.length <= 11 * PV_PAGE_BYTES);
	must(((plan.offset | plan.length) & (limits.sector_size - 1)) == 0);
	must(request.sector <= limits.sectors && plan.length >> SECTOR_SHIFT <= limits.sectors - request.sector);
}

/* All segments there can be; the grants are refused, so a request comes this far only by being right. */
static void what_gets_to_its_grants_lies_on_the_disk(uint32_t sector_size)
{
	all_refused = 1;
	if (prepare_any(sector_size))
		must(plan.operation == PV_BLKIF_OP_FLUSH_DISKCACHE && limits.flush);
	else
		must(plan.status < PV_BLKIF_RSP_OKAY && plan.reason != PV_BLKIF_REFUSED_NOTHING);
	if (plan.reason == PV_BLKIF_REFUSED_GRANT)
		must_lie_on_the_disk();
	must(n_mapped == 0 && plan.n_extents == 0 && plan.pinned == 0);
}

static void what_is_let_through_lies_in_its_pages(uint32_t sector_size)
{
	uint64_t bytes = 0;
	uint32_t pending = prepare_any(sector_size);

	must(pending == (plan.status == PV_BLKIF_PENDING) && n_mapped == (int)plan.pinned);
	must(plan.n_extents <= PV_BLKIF_MAX_SEGMENTS && plan.pinned <= PV_BLKIF_MAX_SEGMENTS);
	if (!pending) {
		must(plan.pinned == 0 && plan.status != PV_BLKIF_RSP_OKAY);
		return;
	}
	for (uint32_t i = 0; i < plan.n_extents; i++) {
		bytes += plan.extents[i].length;
		must(plan.extents[i].offset < PAGES * PV_PAGE_BYTES &&
		     plan.extents[i].length <= PAGES * PV_PAGE_BYTES - plan.extents[i].offset);
	}
	if (plan.operation == PV_BLKIF_OP_FLUSH_DISKCACHE) {
		must(plan.n_extents == 0);
		return;
	}
	must_lie_on_the_disk();
	must(bytes == plan.length);
}

void checks_sectors_of_512(void) { what_gets_to_its_grants_lies_on_the_disk(512); }
void checks_sectors_of_4096(void) { what_gets_to_its_grants_lies_on_the_disk(4096); }
void maps_sectors_of_512(void) { what_is_let_through_lies_in_its_pages(512); }
void maps_sectors_of_4096(void) { what_is_let_through_lies_in_its_pages(4096); }
