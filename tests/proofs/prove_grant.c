/* SPDX-License-Identifier: MIT */
/* pv_grant.c against any peer: what is pinned lies in the chunk and was granted to us; what is revoked was not in use. */
#include "prove.h"
#include "pv_grant.c"

#define PAGES 2u
#define SELF 7

static struct pv_grant_entry shared_entries[PAGES];
static struct pv_pin pins[PAGES];
static struct pv_pinned pinned[PAGES];
static struct pv_grant_private granted[PAGES];
static uint8_t pages[PAGES * PAGE_BYTES];
static struct pv_mapper mapper;
static struct pv_granter granter;

static int is_shared(const void *at)
{
	return __ESBMC_POINTER_OBJECT(at) == __ESBMC_POINTER_OBJECT(shared_entries);
}

int sched_yield(void) { return 0; }

static uint32_t any(void)
{
	return (uint32_t)nondet_any();
}

/* A mapper that may have pinned each page already. */
static void make_mapper(void)
{
	mapper = (struct pv_mapper){ .entries = shared_entries, .data = pages, .pins = pins, .pinned = pinned, .base = any(),
				     .n_pages = PAGES, .self = SELF, .read_only = any() & 1 };
	for (uint32_t i = 0; i < PAGES; i++) {
		pins[i] = (struct pv_pin){ (uint16_t)any(), mapper.read_only ? 0 : (uint16_t)any() };
		pinned[i] = (struct pv_pinned){ any(), (uint16_t)any(), 0 };
		if (is_pinned(&pins[i])) {
			assume(pinned[i].frame - mapper.base < PAGES);
			assume((pinned[i].flags & (PV_GTF_TYPE_MASK | PV_GTF_SUB_PAGE)) == PV_GTF_PERMIT_ACCESS);
			assume(!pins[i].writers || !(pinned[i].flags & PV_GTF_READONLY));
		}
	}
}

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

/* Two operations, of one reference or of two: what they share stays pinned for both and for neither afterwards. */
void copy_stays_in_bounds(void)
{
	struct pv_grant_copy_op ops[2];
	struct pv_pin before[PAGES];
	uint8_t local[64];

	make_mapper();
	for (uint32_t i = 0; i < 2; i++)
		ops[i] = (struct pv_grant_copy_op){ .gref = any(), .offset = (uint16_t)any(), .length = (uint16_t)any(),
						    .local_offset = nondet_any() };
	for (uint32_t i = 0; i < PAGES; i++)
		before[i] = pins[i];
	pv_grant_copy(&mapper, ops, 2, local, sizeof local, any() & 1);
	for (uint32_t i = 0; i < 2; i++)
		must(ops[i].status != PV_GNTST_OKAY || !ops[i].length ||
		     (ops[i].offset + ops[i].length <= PAGE_BYTES && ops[i].local_offset + ops[i].length <= 64));
	for (uint32_t i = 0; i < PAGES; i++)
		must(pins[i].readers == before[i].readers && pins[i].writers == before[i].writers);
	must(mapper.copies + mapper.failures == 2);
}

/* Without a pin: of a page that was granted to us and that is still so at a second look, and what is not counts as failed. */
void copies_out_of_what_is_granted(void)
{
	struct pv_grant_copy_op op = { .gref = any(), .offset = (uint16_t)any(), .length = (uint16_t)any(),
				       .local_offset = nondet_any() };
	union entry_word found;
	uint8_t local[64];

	make_mapper();
	assume(op.length);
	pv_grant_copy(&mapper, &op, 1, local, sizeof local, 0);
	if (op.status != PV_GNTST_OKAY || n_exchanged || mapper.pinned_pages || is_pinned(&pins[op.gref - mapper.base]))
		return;
	found.word = last_load;
	must(n_loads == 2);
	must((found.entry.flags & (PV_GTF_TYPE_MASK | PV_GTF_SUB_PAGE)) == PV_GTF_PERMIT_ACCESS);
	must(found.entry.domid == SELF && found.entry.frame - mapper.base < PAGES);
	must(mapper.copies == 1 && mapper.copied_bytes == op.length);
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
