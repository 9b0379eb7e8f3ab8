/* SPDX-License-Identifier: MIT */
/* pv_blkif_prepare for any request: what is let through lies on the disk and in granted pages. */
#include <stdlib.h>

#include "prove.h"
/* As there, but for objects that are not bytes: that the last one can be touched says that none is outside. */
static void touch(const void *at, uint64_t n)
{
	uint8_t last = n ? ((const uint8_t *)at)[n - 1] : 0;

	must(last <= UINT8_MAX);
}

#undef memcpy
#define memcpy(to, from, n) (touch((to), (n)), touch((from), (n)))
/* A pool that is full stays so: what grows is not for the solver. */
#define realloc(at, n) ((void *)0)
#include "pv_blkif.c"

#define PAGES 4u
#define FEW_SEGMENTS 3u         /* where each is mapped: the solver's time grows fast */

static uint8_t data[PAGES * PV_PAGE_BYTES];
static struct pv_mapper mapper = { .data = data };
static struct pv_blkif_extent extents[PV_BLKIF_MAX_SEGMENTS];
static struct pv_blkif_pool pool;
static struct pv_blkif_limits limits;
static struct pv_blkif_request request;
static struct pv_blkif_plan plan;
static int n_mapped, all_refused, begun;

static int is_shared(const void *at)
{
	return 0;
}

/* Any answer that prove_grant.c allows. */
int pv_grant_map_next(struct pv_mapper *of, uint32_t gref, int read_only, uint64_t *frame_offset)
{
	uint64_t page = nondet_any();

	assume(page < PAGES);
	must(begun);
	must(read_only || !limits.read_only || request.operation == PV_BLKIF_OP_READ ||
	     request.operation == PV_BLKIF_OP_INDIRECT);
	must(read_only || plan.operation == PV_BLKIF_OP_READ);
	if (all_refused || nondet_any() & 1)
		return PV_GNTST_GENERAL_ERROR;
	*frame_offset = page * PV_PAGE_BYTES;
	n_mapped++;
	return PV_GNTST_OKAY;
}

int pv_grant_unmap_next(struct pv_mapper *of, uint32_t gref, int read_only)
{
	must(begun);
	n_mapped--;
	return PV_GNTST_OKAY;
}

void pv_grant_begin(struct pv_mapper *of) { must(!begun++); }
void pv_grant_end(struct pv_mapper *of) { must(begun--); }
void pv_grant_expect(const struct pv_mapper *of, uint32_t gref) {}

/*
 * What is copied is any bytes: so are the parts of an indirect request or a discard, which are looked at in copies, and the
 * segments of an indirect request.
 */
static uint32_t prepare_any(uint32_t sector_size, uint32_t max_segments)
{
	struct pv_blkif_request any_request;
	struct pv_blkif_plan before;
	struct pv_blkif_segment any_segments[PV_BLKIF_MAX_SEGMENTS];

	request = any_request;
	plan = before;
	pool = (struct pv_blkif_pool){ .extents = extents, .segments = any_segments, .capacity = PV_BLKIF_MAX_SEGMENTS };
	limits = (struct pv_blkif_limits){ .sectors = nondet_any(), .sector_size = sector_size,
					   .max_indirect_segments = (uint32_t)nondet_any(),
					   .read_only = nondet_any() & 1, .flush = nondet_any() & 1,
					   .barrier = nondet_any() & 1, .discard = nondet_any() & 1,
					   .discard_secure = nondet_any() & 1 };
	assume(limits.max_indirect_segments <= max_segments);
	/* A disk is not larger than its bytes can be counted. */
	assume(limits.sectors <= UINT64_MAX >> SECTOR_SHIFT);
	if (!all_refused)
		assume(request.nr_segments <= FEW_SEGMENTS || request.nr_segments > PV_BLKIF_MAX_SEGMENTS);
	return pv_blkif_prepare(&mapper, &limits, &request, 1, &plan, &pool);
}

static void must_lie_on_the_disk(void)
{
	uint64_t sector = plan.offset >> SECTOR_SHIFT, sectors = plan.length >> SECTOR_SHIFT;

	must(((plan.offset | plan.length) & (limits.sector_size - 1)) == 0);
	must(sector <= limits.sectors && sectors <= limits.sectors - sector);
	must(plan.operation == PV_BLKIF_OP_READ || !limits.read_only);
	must(sectors >= 1 || (plan.operation == PV_BLKIF_OP_WRITE_BARRIER && sector == 0));
	if (plan.operation == PV_BLKIF_OP_DISCARD) {
		must(limits.discard && (!plan.secure || limits.discard_secure));
		return;
	}
	must(plan.length <= 11 * PV_PAGE_BYTES);
	must(plan.operation == PV_BLKIF_OP_READ || plan.operation == PV_BLKIF_OP_WRITE ||
	     (plan.operation == PV_BLKIF_OP_WRITE_BARRIER && limits.barrier));
	if (request.operation == PV_BLKIF_OP_INDIRECT)
		must(limits.max_indirect_segments > 0 && plan.operation != PV_BLKIF_OP_WRITE_BARRIER);
	else
		must(sectors == 0 || (plan.operation == request.operation && sector == request.sector));
}

/* All segments there can be; the grants are refused, so a request comes this far only by being right. */
static void what_gets_to_its_grants_lies_on_the_disk(uint32_t sector_size)
{
	all_refused = 1;
	if (prepare_any(sector_size, PV_BLKIF_MAX_SEGMENTS))
		must((plan.operation == PV_BLKIF_OP_FLUSH_DISKCACHE && limits.flush) ||
		     plan.operation == PV_BLKIF_OP_DISCARD ||
		     (plan.operation == PV_BLKIF_OP_WRITE_BARRIER && limits.barrier && plan.length == 0));
	else
		must(plan.status < PV_BLKIF_RSP_OKAY && plan.reason != PV_BLKIF_REFUSED_NOTHING);
	if (plan.status == PV_BLKIF_PENDING && plan.operation == PV_BLKIF_OP_DISCARD)
		must_lie_on_the_disk();
	if (plan.reason == PV_BLKIF_REFUSED_GRANT && request.operation != PV_BLKIF_OP_INDIRECT)
		must_lie_on_the_disk();
	must(n_mapped == 0 && plan.n_extents == 0 && plan.pinned == 0 && pool.used == plan.n_segments && !begun);
}

static void what_is_let_through_lies_in_its_pages(uint32_t sector_size)
{
	uint64_t bytes = 0;
	uint32_t pending = prepare_any(sector_size, FEW_SEGMENTS);

	must(pending == (plan.status == PV_BLKIF_PENDING) && n_mapped == (int)plan.pinned);
	must(plan.n_extents <= PV_BLKIF_MAX_SEGMENTS && plan.pinned <= PV_BLKIF_MAX_SEGMENTS);
	must(plan.first == 0 && plan.n_segments == pool.used && pool.used <= pool.capacity && !begun);
	must(!pending || plan.pinned == plan.n_segments);
	if (!pending) {
		must(plan.pinned == 0 && plan.status != PV_BLKIF_RSP_OKAY);
		return;
	}
	for (uint32_t i = 0; i < plan.n_extents; i++) {
		bytes += extents[i].length;
		must(extents[i].offset < PAGES * PV_PAGE_BYTES &&
		     extents[i].length <= PAGES * PV_PAGE_BYTES - extents[i].offset);
	}
	if (plan.operation == PV_BLKIF_OP_FLUSH_DISKCACHE) {
		must(plan.n_extents == 0);
		return;
	}
	must_lie_on_the_disk();
	must(plan.operation == PV_BLKIF_OP_DISCARD ? plan.n_extents == 0 : bytes == plan.length);
}

/* As many segments as there can be, in as many pages: each copy stays in its page and in the pool. */
void fetches_into_its_place(void)
{
	struct pv_blkif_indirect indirect;
	struct pv_blkif_plan any_plan;
	struct pv_blkif_segment segments[PV_BLKIF_MAX_INDIRECT_SEGMENTS];

	assume(indirect.nr_segments >= 1 && indirect.nr_segments <= PV_BLKIF_MAX_INDIRECT_SEGMENTS);
	plan = any_plan;
	plan.operation = PV_BLKIF_OP_READ;
	pool = (struct pv_blkif_pool){ .extents = extents, .segments = segments,
				       .capacity = PV_BLKIF_MAX_INDIRECT_SEGMENTS };
	assume(plan.first <= pool.capacity - indirect.nr_segments);
	if (!fetch(&mapper, &indirect, &plan, &pool))
		must(plan.status == PV_BLKIF_RSP_ERROR && plan.reason == PV_BLKIF_REFUSED_GRANT);
	must(n_mapped == 0 && !begun);
}

void checks_sectors_of_512(void) { what_gets_to_its_grants_lies_on_the_disk(512); }
void checks_sectors_of_4096(void) { what_gets_to_its_grants_lies_on_the_disk(4096); }
void maps_sectors_of_512(void) { what_is_let_through_lies_in_its_pages(512); }
void maps_sectors_of_4096(void) { what_is_let_through_lies_in_its_pages(4096); }
