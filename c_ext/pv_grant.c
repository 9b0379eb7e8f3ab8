/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "pv_grant.h"

#include <errno.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include "grant_private.h"

#define MAX_TRIES 4          /* against a peer that flips an entry for ever (XSA-295) */
#define SPINS_BEFORE_YIELD 64

_Static_assert(sizeof(struct pv_grant_entry) == 8, "Xen v1 entry");
_Static_assert(sizeof(struct pv_grant_note) == 8, "note of a grant");
_Static_assert(sizeof(struct pv_pin) == 4, "maptrack row");
_Static_assert(sizeof(struct pv_maptrack) == 64, "maptrack header");
_Static_assert(sizeof(struct pv_grant_copy_op) == 24, "copy operation");
_Static_assert(sizeof(struct pv_grant_copy_pair) == 16, "copy operation between pages");

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

/* The first pin, or the first writer among readers: mark the entry as used. Fills *pinned on the first pin. */
static int set_flags(struct pv_mapper *mapper, uint32_t index, int first, int read_only)
{
	uint64_t *shared = entry_of(mapper->entries, index);
	struct pv_pinned *pinned = &mapper->pinned[index];
	const uint64_t bits = flag_bits(PV_GTF_READING | (read_only ? 0 : PV_GTF_WRITING));
	union entry_word seen;

	/* Takes the page over: pairs with the release in pv_grant_access. */
	seen.word = pv_load_acquire(shared);
	for (int tries = 0; tries < MAX_TRIES; tries++) {
		const struct pv_grant_entry entry = seen.entry;
		int status = first ? check_entry(mapper, entry, read_only) : PV_GNTST_OKAY;

		if (status)
			return status;
		if (!first && !read_only && ((pinned->flags | entry.flags) & PV_GTF_READONLY))
			return PV_GNTST_GENERAL_ERROR;
		if (pv_compare_exchange(shared, &seen.word, seen.word | bits)) {
			if (first)
				*pinned = (struct pv_pinned){ .frame = entry.frame, .flags = entry.flags };
			return PV_GNTST_OKAY;
		}
	}
	return PV_GNTST_GENERAL_ERROR;
}

/* Under the lock. The row is stored first, so that a process which dies in between leaves no bit without a row. */
int grant_pin_page(struct pv_mapper *mapper, uint32_t gref, int read_only)
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
int grant_unpin_page(struct pv_mapper *mapper, uint32_t gref, int read_only)
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
		status = grant_pin_page(mapper, gref, read_only);
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
	int status = grant_unpin_page(mapper, gref, read_only);

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
