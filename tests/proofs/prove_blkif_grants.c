/* SPDX-License-Identifier: MIT */
/* The cache of persistent grants, with any requests: each page is pinned once, each place is in one list. */
#include <stdlib.h>

#include "prove.h"
#include "pv_blkif_grants.c"

#define PLACES 2u
#define PAGES 3u
#define BASE 100u
#define STEPS 3

static struct pv_blkif_cached places[PLACES + 1];
static uint16_t by_page[PAGES];
static struct pv_mapper mapper = { .base = BASE, .n_pages = PAGES };
static struct pv_blkif_grants grants = { .mapper = &mapper, .places = places, .by_page = by_page, .max = PLACES,
					 .unused_ms = 10, .free = 1 };
static uint32_t readers[PAGES], writers[PAGES];

static int is_shared(const void *at)
{
	return 0;
}

/* Any frontend: it has granted the page or not, and may say so differently each time. */
int pv_grant_map(struct pv_mapper *of, uint32_t gref, int read_only, uint64_t *offset)
{
	if (gref - BASE >= PAGES || nondet_any() & 1)
		return PV_GNTST_GENERAL_ERROR;
	*(read_only ? &readers[gref - BASE] : &writers[gref - BASE]) += 1;
	*offset = (uint64_t)(gref - BASE) * PV_PAGE_BYTES;
	return PV_GNTST_OKAY;
}

int pv_grant_unmap(struct pv_mapper *of, uint32_t gref, int read_only)
{
	uint32_t *count = read_only ? &readers[gref - BASE] : &writers[gref - BASE];

	must(gref - BASE < PAGES && *count > 0);
	*count -= 1;
	return PV_GNTST_OKAY;
}

/* A use that goes on. */
struct use {
	uint32_t gref;
	int read_only, on;
	uint16_t place;
};

static void must_be_whole(const struct use *uses)
{
	uint32_t n_idle = 0, n_free = 0, n_in_use = 0, n_transient[PAGES] = { 0 };

	for (uint16_t at = places[0].next; at; at = places[at].next) {
		must(at <= PLACES && !places[at].in_use && ++n_idle <= PLACES);
		must(places[places[at].next].previous == at);
	}
	for (uint16_t at = grants.free; at; at = places[at].next)
		must(at <= PLACES && !places[at].in_use && ++n_free <= PLACES);
	for (int i = 0; i < STEPS; i++)
		if (uses[i].on && !uses[i].place)
			n_transient[uses[i].gref - BASE]++;
	for (uint32_t page = 0; page < PAGES; page++) {
		uint16_t at = by_page[page];

		must(at <= PLACES);
		n_in_use += places[at].in_use;
		must(readers[page] + writers[page] == n_transient[page] + !!at);
		if (at)
			must(places[at].gref == BASE + page && places[at].offset == page * PV_PAGE_BYTES);
	}
	must(n_idle + n_in_use == grants.cached && n_in_use == grants.in_use && n_free + grants.cached == PLACES);
}

void keeps_each_page_once(void)
{
	struct use uses[STEPS] = { 0 };

	places[1].next = 2;
	for (int i = 0; i < STEPS; i++) {
		uint64_t offset = 0;
		uint32_t which = (uint32_t)nondet_any() % STEPS;

		uses[i].gref = BASE + (uint32_t)nondet_any() % (PAGES + 1);
		uses[i].read_only = (int)(nondet_any() & 1);
		uses[i].on = !pv_blkif_grants_take(&grants, uses[i].gref, uses[i].read_only, &offset, &uses[i].place);
		if (uses[i].on)
			must(offset == (uint64_t)(uses[i].gref - BASE) * PV_PAGE_BYTES);
		for (int j = 0; j < i && uses[i].on && uses[i].place; j++)
			must(!uses[j].on || uses[j].place != uses[i].place);
		if (uses[which].on) {
			pv_blkif_grants_give(&grants, uses[which].gref, uses[which].read_only, uses[which].place);
			uses[which].on = 0;
		}
		if (nondet_any() & 1)
			pv_blkif_grants_age(&grants, grants.now_ms + ((uint32_t)nondet_any() & 15));
		must_be_whole(uses);
	}
}
