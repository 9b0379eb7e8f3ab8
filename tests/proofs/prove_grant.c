/* SPDX-License-Identifier: MIT */
/* pv_grant.c against any peer: what is pinned lies in the chunk and was granted to us; what is revoked was not in use. */
#include "prove.h"
#include "pv_grant.c"

#include "prove_mapper.h"

static struct pv_grant_private granted[PAGES];
static struct pv_granter granter;

void map_stays_in_the_chunk(void)
{
	uint32_t gref = any(), index;
	int read_only = any() & 1, was_pinned;
	struct pv_pinned before;
	uint64_t offset = nondet_any();
	union entry_word found;

	make_mapper();
	index = gref - mapper.base;
	was_pinned = index < PAGES && is_pinned(&pins[index]);
	before = pinned[index % PAGES];
	if (pv_grant_map(&mapper, gref, read_only, &offset) != PV_GNTST_OKAY)
		return;
	must(index < PAGES && offset % PAGE_BYTES == 0 && offset < sizeof pages);
	must(read_only || (!mapper.read_only && !(pinned[index].flags & PV_GTF_READONLY)));
	must((pinned[index].flags & PV_GTF_TYPE_MASK) == PV_GTF_PERMIT_ACCESS);
	found.word = last_exchanged;
	if (was_pinned)
		must(pinned[index].frame == before.frame);
	else
		must(n_exchanged == 1 && found.entry.domid == SELF && found.entry.frame == pinned[index].frame &&
		     offset == (uint64_t)(found.entry.frame - mapper.base) * PAGE_BYTES);
}

void unmap_counts(void)
{
	uint32_t gref = any(), index;
	int read_only = any() & 1;
	struct pv_pin before;

	make_mapper();
	index = gref - mapper.base;
	before = pins[index % PAGES];
	if (pv_grant_unmap(&mapper, gref, read_only) != PV_GNTST_OKAY) {
		must(index >= PAGES || (read_only ? before.readers : before.writers) == 0);
		return;
	}
	must(pins[index].readers + (read_only ? 1 : 0) == before.readers);
	must(pins[index].writers + (read_only ? 0 : 1) == before.writers);
}

void revoke_only_what_nobody_uses(void)
{
	uint32_t gref = any(), index;
	union entry_word found;
	int result;

	granter = (struct pv_granter){ .entries = shared_entries, .granted = granted, .base = any(), .n_pages = PAGES };
	for (uint32_t i = 0; i < PAGES; i++)
		granted[i] = (struct pv_grant_private){ any(), (uint16_t)any(), (uint16_t)any() };
	index = gref - granter.base;
	result = pv_grant_revoke(&granter, gref);
	found.word = last_exchanged;
	must(result == 0 || result == -EBUSY || (result == -EINVAL && !n_exchanged));
	if (result == 0)
		must(n_exchanged == 1 && !(found.entry.flags & (PV_GTF_READING | PV_GTF_WRITING)) && !granted[index].flags &&
		     !shared_entries[index].flags);
	else
		must(n_exchanged == 0);
}
