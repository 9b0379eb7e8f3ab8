/* SPDX-License-Identifier: MIT */
#include "pv_netgrefs.h"

#include <stdlib.h>
#include <string.h>

#include "pv_netctrl.h"

void pv_netgrefs_init(struct pv_netgrefs *grefs, struct pv_mapper *mapper, uint32_t n_queues)
{
	memset(grefs, 0, sizeof(*grefs));
	grefs->mapper = mapper;
	grefs->n_queues = n_queues < PV_NETGREFS_QUEUES ? n_queues : PV_NETGREFS_QUEUES;
}

/* Room for what is said of each page, when a guest first wants one: 1 or 0. */
static int have_room(struct pv_netgrefs *grefs)
{
	uint32_t n_pages = grefs->mapper->n_pages;

	if (grefs->mapped)
		return 1;
	grefs->mapped = calloc(n_pages, sizeof(*grefs->mapped));
	grefs->read_only = calloc(n_pages, sizeof(*grefs->read_only));
	grefs->busy = calloc(n_pages, sizeof(*grefs->busy));
	if (grefs->mapped && grefs->read_only && grefs->busy)
		return 1;
	pv_netgrefs_destroy(grefs);
	return 0;
}

static void unmap(struct pv_netgrefs *grefs, uint32_t page, uint64_t bit)
{
	pv_grant_unmap(grefs->mapper, grefs->mapper->base + page, (grefs->read_only[page] & bit) != 0);
	grefs->mapped[page] &= ~bit;
	grefs->read_only[page] &= ~bit;
}

void pv_netgrefs_destroy(struct pv_netgrefs *grefs)
{
	for (uint32_t page = 0; grefs->mapped && page < grefs->mapper->n_pages; page++)
		for (uint32_t queue = 0; grefs->mapped[page] && queue < grefs->n_queues; queue++)
			if (grefs->mapped[page] & 1ull << queue)
				unmap(grefs, page, 1ull << queue);
	free(grefs->mapped);
	free(grefs->read_only);
	free(grefs->busy);
	grefs->mapped = grefs->read_only = NULL;
	grefs->busy = NULL;
	memset(grefs->n, 0, sizeof(grefs->n));
}

/* The list in the guest's page: 1 or 0. `to_guest`: the other way. */
static int copy_list(struct pv_netgrefs *grefs, uint32_t list, struct pv_netgref *entries, uint32_t n, int to_guest)
{
	struct pv_grant_copy_op op = { .gref = list, .length = (uint16_t)(n * sizeof(*entries)) };

	pv_grant_copy(grefs->mapper, &op, 1, (uint8_t *)entries, n * sizeof(*entries), to_guest);
	return !op.status;
}

/* One entry: 1 mapped, 0 refused. */
static int map(struct pv_netgrefs *grefs, const struct pv_netgref *entry, uint64_t bit)
{
	uint32_t page = entry->gref - grefs->mapper->base;
	int read_only = (entry->flags & PV_NETGREF_READONLY) != 0;
	uint64_t offset;

	if (entry->flags & ~PV_NETGREF_READONLY || page >= grefs->mapper->n_pages || grefs->mapped[page] & bit)
		return 0;
	if (pv_grant_map(grefs->mapper, entry->gref, read_only, &offset))
		return 0;
	grefs->mapped[page] |= bit;
	grefs->read_only[page] |= read_only ? bit : 0;
	return 1;
}

uint32_t pv_netgrefs_add(struct pv_netgrefs *grefs, uint32_t queue, uint32_t list, uint32_t n)
{
	struct pv_netgref entries[PV_NETGREFS_MAX];
	uint64_t bit = 1ull << (queue & (PV_NETGREFS_QUEUES - 1));
	uint32_t done = 0;

	if (queue >= grefs->n_queues || n > PV_NETGREFS_MAX || n > PV_NETGREFS_MAX - grefs->n[queue])
		return PV_NETCTRL_INVALID;
	if (!n)
		return PV_NETCTRL_SUCCESS;
	if (!have_room(grefs) || !copy_list(grefs, list, entries, n, 0))
		return PV_NETCTRL_INVALID;
	while (done < n && map(grefs, &entries[done], bit))
		done++;
	if (done < n) {
		while (done)
			unmap(grefs, entries[--done].gref - grefs->mapper->base, bit);
		return PV_NETCTRL_INVALID;
	}
	grefs->n[queue] += n;
	return PV_NETCTRL_SUCCESS;
}

/* Note, or forget, which pages are named by requests that were taken and are not answered. */
static void set_busy(struct pv_netgrefs *grefs, uint32_t queue, uint8_t is_busy)
{
	const struct pv_netback *back = grefs->backs[queue];
	uint32_t base = grefs->mapper->base, n_pages = grefs->mapper->n_pages;

	if (!back)
		return;
	/* What is extra information looks like a reference now and then: that page waits a little longer. */
	for (uint32_t i = 0; i < back->n_requests; i++)
		if (back->requests[back->first_request + i].gref - base < n_pages)
			grefs->busy[back->requests[back->first_request + i].gref - base] = is_busy;
	for (uint32_t i = 0; i < back->n_buffers; i++)
		if (back->buffers[back->first_buffer + i].gref - base < n_pages)
			grefs->busy[back->buffers[back->first_buffer + i].gref - base] = is_busy;
}

uint32_t pv_netgrefs_del(struct pv_netgrefs *grefs, uint32_t queue, uint32_t list, uint32_t n, uint32_t *n_unmapped)
{
	struct pv_netgref entries[PV_NETGREFS_MAX];
	uint64_t bit = 1ull << (queue & (PV_NETGREFS_QUEUES - 1));
	uint32_t freed = 0;
	int told;

	*n_unmapped = 0;
	if (queue >= grefs->n_queues || n > PV_NETGREFS_MAX)
		return PV_NETCTRL_INVALID;
	if (!n)
		return PV_NETCTRL_SUCCESS;
	if (!have_room(grefs) || !copy_list(grefs, list, entries, n, 0))
		return PV_NETCTRL_INVALID;
	set_busy(grefs, queue, 1);
	for (uint32_t i = 0; i < n; i++) {
		uint32_t page = entries[i].gref - grefs->mapper->base;
		int is_there = page < grefs->mapper->n_pages && grefs->mapped[page] & bit && !grefs->busy[page];

		entries[i].status = is_there ? PV_NETCTRL_SUCCESS : PV_NETCTRL_INVALID;
		/* The second entry of the same reference finds none. */
		if (is_there)
			grefs->mapped[page] &= ~bit;
	}
	set_busy(grefs, queue, 0);
	/* A guest that cannot be told which ones keeps all of them. */
	told = copy_list(grefs, list, entries, n, 1);
	for (uint32_t i = 0; i < n; i++) {
		uint32_t page = entries[i].gref - grefs->mapper->base;

		if (entries[i].status != PV_NETCTRL_SUCCESS)
			continue;
		grefs->mapped[page] |= bit;
		if (told) {
			unmap(grefs, page, bit);
			freed++;
		}
	}
	grefs->n[queue] -= freed;
	*n_unmapped = freed;
	return told ? PV_NETCTRL_SUCCESS : PV_NETCTRL_INVALID;
}
