/* SPDX-License-Identifier: MIT */
/* pv_grant_copy.c against any peer: copies stay inside, of what was granted to us; nothing stays pinned. */
#include "prove.h"
#include "pv_grant.c"
#include "pv_grant_copy.c"
#include "prove_mapper.h"

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
