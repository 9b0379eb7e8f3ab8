/* SPDX-License-Identifier: MIT */
#include "pv_blkfront.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "blkfront_private.h"

#define SECTOR_SHIFT 9
#define SLOT_BYTES ((uint64_t)SLOT_PAGES * PV_PAGE_BYTES)

/* Goes through the pages of a request, in order. */
struct cursor {
	uint32_t slot;
	uint32_t page;           /* in the slot */
};

void pv_blkfront_init(struct pv_blkfront *front)
{
	front->n_free = front->n_slots;
	front->n_held = 0;
	front->n_in_flight = 0;
	front->n_staged = 0;
	front->violation = 0;
	front->persistent = 0;
	front->purged_ms = 0;
	front->issued = front->granted_before = 0;
	memset(front->shadow, 0, sizeof(*front->shadow) * front->n_slots);
	for (uint32_t i = 0; i < front->n_slots; i++) {
		front->slots[i] = (struct pv_blkfront_slot){ .next = PV_BLKFRONT_NONE };
		front->free[i] = front->n_slots - 1 - i;
	}
}

static uint32_t pages_of(uint64_t length)
{
	return (uint32_t)((length + PV_PAGE_BYTES - 1) / PV_PAGE_BYTES);
}

/* Pages that hold the segments of so many pages. */
static uint32_t segment_pages_of(uint32_t n_pages)
{
	if (n_pages <= PV_BLKIF_MAX_SEGMENTS)
		return 0;
	return (n_pages + PV_BLKIF_INDIRECT_PAGE_SEGMENTS - 1) / PV_BLKIF_INDIRECT_PAGE_SEGMENTS;
}

uint32_t pv_blkfront_slots_of(uint64_t length)
{
	uint32_t n_pages = pages_of(length);

	n_pages += segment_pages_of(n_pages);
	return n_pages ? (n_pages + SLOT_PAGES - 1) / SLOT_PAGES : 1;
}

/* The number of the next page, counted from the first one of all slots. */
static uint32_t next_page(const struct pv_blkfront *front, struct cursor *cursor)
{
	if (cursor->page == SLOT_PAGES) {
		cursor->slot = front->slots[cursor->slot].next;
		cursor->page = 0;
	}
	return cursor->slot * SLOT_PAGES + cursor->page++;
}

static int is_write(uint32_t operation)
{
	return operation == PV_BLKIF_OP_WRITE || operation == PV_BLKIF_OP_WRITE_BARRIER;
}

/* The second byte of a request is nr_segments, flag or indirect_op. */
static uint8_t operation_of(const struct pv_blkif_request *request)
{
	return request->operation == PV_BLKIF_OP_INDIRECT ? request->nr_segments : request->operation;
}

/* The next segment: from the page where the last one ended, or from the middle of the caller's first one. */
static struct pv_blkif_segment segment_of(uint32_t gref, uint32_t first_sector, uint64_t left)
{
	uint64_t room = PV_PAGE_BYTES - ((uint64_t)first_sector << SECTOR_SHIFT), bytes = left < room ? left : room;

	return (struct pv_blkif_segment){ .gref = gref, .first_sect = (uint8_t)first_sector,
					  .last_sect = (uint8_t)(first_sector + (bytes >> SECTOR_SHIFT) - 1) };
}

static uint64_t segment_bytes(const struct pv_blkif_segment *segment)
{
	return (uint64_t)(segment->last_sect - segment->first_sect + 1) << SECTOR_SHIFT;
}

/* Pages of the data of a request, whosever they are. */
static uint32_t data_pages(uint64_t length, uint32_t first_sector)
{
	return pages_of(length + ((uint64_t)first_sector << SECTOR_SHIFT));
}

/* The segments of an indirect request, into the pages behind its data. */
static void write_segments(const struct pv_blkfront *front, uint32_t slot)
{
	uint64_t left = front->slots[slot].length;
	uint32_t gref = front->slots[slot].gref, first_sector = front->slots[slot].first_sector;
	uint32_t n = data_pages(left, first_sector), page = 0;
	struct cursor data = { slot, 0 }, segments = { slot, 0 };
	struct pv_blkif_indirect indirect;

	memcpy(&indirect, &front->shadow[slot], sizeof(indirect));
	for (uint32_t i = 0; i < n && !gref; i++)
		next_page(front, &segments);
	for (uint32_t i = 0; i < n; i++, first_sector = 0) {
		uint32_t at = i % PV_BLKIF_INDIRECT_PAGE_SEGMENTS;
		uint32_t ref = gref ? gref + i : front->first_gref + next_page(front, &data);
		struct pv_blkif_segment segment = segment_of(ref, first_sector, left);

		if (at == 0) {
			page = next_page(front, &segments);
			indirect.indirect_grefs[i / PV_BLKIF_INDIRECT_PAGE_SEGMENTS] = front->first_gref + page;
		}
		memcpy(front->pages + (uint64_t)page * PV_PAGE_BYTES + at * sizeof(segment), &segment, sizeof(segment));
		left -= segment_bytes(&segment);
	}
	memcpy(&front->shadow[slot], &indirect, sizeof(indirect));
}

/* Between the pages of a request, from byte `at` of its data on, and memory. */
static void copy(const struct pv_blkfront *front, uint32_t slot, uint64_t at, uint8_t *memory, uint64_t left, int out)
{
	for (; at >= SLOT_BYTES; at -= SLOT_BYTES)
		slot = front->slots[slot].next;
	for (; left > 0; at = 0) {
		uint64_t part = left < SLOT_BYTES - at ? left : SLOT_BYTES - at;
		uint8_t *page = front->pages + slot * SLOT_BYTES + at;

		memcpy(out ? memory : page, out ? page : memory, part);
		slot = front->slots[slot].next;
		memory += part;
		left -= part;
	}
}

void pv_blkfront_copy_in(const struct pv_blkfront *front, uint32_t slot, uint64_t at, const uint8_t *from, uint64_t length)
{
	copy(front, slot, at, (uint8_t *)(uintptr_t)from, length, 0);
}

void pv_blkfront_copy_out(const struct pv_blkfront *front, uint32_t slot, uint64_t at, uint8_t *to, uint64_t length)
{
	copy(front, slot, at, to, length, 1);
}

void pv_blkfront_gather(const struct pv_blkfront *front, uint32_t slot, uint8_t *to, uint64_t length)
{
	copy(front, slot, 0, to, length, 1);
}

static void fill_discard(struct pv_blkfront *front, uint32_t slot, const struct pv_blkfront_ask *ask)
{
	struct pv_blkif_discard discard = { .operation = PV_BLKIF_OP_DISCARD, .flag = (uint8_t)ask->flag, .id = slot,
					    .sector = ask->offset >> SECTOR_SHIFT,
					    .nr_sectors = ask->length >> SECTOR_SHIFT };

	memcpy(&front->shadow[slot], &discard, sizeof(discard));
}

static void fill_indirect(struct pv_blkfront *front, uint32_t slot, const struct pv_blkfront_ask *ask)
{
	struct pv_blkif_indirect indirect = { .operation = PV_BLKIF_OP_INDIRECT, .indirect_op = (uint8_t)ask->operation,
					      .nr_segments = (uint16_t)data_pages(ask->length, ask->first_sector),
					      .id = slot,
					      .sector = ask->offset >> SECTOR_SHIFT };

	memcpy(&front->shadow[slot], &indirect, sizeof(indirect));
	write_segments(front, slot);
}

static void fill_direct(struct pv_blkfront *front, uint32_t slot, const struct pv_blkfront_ask *ask)
{
	struct pv_blkif_request *request = &front->shadow[slot];
	uint64_t left = ask->length;
	uint32_t gref = ask->gref ? ask->gref : front->first_gref + slot * SLOT_PAGES;

	request->operation = (uint8_t)ask->operation;
	request->nr_segments = (uint8_t)data_pages(ask->length, ask->first_sector);
	request->handle = 0;
	request->id = slot;
	request->sector = ask->offset >> SECTOR_SHIFT;
	for (uint32_t i = 0; i < request->nr_segments; i++) {
		request->seg[i] = segment_of(gref + i, i ? 0 : ask->first_sector, left);
		left -= segment_bytes(&request->seg[i]);
	}
}

/* Pages of its own that a request takes: for its data, unless that is in the caller's, and for its segments. */
static uint32_t own_pages(const struct pv_blkfront_ask *ask)
{
	uint32_t n = ask->operation == PV_BLKIF_OP_DISCARD ? 0 : data_pages(ask->length, ask->first_sector);

	return (ask->gref ? 0 : n) + segment_pages_of(n);
}

static uint32_t slots_for(const struct pv_blkfront_ask *ask)
{
	uint32_t n = own_pages(ask);

	return n ? (n + SLOT_PAGES - 1) / SLOT_PAGES : 1;
}

static void fill(struct pv_blkfront *front, uint32_t slot, const struct pv_blkfront_ask *ask)
{
	front->slots[slot].length = ask->length;
	front->slots[slot].n_pages = own_pages(ask);
	front->slots[slot].gref = ask->gref;
	front->slots[slot].first_sector = ask->first_sector;
	if (ask->operation == PV_BLKIF_OP_DISCARD)
		fill_discard(front, slot, ask);
	else if (data_pages(ask->length, ask->first_sector) > PV_BLKIF_MAX_SEGMENTS)
		fill_indirect(front, slot, ask);
	else
		fill_direct(front, slot, ask);
	if (ask->data && !ask->gref)
		pv_blkfront_copy_in(front, slot, 0, (const uint8_t *)(uintptr_t)ask->data, ask->length);
}

/* Take back the grants of the first `n` pages of a request, but those that stay. 0, or -EBUSY when the backend still holds
 * one. */
static int revoke(struct pv_blkfront *front, uint32_t slot, uint32_t n)
{
	struct cursor cursor = { slot, 0 };
	int busy = 0;

	for (uint32_t i = 0; i < n; i++)
		if (blkfront_revoke_page(front, next_page(front, &cursor)) == -EBUSY)
			busy = -EBUSY;
	return busy;
}

/* The backend writes the pages of a read; it reads those of a write, and those with segments. */
static int grant(struct pv_blkfront *front, uint32_t slot)
{
	uint32_t n = front->slots[slot].n_pages;
	uint32_t n_segments = data_pages(front->slots[slot].length, front->slots[slot].first_sector);
	uint32_t n_data = n && !front->slots[slot].gref ? n_segments : 0;
	int read_only = is_write(operation_of(&front->shadow[slot]));
	uint64_t left = n_data ? front->slots[slot].length : 0;
	struct cursor cursor = { slot, 0 };

	for (uint32_t i = 0; i < n; i++) {
		int error;

		if (i == n_data)
			left = (uint64_t)n_segments * sizeof(struct pv_blkif_segment);
		error = blkfront_grant_page(front, next_page(front, &cursor), left, read_only || i >= n_data);
		left -= left < PV_PAGE_BYTES ? left : PV_PAGE_BYTES;
		if (error) {
			revoke(front, slot, i);
			return error;
		}
	}
	return 0;
}

/* `n` slots, chained; the first one. There are that many. */
static uint32_t take_slots(struct pv_blkfront *front, uint32_t n)
{
	uint32_t first = front->free[--front->n_free], last = first;

	while (--n > 0) {
		uint32_t slot = front->free[--front->n_free];

		front->slots[last].next = slot;
		last = slot;
	}
	front->slots[last].next = PV_BLKFRONT_NONE;
	return first;
}

static void give_slots(struct pv_blkfront *front, uint32_t slot)
{
	for (; slot != PV_BLKFRONT_NONE; slot = front->slots[slot].next)
		front->free[front->n_free++] = slot;
}

/* It is in flight no longer. What the backend holds on to stays out of use. */
static void release(struct pv_blkfront *front, uint32_t slot)
{
	front->slots[slot].sequence = 0;
	front->n_in_flight--;
	if (revoke(front, slot, front->slots[slot].n_pages))
		front->held[front->n_held++] = slot;
	else
		give_slots(front, slot);
}

/* Undo what was staged. The backend cannot have used it, but can have set bits: then it stays out. */
static void withdraw(struct pv_blkfront *front)
{
	while (front->n_staged > 0)
		release(front, (uint32_t)front->batch[--front->n_staged].id);
}

/* Whether it can be a request. */
static int is_sound(const struct pv_blkfront_ask *ask)
{
	uint64_t most = ask->operation == PV_BLKIF_OP_WRITE_BARRIER ? PV_BLKIF_MAX_SEGMENTS : PV_BLKIF_MAX_INDIRECT_SEGMENTS;

	if (ask->operation == PV_BLKIF_OP_DISCARD)
		return 1;
	return ask->first_sector < PV_PAGE_BYTES >> SECTOR_SHIFT && ask->length <= most * PV_PAGE_BYTES &&
	       data_pages(ask->length, ask->first_sector) <= most;
}

int pv_blkfront_stage(struct pv_blkfront *front, const struct pv_blkfront_ask *ask, uint32_t *slot)
{
	uint32_t first;
	int error;

	if (!is_sound(ask))
		return -EINVAL;
	if (slots_for(ask) > front->n_free)
		return -ENOSPC;
	if (!front->n_staged)
		front->now_ms = pv_grant_now(front->granter);
	first = take_slots(front, slots_for(ask));
	fill(front, first, ask);
	error = grant(front, first);
	if (error) {
		give_slots(front, first);
		return error;
	}
	*slot = first;
	front->slots[first].sequence = ++front->issued;
	front->n_in_flight++;
	front->batch[front->n_staged++] = front->shadow[first];
	return 0;
}

int64_t pv_blkfront_send(struct pv_blkfront *front, struct pv_ring *ring)
{
	int64_t pushed = front->n_staged <= pv_ring_room(ring) ? pv_ring_push(ring, front->batch, front->n_staged) : -ENOSPC;

	if (pushed < 0)
		withdraw(front);
	front->n_staged = 0;
	return pushed;
}

int64_t pv_blkfront_issue(struct pv_blkfront *front, struct pv_ring *ring, const struct pv_blkfront_ask *asks, uint32_t n,
			  uint32_t *slots)
{
	uint64_t wanted = 0;

	for (uint32_t i = 0; i < n; i++) {
		if (!is_sound(&asks[i]))
			return -EINVAL;
		wanted += slots_for(&asks[i]);
	}
	if (wanted > front->n_free || n > pv_ring_room(ring))
		return -ENOSPC;
	for (uint32_t i = 0; i < n; i++) {
		int error = pv_blkfront_stage(front, &asks[i], &slots[i]);

		if (error) {
			withdraw(front);
			return error;
		}
	}
	return pv_blkfront_send(front, ring);
}

struct issued {
	uint64_t sequence;
	uint32_t slot;
};

static int by_age(const void *a, const void *b)
{
	const struct issued *left = a, *right = b;

	return left->sequence < right->sequence ? -1 : left->sequence > right->sequence;
}

int64_t pv_blkfront_reissue(struct pv_blkfront *front, struct pv_ring *ring)
{
	struct issued *order;
	uint32_t n = 0;
	int64_t pushed;

	if (front->n_in_flight > pv_ring_room(ring))
		return -ENOSPC;
	order = malloc(sizeof(*order) * (front->n_slots ? front->n_slots : 1));
	if (!order)
		return -ENOMEM;
	for (uint32_t slot = 0; slot < front->n_slots; slot++) {
		if (front->slots[slot].sequence) {
			order[n].sequence = front->slots[slot].sequence;
			order[n++].slot = slot;
		}
	}
	qsort(order, n, sizeof(*order), by_age);
	for (uint32_t i = 0; i < n; i++) {
		/* What stands in shared pages may have been written by the backend that is gone. */
		if (front->shadow[order[i].slot].operation == PV_BLKIF_OP_INDIRECT)
			write_segments(front, order[i].slot);
		front->batch[i] = front->shadow[order[i].slot];
	}
	free(order);
	pushed = n ? pv_ring_push(ring, front->batch, n) : 0;
	return pushed;
}

uint32_t pv_blkfront_reclaim(struct pv_blkfront *front)
{
	uint32_t kept = 0;

	for (uint32_t i = 0; i < front->n_held; i++) {
		uint32_t slot = front->held[i];

		if (revoke(front, slot, front->slots[slot].n_pages))
			front->held[kept++] = slot;
		else
			give_slots(front, slot);
	}
	front->n_held = kept;
	return front->n_free;
}

/* 0, or PV_BLKFRONT_*. */
static uint16_t check(const struct pv_blkfront *front, const struct pv_blkif_response *response)
{
	if (response->id >= front->n_slots || !front->slots[response->id].sequence)
		return PV_BLKFRONT_UNKNOWN_ID;
	if (response->operation != operation_of(&front->shadow[response->id]))
		return PV_BLKFRONT_WRONG_OPERATION;
	if (response->status > PV_BLKIF_RSP_OKAY || response->status < PV_BLKIF_RSP_EOPNOTSUPP)
		return PV_BLKFRONT_UNKNOWN_STATUS;
	return 0;
}

static void count(const struct pv_blkfront *front, uint32_t slot, int16_t status, struct pv_blkif_counters *counters)
{
	uint64_t length = front->slots[slot].length;

	if (status != PV_BLKIF_RSP_OKAY) {
		counters->errors++;
		return;
	}
	switch (operation_of(&front->shadow[slot])) {
	case PV_BLKIF_OP_READ:
		counters->reads++;
		counters->read_bytes += length;
		counters->copied_bytes += front->slots[slot].gref ? 0 : length;
		break;
	case PV_BLKIF_OP_WRITE_BARRIER:
		counters->barriers++;
		/* fallthrough */
	case PV_BLKIF_OP_WRITE:
		counters->writes++;
		counters->written_bytes += length;
		counters->copied_bytes += front->slots[slot].gref ? 0 : length;
		break;
	case PV_BLKIF_OP_DISCARD:
		counters->discards++;
		counters->discarded_bytes += length;
		break;
	default:
		counters->flushes++;
	}
}

uint32_t pv_blkfront_complete(struct pv_blkfront *front, const struct pv_blkif_response *responses, uint32_t n,
			      struct pv_blkfront_answer *answers)
{
	struct pv_blkif_counters done = { 0 };
	uint32_t i;

	if (front->n_held)
		pv_blkfront_reclaim(front);
	if (front->persistent)
		blkfront_purge_now_and_then(front);
	for (i = 0; i < n; i++)
		if (responses[i].id < front->n_slots)
			pv_grant_expect_back(front->granter, front->first_gref + (uint32_t)responses[i].id * SLOT_PAGES);
	for (i = 0; i < n; i++) {
		uint32_t slot;

		front->violation = check(front, &responses[i]);
		if (front->violation) {
			front->wrong = responses[i];
			break;
		}
		slot = (uint32_t)responses[i].id;
		answers[i].slot = slot;
		answers[i].status = responses[i].status;
		count(front, slot, responses[i].status, &done);
		/* A backend that answers before it lets go of a page could still write into it: not for another use. */
		release(front, slot);
	}
	pv_blkif_count(front->counters, &done);
	return i;
}

int64_t pv_blkfront_exchange(struct pv_blkfront *front, struct pv_ring *ring, const struct pv_blkfront_ask *ask,
			     int64_t spin_ns, uint32_t *slot, struct pv_blkfront_answer *answer)
{
	struct pv_blkif_response response;
	int64_t pushed = pv_blkfront_issue(front, ring, ask, 1, slot);
	int64_t taken;

	if (pushed < 0)
		return pushed;
	/* A backend that could not be told will not answer: the caller tells it first. */
	if (pushed >> 32)
		return pushed >> 32 << 32 | PV_BLKFRONT_IN_FLIGHT;
	taken = pv_ring_take_spin(ring, &response, 1, spin_ns);
	if (taken <= 0)
		return taken < 0 ? taken : PV_BLKFRONT_IN_FLIGHT;
	return pv_blkfront_complete(front, &response, 1, answer) == 1 ? PV_BLKFRONT_ANSWERED : PV_BLKFRONT_WRONG;
}
