/* SPDX-License-Identifier: MIT */
/* Copies of granted pages: out of them without a pin, into them and between them with one. */
#include <string.h>

#include "grant_private.h"

/*
 * Operations go in parts: all references of a part are pinned, then all is copied, then all are let go. Between the copies
 * stands no atomic access that would wait for the stores of the copy before, and what is done of a kind overlaps.
 */
#define PART 32u
#define LINE_BYTES 64u
#define LINES_AHEAD 8u       /* of the next page: a processor that looks ahead by itself stops where a page ends */

struct wanted {
	uint32_t index;          /* of its page: the reference less the mapper's base */
	uint32_t op;
};

/* The pages that a part of a batch wants of one mapper. */
struct part {
	struct pv_mapper *mapper;
	int read_only;
	uint32_t n_fresh;
	uint32_t n_others;
	uint32_t failed;                 /* a bit for each operation whose page cannot be had */
	int16_t statuses[PART];          /* of those */
	struct wanted fresh[PART];       /* pages that nobody had pinned */
	struct wanted others[PART];
};

_Static_assert(PART <= 32, "a bit for each operation");

static void begin_part(struct part *part, struct pv_mapper *mapper, int read_only)
{
	part->mapper = mapper;
	part->read_only = read_only;
	part->n_fresh = part->n_others = part->failed = 0;
	pv_grant_begin(mapper);
}

static uint64_t bits_of(const struct part *part)
{
	return flag_bits(PV_GTF_READING | (part->read_only ? 0 : PV_GTF_WRITING));
}

static void store_row(const struct part *part, uint32_t index, uint16_t pins)
{
	struct pv_pin *row = &part->mapper->pins[index];

	pv_store_relaxed(part->read_only ? &row->readers : &row->writers, pins);
}

/* What the entry of a fresh page said. */
static uint64_t word_of(const struct pv_mapper *mapper, uint32_t index)
{
	const struct pv_pinned *pinned = &mapper->pinned[index];
	const union entry_word said = { .entry = { .flags = pinned->flags, .domid = mapper->self, .frame = pinned->frame } };

	return said.word;
}

/* Under the lock. Looks at an entry, and stores its row, if this part would be the only one to use its page. */
static int is_fresh(const struct part *part, uint32_t index)
{
	struct pv_mapper *mapper = part->mapper;
	union entry_word seen;

	if (index >= mapper->n_pages || is_pinned(&mapper->pins[index]) || (!part->read_only && mapper->read_only))
		return 0;
	/* Takes the page over: pairs with the release in pv_grant_access. */
	seen.word = pv_load_acquire(entry_of(mapper->entries, index));
	if (check_entry(mapper, seen.entry, part->read_only) || (seen.entry.flags & (PV_GTF_READING | PV_GTF_WRITING)))
		return 0;
	store_row(part, index, 1);
	mapper->pinned[index] = (struct pv_pinned){ .frame = seen.entry.frame, .flags = seen.entry.flags };
	return 1;
}

/* Under the lock: that an operation needs a page. */
static void want(struct part *part, uint32_t op, uint32_t gref)
{
	const struct wanted wanted = { .index = gref - part->mapper->base, .op = op };

	if (is_fresh(part, wanted.index))
		part->fresh[part->n_fresh++] = wanted;
	else
		part->others[part->n_others++] = wanted;
}

/* Under the lock. Marks the entries of fresh pages as used; one that changed meanwhile is not fresh any more. */
static void mark_fresh(struct part *part)
{
	struct pv_mapper *mapper = part->mapper;
	const uint64_t bits = bits_of(part);
	uint32_t n = 0;

	for (uint32_t i = 0; i < part->n_fresh; i++) {
		const struct wanted wanted = part->fresh[i];
		uint64_t said = word_of(mapper, wanted.index);

		if (pv_compare_exchange(entry_of(mapper->entries, wanted.index), &said, said | bits)) {
			part->fresh[n++] = wanted;
		} else {
			store_row(part, wanted.index, 0);
			part->others[part->n_others++] = wanted;
		}
	}
	part->n_fresh = n;
	mapper->pinned_pages += n;
}

/* Under the lock. */
static void pin_others(struct part *part)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < part->n_others; i++) {
		const struct wanted wanted = part->others[i];
		int status = grant_pin_page(part->mapper, wanted.index + part->mapper->base, part->read_only);

		if (status) {
			part->failed |= 1u << wanted.op;
			part->statuses[wanted.op] = (int16_t)status;
		} else {
			part->others[n++] = wanted;
		}
	}
	part->n_others = n;
}

/* All that was wanted is pinned, or failed. */
static void pin_part(struct part *part)
{
	/* Rows before bits: a process that dies in between leaves no bit without a row. */
	pv_fence_compiler();
	mark_fresh(part);
	pin_others(part);
	pv_grant_end(part->mapper);
}

static int16_t status_of(const struct part *part, uint32_t op)
{
	return part->failed >> op & 1u ? part->statuses[op] : PV_GNTST_OKAY;
}

/* Under the lock: whether a thread of this process has pinned a page of ours meanwhile. */
static int is_shared(const struct pv_mapper *mapper, uint32_t index)
{
	return mapper->pins[index].readers + mapper->pins[index].writers != 1;
}

/*
 * Under the lock: gives a page back that only this part uses. Our accesses come before; pairs with the compare-exchange in
 * pv_grant_revoke. The owner of an entry may change nothing while its page is written, so that the entry is as it was; while
 * it is read he may make it writable.
 */
static void unmark(const struct part *part, uint32_t index)
{
	uint64_t *entry = entry_of(part->mapper->entries, index);

	if (part->read_only)
		pv_fetch_and(entry, ~bits_of(part));
	else
		pv_store_release(entry, word_of(part->mapper, index));
}

/* Under the lock. */
static void let_go(struct part *part)
{
	struct pv_mapper *mapper = part->mapper;
	uint32_t n = 0;

	while (part->n_others)
		grant_unpin_page(mapper, part->others[--part->n_others].index + mapper->base, part->read_only);
	for (uint32_t i = 0; i < part->n_fresh; i++) {
		const struct wanted wanted = part->fresh[i];

		if (is_shared(mapper, wanted.index)) {
			grant_unpin_page(mapper, wanted.index + mapper->base, part->read_only);
		} else {
			unmark(part, wanted.index);
			part->fresh[n++] = wanted;
		}
	}
	/* Bits before rows. */
	pv_fence_compiler();
	for (uint32_t i = 0; i < n; i++)
		store_row(part, part->fresh[i].index, 0);
	mapper->pinned_pages -= n;
}

/* What became of a batch, to be counted under the lock. */
struct outcome {
	uint64_t copies;
	uint64_t bytes;
	uint64_t failures;
};

static void note(struct outcome *outcome, int status, uint16_t length)
{
	outcome->copies += !status;
	outcome->bytes += status ? 0 : length;
	outcome->failures += status != 0;
}

static void count(struct pv_mapper *mapper, const struct outcome *outcome)
{
	mapper->copies += outcome->copies;
	mapper->copied_bytes += outcome->bytes;
	mapper->failures += outcome->failures;
}

static int is_in_page(uint16_t offset, uint16_t length)
{
	return (uint32_t)offset + length <= PAGE_BYTES;
}

static int is_inside(const struct pv_grant_copy_op *op, uint64_t local_bytes)
{
	return is_in_page(op->offset, op->length) && op->local_offset <= local_bytes && op->length <= local_bytes - op->local_offset;
}

/* ---- with pins ---- */

static void expect_page(const struct pv_mapper *mapper, const struct pv_grant_copy_op *op)
{
	const uint8_t *page = mapper->data + pinned_offset(mapper, op->gref) + op->offset % PAGE_BYTES;
	uint32_t lines = op->length / LINE_BYTES;

	for (uint32_t i = 0; i < (lines < LINES_AHEAD ? lines : LINES_AHEAD); i++)
		pv_prefetch_write(page + i * LINE_BYTES);
}

static int16_t copy_pinned(struct pv_mapper *mapper, const struct pv_grant_copy_op *op, uint8_t *local, uint64_t local_bytes, int to_grant)
{
	uint8_t *page = mapper->data + pinned_offset(mapper, op->gref) + op->offset;

	if (!is_inside(op, local_bytes))
		return PV_GNTST_BAD_COPY_ARG;
	if (to_grant)
		pv_copy(page, local + op->local_offset, op->length);
	else
		pv_copy(local + op->local_offset, page, op->length);
	return PV_GNTST_OKAY;
}

static void copy_part(struct pv_mapper *mapper, struct pv_grant_copy_op *ops, uint32_t n, uint8_t *local, uint64_t local_bytes, int to_grant)
{
	struct outcome outcome = { 0 };
	struct part part;

	begin_part(&part, mapper, !to_grant);
	for (uint32_t i = 0; i < n; i++)
		if (ops[i].length)
			want(&part, i, ops[i].gref);
	pin_part(&part);
	for (uint32_t i = 0; i < n; i++) {
		if (to_grant && i + 1 < n && ops[i + 1].length && !status_of(&part, i + 1))
			expect_page(mapper, &ops[i + 1]);
		ops[i].status = status_of(&part, i);
		if (ops[i].length && !ops[i].status)
			ops[i].status = copy_pinned(mapper, &ops[i], local, local_bytes, to_grant);
		note(&outcome, ops[i].status, ops[i].length);
	}
	pv_grant_begin(mapper);
	let_go(&part);
	count(mapper, &outcome);
	pv_grant_end(mapper);
}

static void copy_all_pinned(struct pv_mapper *mapper, struct pv_grant_copy_op *ops, uint32_t n, uint8_t *local, uint64_t local_bytes, int to_grant)
{
	for (; n > PART; n -= PART, ops += PART)
		copy_part(mapper, ops, PART, local, local_bytes, to_grant);
	copy_part(mapper, ops, n, local, local_bytes, to_grant);
}

/* ---- without ---- */

/* Not under the lock: who pins the page meanwhile changes its entry, too. */
static int is_pinned_now(const struct pv_mapper *mapper, uint32_t index)
{
	const struct pv_pin row = { pv_load_relaxed(&mapper->pins[index].readers), pv_load_relaxed(&mapper->pins[index].writers) };

	return is_pinned(&row);
}

/*
 * Copy out of a page without a pin, as a sequence lock's reader does: nothing is harmed by looking at a page that is no
 * longer ours to read, as long as we find out. 1 when the entry was the same before and after; 0 for anything
 * else, which pins decide: a reference that is pinned, an entry or a range that will not do, an entry that changed.
 */
static int copy_unpinned(const struct pv_mapper *mapper, const struct pv_grant_copy_op *op, uint8_t *local, uint64_t local_bytes)
{
	uint32_t index = op->gref - mapper->base, page;
	const uint64_t *shared;
	union entry_word seen;

	if (index >= mapper->n_pages || !is_inside(op, local_bytes) || is_pinned_now(mapper, index))
		return 0;
	shared = entry_of(mapper->entries, index);
	/* Takes the page over: pairs with the release in pv_grant_access. */
	seen.word = pv_load_acquire(shared);
	page = seen.entry.frame - mapper->base;
	if ((seen.entry.flags & ~PV_GTF_READONLY) != PV_GTF_PERMIT_ACCESS || seen.entry.domid != mapper->self || page >= mapper->n_pages)
		return 0;
	pv_copy_racing(local + op->local_offset, mapper->data + (uint64_t)page * PAGE_BYTES + op->offset, op->length);
	/* If a byte came from what the page was used for after it was revoked, this finds the revoked entry: pairs with the
	 * fence in pv_grant_revoke. */
	pv_fence_acquire();
	return pv_load_relaxed(shared) == seen.word;
}

static void copy_out(struct pv_mapper *mapper, struct pv_grant_copy_op *ops, uint32_t n, uint8_t *local, uint64_t local_bytes)
{
	struct outcome outcome = { 0 };

	for (uint32_t i = 0; i < n; i++) {
		if (!copy_unpinned(mapper, &ops[i], local, local_bytes)) {
			copy_part(mapper, &ops[i], 1, local, local_bytes, 0);
			continue;
		}
		ops[i].status = PV_GNTST_OKAY;
		note(&outcome, PV_GNTST_OKAY, ops[i].length);
	}
	pv_grant_begin(mapper);
	count(mapper, &outcome);
	pv_grant_end(mapper);
}

void pv_grant_copy(struct pv_mapper *mapper, struct pv_grant_copy_op *ops, uint32_t n, uint8_t *local, uint64_t local_bytes, int to_grant)
{
	if (to_grant)
		copy_all_pinned(mapper, ops, n, local, local_bytes, 1);
	else
		copy_out(mapper, ops, n, local, local_bytes);
}

/* ---- between pages ---- */

static int16_t copy_between(const struct pv_mapper *from, const struct pv_mapper *to, const struct pv_grant_copy_pair *op)
{
	const uint8_t *source = from->data + pinned_offset(from, op->from_gref) + op->from_offset;
	uint8_t *target = to->data + pinned_offset(to, op->to_gref) + op->to_offset;

	if (!is_in_page(op->from_offset, op->length) || !is_in_page(op->to_offset, op->length))
		return PV_GNTST_BAD_COPY_ARG;
	memmove(target, source, op->length);
	return PV_GNTST_OKAY;
}

static void copy_part_between(struct pv_mapper *from, struct pv_mapper *to, struct pv_grant_copy_pair *ops, uint32_t n)
{
	struct outcome outcome = { 0 };
	struct part source, target;

	begin_part(&source, from, 1);
	for (uint32_t i = 0; i < n; i++)
		if (ops[i].length)
			want(&source, i, ops[i].from_gref);
	pin_part(&source);
	begin_part(&target, to, 0);
	for (uint32_t i = 0; i < n; i++)
		if (ops[i].length && !status_of(&source, i))
			want(&target, i, ops[i].to_gref);
	pin_part(&target);
	for (uint32_t i = 0; i < n; i++) {
		ops[i].status = status_of(status_of(&source, i) ? &source : &target, i);
		if (ops[i].length && !ops[i].status)
			ops[i].status = copy_between(from, to, &ops[i]);
		note(&outcome, ops[i].status, ops[i].length);
	}
	pv_grant_begin(from);
	let_go(&source);
	pv_grant_end(from);
	pv_grant_begin(to);
	let_go(&target);
	count(to, &outcome);
	pv_grant_end(to);
}

void pv_grant_copy_between(struct pv_mapper *from, struct pv_mapper *to, struct pv_grant_copy_pair *ops, uint32_t n)
{
	for (; n > PART; n -= PART, ops += PART)
		copy_part_between(from, to, ops, PART);
	copy_part_between(from, to, ops, n);
}
