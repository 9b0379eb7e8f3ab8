/* SPDX-License-Identifier: MIT */
#include "pv_blkif_grants.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "pv_blkif.h"

#define END 0                /* the place that is none: before the oldest and behind the newest */

int pv_blkif_grants_init(struct pv_blkif_grants *grants, struct pv_mapper *mapper, uint32_t max, uint32_t unused_ms)
{
	memset(grants, 0, sizeof(*grants));
	if (max == 0 || max > PV_BLKIF_PERSISTENT_MOST)
		return -EINVAL;
	grants->mapper = mapper;
	grants->max = max;
	grants->unused_ms = unused_ms;
	grants->places = calloc(max + 1, sizeof(*grants->places));
	/* Most of a large chunk's table is never touched, and so takes no memory. */
	grants->by_page = calloc(mapper->n_pages, sizeof(*grants->by_page));
	if (!grants->places || !grants->by_page) {
		pv_blkif_grants_free(grants);
		return -ENOMEM;
	}
	for (uint32_t place = max; place > 0; place--) {
		grants->places[place].next = grants->free;
		grants->free = (uint16_t)place;
	}
	return 0;
}

static void append(struct pv_blkif_grants *grants, uint16_t place)
{
	struct pv_blkif_cached *places = grants->places;
	uint16_t newest = places[END].previous;

	places[place].previous = newest;
	places[place].next = END;
	places[newest].next = place;
	places[END].previous = place;
}

static void unlink_idle(struct pv_blkif_grants *grants, uint16_t place)
{
	struct pv_blkif_cached *places = grants->places;

	places[places[place].previous].next = places[place].next;
	places[places[place].next].previous = places[place].previous;
}

/* The place is in no list. */
static void drop(struct pv_blkif_grants *grants, uint16_t place)
{
	struct pv_blkif_cached *cached = &grants->places[place];

	pv_grant_unmap(grants->mapper, cached->gref, cached->read_only);
	grants->by_page[cached->gref - grants->mapper->base] = END;
	memset(cached, 0, sizeof(*cached));
	cached->next = grants->free;
	grants->free = place;
	grants->cached--;
}

static void drop_oldest(struct pv_blkif_grants *grants)
{
	uint16_t oldest = grants->places[END].next;

	unlink_idle(grants, oldest);
	drop(grants, oldest);
}

void pv_blkif_grants_free(struct pv_blkif_grants *grants)
{
	if (grants->places && grants->by_page)
		for (uint32_t place = 1; place <= grants->max; place++)
			if (grants->places[place].in_use)
				drop(grants, (uint16_t)place);
	while (grants->cached)
		drop_oldest(grants);
	free(grants->places);
	free(grants->by_page);
	grants->places = NULL;
	grants->by_page = NULL;
	grants->in_use = 0;
	grants->free = END;
}

/* A free place, END when all are in use. */
static uint16_t find_place(struct pv_blkif_grants *grants)
{
	uint32_t n = 1 + grants->max * PV_BLKIF_PURGE_PERCENT / 100;
	uint16_t place;

	if (!grants->free)
		for (; n > 0 && grants->places[END].next; n--, grants->purged++)
			drop_oldest(grants);
	place = grants->free;
	if (place)
		grants->free = grants->places[place].next;
	return place;
}

static uint16_t add(struct pv_blkif_grants *grants, uint32_t gref, int read_only, uint64_t *offset, uint16_t *at)
{
	uint16_t place;

	grants->misses++;
	/* First of all: references that cannot be mapped drive nothing out. */
	if (pv_grant_map(grants->mapper, gref, read_only, offset) != PV_GNTST_OKAY)
		return PV_BLKIF_REFUSED_GRANT;
	place = find_place(grants);
	*at = place;
	if (!place) {
		grants->transient++;
		return PV_BLKIF_REFUSED_NOTHING;
	}
	grants->places[place] = (struct pv_blkif_cached){ .offset = *offset, .gref = gref, .in_use = 1,
							  .read_only = (uint8_t)read_only };
	grants->by_page[gref - grants->mapper->base] = place;
	grants->cached++;
	grants->in_use++;
	return PV_BLKIF_REFUSED_NOTHING;
}

/* What was pinned for reading is to be written, too: the same page, since a pinned reference keeps its frame. */
static int widen(struct pv_blkif_grants *grants, struct pv_blkif_cached *cached)
{
	if (pv_grant_map(grants->mapper, cached->gref, 0, &cached->offset) != PV_GNTST_OKAY)
		return 0;
	pv_grant_unmap(grants->mapper, cached->gref, 1);
	cached->read_only = 0;
	return 1;
}

uint16_t pv_blkif_grants_take(struct pv_blkif_grants *grants, uint32_t gref, int read_only, uint64_t *offset, uint16_t *at)
{
	uint32_t page = gref - grants->mapper->base;
	uint16_t place = page < grants->mapper->n_pages ? grants->by_page[page] : END;
	struct pv_blkif_cached *cached = &grants->places[place];

	if (!place)
		return add(grants, gref, !!read_only, offset, at);
	if (cached->in_use)
		return PV_BLKIF_REFUSED_IN_USE;
	if (!read_only && cached->read_only && !widen(grants, cached))
		return PV_BLKIF_REFUSED_GRANT;
	grants->hits++;
	unlink_idle(grants, place);
	cached->in_use = 1;
	grants->in_use++;
	*offset = cached->offset;
	*at = place;
	return PV_BLKIF_REFUSED_NOTHING;
}

void pv_blkif_grants_give(struct pv_blkif_grants *grants, uint32_t gref, int read_only, uint16_t place)
{
	if (!place) {
		pv_grant_unmap(grants->mapper, gref, read_only);
		return;
	}
	grants->places[place].in_use = 0;
	grants->places[place].used_ms = grants->now_ms;
	grants->in_use--;
	append(grants, place);
}

uint32_t pv_blkif_grants_age(struct pv_blkif_grants *grants, uint32_t now_ms)
{
	uint32_t n = 0;

	grants->now_ms = now_ms;
	grants->aged_ms = now_ms;
	/* The list is in the order of its times. */
	for (uint16_t oldest; (oldest = grants->places[END].next) && grants->unused_ms; n++) {
		if (now_ms - grants->places[oldest].used_ms < grants->unused_ms)
			break;
		drop_oldest(grants);
	}
	grants->aged += n;
	return n;
}

void pv_blkif_grants_tick(struct pv_blkif_grants *grants)
{
	struct timespec now;

	/* The coarse clock: no system call, and as exact as this needs. */
	clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	grants->now_ms = (uint32_t)now.tv_sec * 1000u + (uint32_t)(now.tv_nsec / 1000000);
	if (grants->now_ms - grants->aged_ms >= PV_BLKIF_AGE_MS)
		pv_blkif_grants_age(grants, grants->now_ms);
}
