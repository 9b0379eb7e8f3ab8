/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "pv_grant.h"

#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "pv_atomic.h"

#define PAGE_BYTES 4096u
#define MAX_TRIES 4          /* against a peer that flips an entry for ever (XSA-295) */
#define SPINS_BEFORE_YIELD 64

_Static_assert(sizeof(struct pv_grant_entry) == 8, "Xen v1 entry");
_Static_assert(sizeof(struct pv_grant_note) == 8, "note of a grant");
_Static_assert(sizeof(struct pv_pin) == 4, "maptrack row");
_Static_assert(sizeof(struct pv_maptrack) == 64, "maptrack header");
_Static_assert(sizeof(struct pv_grant_copy_op) == 24, "copy operation");
_Static_assert(sizeof(struct pv_grant_copy_pair) == 16, "copy operation between pages");

/* An entry is one 64-bit word to everybody: one load gives flags, domid and frame of the same moment. */
union entry_word {
	struct pv_grant_entry entry;
	uint64_t word;
};

static uint64_t *entry_of(struct pv_grant_entry *entries, uint32_t index)
{
	return (uint64_t *)(void *)&entries[index];
}

static uint64_t flag_bits(uint16_t flags)
{
	union entry_word bits = { .entry = { .flags = flags } };

	return bits.word;
}

/* ---- the granter ---- */

/* The coarse clock: a few loads, as exact as somebody who looks on needs. Never 0. */
static uint32_t now_ms(void)
{
	struct timespec now;
	uint32_t ms;

	clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	ms = (uint32_t)now.tv_sec * 1000u + (uint32_t)(now.tv_nsec / 1000000);
	return ms | !ms;
}

uint32_t pv_grant_now(const struct pv_granter *granter)
{
	return granter->notes ? now_ms() : 0;
}

static void note_grant(struct pv_granter *granter, uint32_t index, uint32_t ms)
{
	struct pv_grant_note *note = &granter->notes[index];

	pv_store_relaxed(&note->granted_ms, ms);
	pv_store_relaxed(&note->recalled_ms, 0u);
}

static void note_recall(struct pv_granter *granter, uint32_t index)
{
	struct pv_grant_note *note = &granter->notes[index];

	if (!pv_load_relaxed(&note->recalled_ms))
		pv_store_relaxed(&note->recalled_ms, now_ms());
}

/* Counted page by page: one thread at a time has one, so no two wait for each other's count. */
static void count_turn(struct pv_grant_private *granted)
{
	pv_store_relaxed(&granted->turns, granted->turns + 1);
}

void pv_grant_counts(const struct pv_granter *granter, uint64_t *grants, uint64_t *revokes)
{
	*grants = *revokes = 0;
	for (uint32_t i = 0; i < granter->n_pages; i++) {
		uint64_t turns = pv_load_relaxed(&granter->granted[i].turns);

		*grants += turns / 2 + turns % 2;
		*revokes += turns / 2;
	}
}

int pv_grant_access_at(struct pv_granter *granter, uint32_t gref, uint16_t domid, uint32_t frame, int read_only, uint32_t ms)
{
	struct pv_grant_private *granted;
	uint32_t index = gref - granter->base;
	uint16_t flags = PV_GTF_PERMIT_ACCESS | (read_only ? PV_GTF_READONLY : 0);
	union entry_word next = { .entry = { .flags = flags, .domid = domid, .frame = frame } };

	if (index >= granter->n_pages || frame - granter->base >= granter->n_pages)
		return -EINVAL;
	granted = &granter->granted[index];
	if (granted->flags)
		return -EBUSY;
	granted->frame = frame;
	granted->flags = flags;
	granted->domid = domid;
	count_turn(granted);
	if (granter->notes)
		note_grant(granter, index, ms);
	/* Hands the page over: pairs with the load in set_flags. */
	pv_store_release(entry_of(granter->entries, index), next.word);
	return 0;
}

int pv_grant_access(struct pv_granter *granter, uint32_t gref, uint16_t domid, uint32_t frame, int read_only)
{
	return pv_grant_access_at(granter, gref, domid, frame, read_only, pv_grant_now(granter));
}

int pv_grant_revoke(struct pv_granter *granter, uint32_t gref)
{
	uint32_t index = gref - granter->base;
	union entry_word seen;

	if (index >= granter->n_pages || !granter->granted[index].flags)
		return -EINVAL;
	seen.word = pv_load_relaxed(entry_of(granter->entries, index));
	for (int tries = 0; tries < MAX_TRIES; tries++) {
		if (seen.entry.flags & (PV_GTF_READING | PV_GTF_WRITING))
			break;
		/* Takes the page back: the mapper's last access came before clear_flags, which this compare-exchange reads. */
		if (pv_compare_exchange(entry_of(granter->entries, index), &seen.word, 0)) {
			/* What the page is used for next comes after: pairs with the fence in copy_unpinned. */
			pv_fence_release();
			granter->granted[index].flags = 0;
			count_turn(&granter->granted[index]);
			return 0;
		}
	}
	if (granter->notes)
		note_recall(granter, index);
	pv_count(&granter->busy);
	return -EBUSY;
}

uint32_t pv_grant_access_many(struct pv_granter *granter, const uint32_t *grefs, uint32_t n, uint16_t domid, int read_only)
{
	uint32_t done = 0, ms = pv_grant_now(granter);

	while (done < n && pv_grant_access_at(granter, grefs[done], domid, grefs[done], read_only, ms) == 0)
		done++;
	return done;
}

void pv_grant_expect_back(const struct pv_granter *granter, uint32_t gref)
{
	if (gref - granter->base < granter->n_pages)
		pv_prefetch_write(&granter->entries[gref - granter->base]);
}

uint32_t pv_grant_revoke_many(struct pv_granter *granter, uint32_t *grefs, uint32_t n)
{
	uint32_t kept = 0;

	for (uint32_t i = 0; i < n; i++)
		if (pv_grant_revoke(granter, grefs[i]))
			grefs[kept++] = grefs[i];
	return kept;
}

int pv_grant_in_use(struct pv_granter *granter, uint32_t gref)
{
	uint32_t index = gref - granter->base;
	union entry_word seen;

	if (index >= granter->n_pages)
		return -EINVAL;
	seen.word = pv_load_relaxed(entry_of(granter->entries, index));
	return seen.entry.flags & (PV_GTF_READING | PV_GTF_WRITING);
}

/* ---- the mapper ---- */

static void lock_mapper(struct pv_mapper *mapper)
{
	for (uint32_t spins = 0; pv_exchange(&mapper->lock, 1u); spins++) {
		if (spins < SPINS_BEFORE_YIELD)
			pv_pause();
		else
			sched_yield();
	}
}

static void unlock_mapper(struct pv_mapper *mapper)
{
	pv_store_release(&mapper->lock, 0u);
}

static int is_pinned(const struct pv_pin *pin)
{
	return pin->readers || pin->writers;
}

/* The first pin, or the first writer among readers: mark the entry as used. Fills *pinned on the first pin. */
static int set_flags(struct pv_mapper *mapper, uint32_t index, int first, int read_only)
{
	uint64_t *shared = entry_of(mapper->entries, index);
	struct pv_pinned *pinned = &mapper->pinned[index];
	union entry_word seen, next;

	/* Takes the page over: pairs with the release in pv_grant_access. */
	seen.word = pv_load_acquire(shared);
	for (int tries = 0; tries < MAX_TRIES; tries++) {
		const struct pv_grant_entry entry = seen.entry;
		uint16_t type = entry.flags & (PV_GTF_TYPE_MASK | PV_GTF_SUB_PAGE);
		uint16_t granted = first ? entry.flags : pinned->flags | entry.flags;

		if (first && (type != PV_GTF_PERMIT_ACCESS || entry.domid != mapper->self))
			return PV_GNTST_GENERAL_ERROR;
		if (!read_only && (granted & PV_GTF_READONLY))
			return PV_GNTST_GENERAL_ERROR;
		if (first && entry.frame - mapper->base >= mapper->n_pages)
			return PV_GNTST_BAD_PAGE;
		next = seen;
		next.entry.flags |= PV_GTF_READING | (read_only ? 0 : PV_GTF_WRITING);
		if (pv_compare_exchange(shared, &seen.word, next.word)) {
			if (first)
				*pinned = (struct pv_pinned){ .frame = entry.frame, .flags = entry.flags };
			return PV_GNTST_OKAY;
		}
	}
	return PV_GNTST_GENERAL_ERROR;
}

/* Under the lock. The row is stored first, so that a process which dies in between leaves no bit without a row. */
static int pin_page(struct pv_mapper *mapper, uint32_t gref, int read_only)
{
	uint32_t index = gref - mapper->base;
	int status = PV_GNTST_OKAY, first;
	struct pv_pin *pin;
	uint16_t *count;

	if (index >= mapper->n_pages)
		return PV_GNTST_BAD_GNTREF;
	pin = &mapper->pins[index];
	count = read_only ? &pin->readers : &pin->writers;
	if (*count == UINT16_MAX || (!read_only && mapper->read_only))
		return PV_GNTST_GENERAL_ERROR;
	first = !is_pinned(pin);
	pv_store_relaxed(count, (uint16_t)(*count + 1));
	pv_fence_compiler();
	if (first || (!read_only && pin->writers == 1))
		status = set_flags(mapper, index, first, read_only);
	if (status)
		pv_store_relaxed(count, (uint16_t)(*count - 1));
	else if (first)
		mapper->pinned_pages++;
	return status;
}

/* Under the lock. The bits go first, then the row. */
static int unpin_page(struct pv_mapper *mapper, uint32_t gref, int read_only)
{
	uint32_t index = gref - mapper->base;
	uint16_t *count, done = 0;
	struct pv_pin *pin;
	int last;

	if (index >= mapper->n_pages)
		return PV_GNTST_BAD_HANDLE;
	pin = &mapper->pins[index];
	count = read_only ? &pin->readers : &pin->writers;
	if (!*count)
		return PV_GNTST_BAD_HANDLE;
	last = pin->readers + pin->writers == 1;
	if (!read_only && pin->writers == 1)
		done |= PV_GTF_WRITING;
	if (last)
		done |= PV_GTF_READING;
	/* Gives the page back: our accesses come before; pairs with the compare-exchange in pv_grant_revoke. */
	if (done)
		pv_fetch_and(entry_of(mapper->entries, index), ~flag_bits(done));
	pv_fence_compiler();
	pv_store_relaxed(count, (uint16_t)(*count - 1));
	if (last)
		mapper->pinned_pages--;
	return PV_GNTST_OKAY;
}

/* Byte offset of a page we hold a pin of: from the private copy, never from the entry. */
static uint64_t pinned_offset(const struct pv_mapper *mapper, uint32_t gref)
{
	return (uint64_t)(mapper->pinned[gref - mapper->base].frame - mapper->base) * PAGE_BYTES;
}

void pv_grant_begin(struct pv_mapper *mapper)
{
	lock_mapper(mapper);
}

void pv_grant_end(struct pv_mapper *mapper)
{
	unlock_mapper(mapper);
}

int pv_grant_map_next(struct pv_mapper *mapper, uint32_t gref, int read_only, uint64_t *frame_offset)
{
	int status = PV_GNTST_NO_SPACE;

	if (!mapper->max_handles || mapper->maps - mapper->unmaps < mapper->max_handles)
		status = pin_page(mapper, gref, read_only);
	if (status) {
		mapper->failures++;
		return status;
	}
	*frame_offset = pinned_offset(mapper, gref);
	mapper->maps++;
	return status;
}

int pv_grant_unmap_next(struct pv_mapper *mapper, uint32_t gref, int read_only)
{
	int status = unpin_page(mapper, gref, read_only);

	if (status)
		mapper->failures++;
	else
		mapper->unmaps++;
	return status;
}

void pv_grant_expect(const struct pv_mapper *mapper, uint32_t gref)
{
	if (gref - mapper->base < mapper->n_pages)
		pv_prefetch_write(&mapper->entries[gref - mapper->base]);
}

int pv_grant_map(struct pv_mapper *mapper, uint32_t gref, int read_only, uint64_t *frame_offset)
{
	int status;

	lock_mapper(mapper);
	status = pv_grant_map_next(mapper, gref, read_only, frame_offset);
	unlock_mapper(mapper);
	return status;
}

int pv_grant_unmap(struct pv_mapper *mapper, uint32_t gref, int read_only)
{
	int status;

	lock_mapper(mapper);
	status = pv_grant_unmap_next(mapper, gref, read_only);
	unlock_mapper(mapper);
	return status;
}

/* ---- copies ---- */

static int is_in_range(const struct pv_grant_copy_op *op, uint64_t local_bytes)
{
	return (uint32_t)op->offset + op->length <= PAGE_BYTES && op->local_offset <= local_bytes &&
	       op->length <= local_bytes - op->local_offset;
}

static int16_t copy_pinned(struct pv_mapper *mapper, const struct pv_grant_copy_op *op, uint8_t *local, uint64_t local_bytes, int to_grant)
{
	uint8_t *page = mapper->data + pinned_offset(mapper, op->gref) + op->offset;

	if (!is_in_range(op, local_bytes))
		return PV_GNTST_BAD_COPY_ARG;
	if (to_grant)
		memcpy(page, local + op->local_offset, op->length);
	else
		memcpy(local + op->local_offset, page, op->length);
	return PV_GNTST_OKAY;
}

/*
 * Operations go in parts: all references of a part are pinned, then all is copied, then all are let go. Between the copies
 * stands no atomic access that would wait for the stores of the copy before.
 */
#define PART 16u

/* The references that a part of a batch keeps pinned; neighbours with one reference share the pin. */
struct held {
	struct pv_mapper *mapper;
	int read_only;
	uint32_t n;
	uint32_t grefs[PART];
};

/* Under the lock. */
static int16_t hold(struct held *held, uint32_t gref)
{
	int status;

	if (held->n && held->grefs[held->n - 1] == gref)
		return PV_GNTST_OKAY;
	status = pin_page(held->mapper, gref, held->read_only);
	if (!status)
		held->grefs[held->n++] = gref;
	return (int16_t)status;
}

/* Under the lock. */
static void let_go(struct held *held)
{
	while (held->n)
		unpin_page(held->mapper, held->grefs[--held->n], held->read_only);
}

/* Under the lock. What became of one operation. */
static void count_copy(struct pv_mapper *mapper, int status, uint16_t length)
{
	mapper->failures += status != 0;
	mapper->copies += !status;
	mapper->copied_bytes += status ? 0 : length;
}

static void copy_part(struct pv_mapper *mapper, struct pv_grant_copy_op *ops, uint32_t n, uint8_t *local, uint64_t local_bytes, int to_grant)
{
	struct held held = { .mapper = mapper, .read_only = !to_grant };

	lock_mapper(mapper);
	for (uint32_t i = 0; i < n; i++)
		ops[i].status = ops[i].length ? hold(&held, ops[i].gref) : PV_GNTST_OKAY;
	unlock_mapper(mapper);
	for (uint32_t i = 0; i < n; i++)
		if (ops[i].length && !ops[i].status)
			ops[i].status = copy_pinned(mapper, &ops[i], local, local_bytes, to_grant);
	lock_mapper(mapper);
	let_go(&held);
	for (uint32_t i = 0; i < n; i++)
		count_copy(mapper, ops[i].status, ops[i].length);
	unlock_mapper(mapper);
}

static void copy_all_pinned(struct pv_mapper *mapper, struct pv_grant_copy_op *ops, uint32_t n, uint8_t *local, uint64_t local_bytes, int to_grant)
{
	for (; n > PART; n -= PART, ops += PART)
		copy_part(mapper, ops, PART, local, local_bytes, to_grant);
	copy_part(mapper, ops, n, local, local_bytes, to_grant);
}

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

	if (index >= mapper->n_pages || !is_in_range(op, local_bytes) || is_pinned_now(mapper, index))
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
	uint64_t copies = 0, bytes = 0;

	for (uint32_t i = 0; i < n; i++) {
		if (!copy_unpinned(mapper, &ops[i], local, local_bytes)) {
			copy_part(mapper, &ops[i], 1, local, local_bytes, 0);
			continue;
		}
		ops[i].status = PV_GNTST_OKAY;
		copies++;
		bytes += ops[i].length;
	}
	lock_mapper(mapper);
	mapper->copies += copies;
	mapper->copied_bytes += bytes;
	unlock_mapper(mapper);
}

void pv_grant_copy(struct pv_mapper *mapper, struct pv_grant_copy_op *ops, uint32_t n, uint8_t *local, uint64_t local_bytes, int to_grant)
{
	if (to_grant)
		copy_all_pinned(mapper, ops, n, local, local_bytes, 1);
	else
		copy_out(mapper, ops, n, local, local_bytes);
}

static int16_t copy_between(const struct pv_mapper *from, const struct pv_mapper *to, const struct pv_grant_copy_pair *op)
{
	const uint8_t *source = from->data + pinned_offset(from, op->from_gref) + op->from_offset;
	uint8_t *target = to->data + pinned_offset(to, op->to_gref) + op->to_offset;

	if ((uint32_t)op->from_offset + op->length > PAGE_BYTES || (uint32_t)op->to_offset + op->length > PAGE_BYTES)
		return PV_GNTST_BAD_COPY_ARG;
	memmove(target, source, op->length);
	return PV_GNTST_OKAY;
}

static void copy_part_between(struct pv_mapper *from, struct pv_mapper *to, struct pv_grant_copy_pair *ops, uint32_t n)
{
	struct held source = { .mapper = from, .read_only = 1 }, target = { .mapper = to };

	lock_mapper(from);
	for (uint32_t i = 0; i < n; i++)
		ops[i].status = ops[i].length ? hold(&source, ops[i].from_gref) : PV_GNTST_OKAY;
	unlock_mapper(from);
	lock_mapper(to);
	for (uint32_t i = 0; i < n; i++)
		if (ops[i].length && !ops[i].status)
			ops[i].status = hold(&target, ops[i].to_gref);
	unlock_mapper(to);
	for (uint32_t i = 0; i < n; i++)
		if (ops[i].length && !ops[i].status)
			ops[i].status = copy_between(from, to, &ops[i]);
	lock_mapper(from);
	let_go(&source);
	unlock_mapper(from);
	lock_mapper(to);
	let_go(&target);
	for (uint32_t i = 0; i < n; i++)
		count_copy(to, ops[i].status, ops[i].length);
	unlock_mapper(to);
}

void pv_grant_copy_between(struct pv_mapper *from, struct pv_mapper *to, struct pv_grant_copy_pair *ops, uint32_t n)
{
	for (; n > PART; n -= PART, ops += PART)
		copy_part_between(from, to, ops, PART);
	copy_part_between(from, to, ops, n);
}

/* ---- the broker ---- */

static uint16_t bits_others_hold(uint32_t index, struct pv_pin **others, uint32_t n_others)
{
	uint16_t bits = 0;

	for (uint32_t i = 0; i < n_others; i++) {
		uint16_t readers = pv_load_acquire(&others[i][index].readers);
		uint16_t writers = pv_load_acquire(&others[i][index].writers);

		if (readers || writers)
			bits |= PV_GTF_READING;
		if (writers)
			bits |= PV_GTF_WRITING;
	}
	return bits;
}

uint32_t pv_grant_release(
	struct pv_grant_entry *entries, uint32_t n_pages, struct pv_pin *pins, struct pv_pin **others, uint32_t n_others)
{
	uint32_t cleared = 0;

	for (uint32_t index = 0; index < n_pages; index++) {
		const struct pv_pin row = { pv_load_relaxed(&pins[index].readers), pv_load_relaxed(&pins[index].writers) };
		uint16_t kept;

		if (!is_pinned(&row))
			continue;
		kept = bits_others_hold(index, others, n_others);
		pv_fetch_and(entry_of(entries, index), ~flag_bits((PV_GTF_READING | PV_GTF_WRITING) & ~kept));
		/* Another process may have pinned between the look and the clear: its row came before its bits. */
		kept = bits_others_hold(index, others, n_others) & ~kept;
		if (kept)
			pv_fetch_or(entry_of(entries, index), flag_bits(kept));
		pv_store_relaxed(&pins[index].readers, 0);
		pv_store_relaxed(&pins[index].writers, 0);
		cleared++;
	}
	return cleared;
}

int pv_map_pages(void *address, uint64_t n_bytes, int fd, uint64_t offset, int read_only)
{
	int protection = read_only ? PROT_READ : PROT_READ | PROT_WRITE;
	void *mapped = mmap(address, n_bytes, protection, MAP_SHARED | MAP_FIXED, fd, (off_t)offset);

	if (mapped == MAP_FAILED || madvise(mapped, n_bytes, MADV_DONTFORK))
		return -errno;
	return 0;
}
