/* SPDX-License-Identifier: MIT */
#include "pv_blkfront.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SECTOR_SHIFT 9
#define SLOT_PAGES PV_BLKIF_MAX_SEGMENTS
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
	front->violation = 0;
	front->issued = 0;
	front->reads = front->writes = front->flushes = front->discards = 0;
	front->read_bytes = front->written_bytes = front->errors = 0;
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

static uint8_t *slot_memory(const struct pv_blkfront *front, uint32_t slot)
{
	return front->pages + slot * SLOT_BYTES;
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

static struct pv_blkif_segment segment_of(const struct pv_blkfront *front, uint32_t page, uint64_t left)
{
	uint32_t bytes = left < PV_PAGE_BYTES ? (uint32_t)left : PV_PAGE_BYTES;

	return (struct pv_blkif_segment){ .gref = front->first_gref + page,
					  .last_sect = (uint8_t)((bytes >> SECTOR_SHIFT) - 1) };
}

/* The segments of an indirect request, into the pages behind its data. */
static void write_segments(const struct pv_blkfront *front, uint32_t slot)
{
	uint64_t left = front->slots[slot].length;
	uint32_t n = pages_of(left), page = 0;
	struct cursor data = { slot, 0 }, segments = { slot, 0 };
	struct pv_blkif_indirect indirect;

	memcpy(&indirect, &front->shadow[slot], sizeof(indirect));
	for (uint32_t i = 0; i < n; i++)
		next_page(front, &segments);
	for (uint32_t i = 0; i < n; i++, left -= PV_PAGE_BYTES) {
		uint32_t at = i % PV_BLKIF_INDIRECT_PAGE_SEGMENTS;
		struct pv_blkif_segment segment = segment_of(front, next_page(front, &data), left);

		if (at == 0) {
			page = next_page(front, &segments);
			indirect.indirect_grefs[i / PV_BLKIF_INDIRECT_PAGE_SEGMENTS] = front->first_gref + page;
		}
		memcpy(front->pages + (uint64_t)page * PV_PAGE_BYTES + at * sizeof(segment), &segment, sizeof(segment));
	}
	memcpy(&front->shadow[slot], &indirect, sizeof(indirect));
}

static void write_data(const struct pv_blkfront *front, uint32_t slot, const uint8_t *from, uint64_t left)
{
	while (left > 0) {
		uint64_t part = left < SLOT_BYTES ? left : SLOT_BYTES;

		memcpy(slot_memory(front, slot), from, part);
		slot = front->slots[slot].next;
		from += part;
		left -= part;
	}
}

void pv_blkfront_gather(const struct pv_blkfront *front, uint32_t slot, uint8_t *to, uint64_t left)
{
	while (left > 0) {
		uint64_t part = left < SLOT_BYTES ? left : SLOT_BYTES;

		memcpy(to, slot_memory(front, slot), part);
		slot = front->slots[slot].next;
		to += part;
		left -= part;
	}
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
					      .nr_segments = (uint16_t)pages_of(ask->length), .id = slot,
					      .sector = ask->offset >> SECTOR_SHIFT };

	memcpy(&front->shadow[slot], &indirect, sizeof(indirect));
	write_segments(front, slot);
}

static void fill_direct(struct pv_blkfront *front, uint32_t slot, const struct pv_blkfront_ask *ask)
{
	struct pv_blkif_request *request = &front->shadow[slot];
	uint64_t left = ask->length;

	request->operation = (uint8_t)ask->operation;
	request->nr_segments = (uint8_t)pages_of(ask->length);
	request->handle = 0;
	request->id = slot;
	request->sector = ask->offset >> SECTOR_SHIFT;
	for (uint32_t i = 0; i < request->nr_segments; i++, left -= PV_PAGE_BYTES)
		request->seg[i] = segment_of(front, slot * SLOT_PAGES + i, left);
}

static void fill(struct pv_blkfront *front, uint32_t slot, const struct pv_blkfront_ask *ask)
{
	uint32_t n_pages = ask->operation == PV_BLKIF_OP_DISCARD ? 0 : pages_of(ask->length);

	front->slots[slot].length = ask->length;
	front->slots[slot].n_pages = n_pages + segment_pages_of(n_pages);
	if (ask->operation == PV_BLKIF_OP_DISCARD)
		fill_discard(front, slot, ask);
	else if (n_pages > PV_BLKIF_MAX_SEGMENTS)
		fill_indirect(front, slot, ask);
	else
		fill_direct(front, slot, ask);
	if (ask->data)
		write_data(front, slot, (const uint8_t *)(uintptr_t)ask->data, ask->length);
}

/* Take back the grants of the first `n` pages of a request. 0, or -EBUSY when the backend still holds one. */
static int revoke(struct pv_blkfront *front, uint32_t slot, uint32_t n)
{
	struct cursor cursor = { slot, 0 };
	int busy = 0;

	for (uint32_t i = 0; i < n; i++)
		if (pv_grant_revoke(front->granter, front->first_gref + next_page(front, &cursor)) == -EBUSY)
			busy = -EBUSY;
	return busy;
}

/* The backend writes the pages of a read; it reads those of a write, and those with segments. */
static int grant(struct pv_blkfront *front, uint32_t slot)
{
	uint32_t n = front->slots[slot].n_pages, n_data = n ? pages_of(front->slots[slot].length) : 0;
	int read_only = is_write(operation_of(&front->shadow[slot]));
	struct cursor cursor = { slot, 0 };

	for (uint32_t i = 0; i < n; i++) {
		uint32_t gref = front->first_gref + next_page(front, &cursor);
		int error = pv_grant_access(front->granter, gref, front->backend, gref, read_only || i >= n_data);

		if (error) {
			revoke(front, slot, i);
			return error;
		}
	}
	return 0;
}

/* As many slots as a request of `length` bytes takes, chained; the first one. There are that many. */
static uint32_t take_slots(struct pv_blkfront *front, const struct pv_blkfront_ask *ask)
{
	uint32_t n = ask->operation == PV_BLKIF_OP_DISCARD ? 1 : pv_blkfront_slots_of(ask->length);
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

/* Undo what was prepared and not sent. The backend cannot have used it, but can have set bits: then it stays out. */
static void withdraw(struct pv_blkfront *front, const uint32_t *slots, uint32_t n)
{
	while (n-- > 0)
		release(front, slots[n]);
}

/* How many slots they take; -EINVAL for what cannot be a request. */
static int64_t slots_wanted(const struct pv_blkfront_ask *asks, uint32_t n)
{
	int64_t wanted = 0;

	for (uint32_t i = 0; i < n; i++) {
		uint64_t most = asks[i].operation == PV_BLKIF_OP_WRITE_BARRIER ? PV_BLKIF_MAX_SEGMENTS :
									    PV_BLKIF_MAX_INDIRECT_SEGMENTS;

		if (asks[i].operation == PV_BLKIF_OP_DISCARD) {
			wanted++;
			continue;
		}
		if (asks[i].length > most * PV_PAGE_BYTES)
			return -EINVAL;
		wanted += pv_blkfront_slots_of(asks[i].length);
	}
	return wanted;
}

int64_t pv_blkfront_issue(struct pv_blkfront *front, struct pv_ring *ring, const struct pv_blkfront_ask *asks, uint32_t n,
			  uint32_t *slots)
{
	int64_t pushed = slots_wanted(asks, n);

	if (pushed < 0)
		return pushed;
	if (pushed > front->n_free || n > pv_ring_room(ring))
		return -ENOSPC;
	for (uint32_t i = 0; i < n; i++) {
		uint32_t slot = take_slots(front, &asks[i]);
		int error;

		fill(front, slot, &asks[i]);
		error = grant(front, slot);
		if (error) {
			give_slots(front, slot);
			withdraw(front, slots, i);
			return error;
		}
		slots[i] = slot;
		front->slots[slot].sequence = ++front->issued;
		front->n_in_flight++;
		front->batch[i] = front->shadow[slot];
	}
	pushed = pv_ring_push(ring, front->batch, n);
	if (pushed < 0)
		withdraw(front, slots, n);
	return pushed;
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

static void count(struct pv_blkfront *front, uint32_t slot, int16_t status)
{
	if (status != PV_BLKIF_RSP_OKAY) {
		front->errors++;
		return;
	}
	switch (operation_of(&front->shadow[slot])) {
	case PV_BLKIF_OP_READ:
		front->reads++;
		front->read_bytes += front->slots[slot].length;
		break;
	case PV_BLKIF_OP_WRITE:
	case PV_BLKIF_OP_WRITE_BARRIER:
		front->writes++;
		front->written_bytes += front->slots[slot].length;
		break;
	case PV_BLKIF_OP_DISCARD:
		front->discards++;
		break;
	default:
		front->flushes++;
	}
}

uint32_t pv_blkfront_complete(struct pv_blkfront *front, const struct pv_blkif_response *responses, uint32_t n,
			      struct pv_blkfront_answer *answers)
{
	if (front->n_held)
		pv_blkfront_reclaim(front);
	for (uint32_t i = 0; i < n; i++) {
		uint32_t slot;

		front->violation = check(front, &responses[i]);
		if (front->violation) {
			front->wrong = responses[i];
			return i;
		}
		slot = (uint32_t)responses[i].id;
		answers[i].slot = slot;
		answers[i].status = responses[i].status;
		count(front, slot, responses[i].status);
		/* A backend that answers before it lets go of a page could still write into it: not for another use. */
		release(front, slot);
	}
	return n;
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
