/* SPDX-License-Identifier: MIT */
/* What the files of grants share: entries as words, and pins. */
#ifndef GRANT_PRIVATE_H
#define GRANT_PRIVATE_H

#include "pv_atomic.h"
#include "pv_grant.h"

#define PAGE_BYTES 4096u

/* An entry is one 64-bit word to everybody: one load gives flags, domid and frame of the same moment. */
union entry_word {
	struct pv_grant_entry entry;
	uint64_t word;
};

static inline uint64_t *entry_of(struct pv_grant_entry *entries, uint32_t index)
{
	return (uint64_t *)(void *)&entries[index];
}

static inline uint64_t flag_bits(uint16_t flags)
{
	union entry_word bits = { .entry = { .flags = flags } };

	return bits.word;
}

static inline int is_pinned(const struct pv_pin *pin)
{
	return pin->readers || pin->writers;
}

/* Whether what an entry said lets us use its page: okay or the status. */
static inline int check_entry(const struct pv_mapper *mapper, struct pv_grant_entry entry, int read_only)
{
	uint16_t type = entry.flags & (PV_GTF_TYPE_MASK | PV_GTF_SUB_PAGE);

	if (type != PV_GTF_PERMIT_ACCESS || entry.domid != mapper->self || (!read_only && (entry.flags & PV_GTF_READONLY)))
		return PV_GNTST_GENERAL_ERROR;
	return entry.frame - mapper->base < mapper->n_pages ? PV_GNTST_OKAY : PV_GNTST_BAD_PAGE;
}

/* Byte offset of a page we hold a pin of: from the private copy, never from the entry. */
static inline uint64_t pinned_offset(const struct pv_mapper *mapper, uint32_t gref)
{
	return (uint64_t)(mapper->pinned[gref - mapper->base].frame - mapper->base) * PAGE_BYTES;
}

/* One pin more, one less; between pv_grant_begin and pv_grant_end. Okay or the status. */
int grant_pin_page(struct pv_mapper *mapper, uint32_t gref, int read_only);
int grant_unpin_page(struct pv_mapper *mapper, uint32_t gref, int read_only);

#endif
