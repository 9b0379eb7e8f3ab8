/* SPDX-License-Identifier: MIT */
#include "pv_blkfront.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SECTOR_SHIFT 9
#define SLOT_PAGES PV_BLKIF_MAX_SEGMENTS

void pv_blkfront_init(struct pv_blkfront *front)
{
	front->n_free = front->n_slots;
	front->n_held = 0;
	front->n_in_flight = 0;
	front->violation = 0;
	front->issued = 0;
	front->reads = front->writes = front->flushes = 0;
	front->read_bytes = front->written_bytes = front->errors = 0;
	memset(front->shadow, 0, sizeof(*front->shadow) * front->n_slots);
	for (uint32_t i = 0; i < front->n_slots; i++) {
		front->sequence[i] = 0;
		front->free[i] = front->n_slots - 1 - i;
	}
}

/* The backend reads the pages of a write and writes those of a read. */
static int read_only(uint32_t operation)
{
	return operation == PV_BLKIF_OP_WRITE;
}

static void fill(struct pv_blkfront *front, uint32_t slot, const struct pv_blkfront_ask *ask)
{
	struct pv_blkif_request *request = &front->shadow[slot];
	uint32_t left = ask->length;

	request->operation = (uint8_t)ask->operation;
	request->nr_segments = (uint8_t)((ask->length + PV_PAGE_BYTES - 1) / PV_PAGE_BYTES);
	request->id = slot;
	request->sector = ask->offset >> SECTOR_SHIFT;
	for (uint32_t i = 0; i < request->nr_segments; i++) {
		uint32_t part = left < PV_PAGE_BYTES ? left : PV_PAGE_BYTES;

		request->seg[i].gref = front->first_gref + slot * SLOT_PAGES + i;
		request->seg[i].first_sect = 0;
		request->seg[i].last_sect = (uint8_t)((part >> SECTOR_SHIFT) - 1);
		left -= part;
	}
	if (ask->data)
		memcpy(front->pages + (uint64_t)slot * SLOT_PAGES * PV_PAGE_BYTES, (const void *)(uintptr_t)ask->data,
		       ask->length);
}

/* Take back the grants of the first `segments` pages of a slot. 0, or -EBUSY when the backend still holds one. */
static int revoke(struct pv_blkfront *front, uint32_t slot, uint32_t segments)
{
	int busy = 0;

	for (uint32_t i = 0; i < segments; i++)
		if (pv_grant_revoke(front->granter, front->shadow[slot].seg[i].gref) == -EBUSY)
			busy = -EBUSY;
	return busy;
}

static int grant(struct pv_blkfront *front, uint32_t slot)
{
	const struct pv_blkif_request *request = &front->shadow[slot];

	for (uint32_t i = 0; i < request->nr_segments; i++) {
		uint32_t gref = request->seg[i].gref;
		int error = pv_grant_access(front->granter, gref, front->backend, gref, read_only(request->operation));

		if (error) {
			revoke(front, slot, i);
			return error;
		}
	}
	return 0;
}

/* Undo what was prepared and not sent. The backend cannot have used it, but can have set bits: then it stays out. */
static void withdraw(struct pv_blkfront *front, const uint32_t *slots, uint32_t n)
{
	while (n-- > 0) {
		uint32_t slot = slots[n];

		front->sequence[slot] = 0;
		front->n_in_flight--;
		if (revoke(front, slot, front->shadow[slot].nr_segments))
			front->held[front->n_held++] = slot;
		else
			front->free[front->n_free++] = slot;
	}
}

int64_t pv_blkfront_issue(struct pv_blkfront *front, struct pv_ring *ring, const struct pv_blkfront_ask *asks, uint32_t n,
			  uint32_t *slots)
{
	int64_t pushed;

	if (n > front->n_free || n > pv_ring_room(ring))
		return -ENOSPC;
	for (uint32_t i = 0; i < n; i++) {
		uint32_t slot = front->free[--front->n_free];
		int error;

		fill(front, slot, &asks[i]);
		error = grant(front, slot);
		if (error) {
			front->free[front->n_free++] = slot;
			withdraw(front, slots, i);
			return error;
		}
		slots[i] = slot;
		front->sequence[slot] = ++front->issued;
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
		if (front->sequence[slot]) {
			order[n].sequence = front->sequence[slot];
			order[n++].slot = slot;
		}
	}
	qsort(order, n, sizeof(*order), by_age);
	for (uint32_t i = 0; i < n; i++)
		front->batch[i] = front->shadow[order[i].slot];
	free(order);
	pushed = n ? pv_ring_push(ring, front->batch, n) : 0;
	return pushed;
}

uint32_t pv_blkfront_reclaim(struct pv_blkfront *front)
{
	uint32_t kept = 0;

	for (uint32_t i = 0; i < front->n_held; i++) {
		uint32_t slot = front->held[i];

		if (revoke(front, slot, front->shadow[slot].nr_segments))
			front->held[kept++] = slot;
		else
			front->free[front->n_free++] = slot;
	}
	front->n_held = kept;
	return front->n_free;
}

/* 0, or PV_BLKFRONT_*. */
static uint16_t check(const struct pv_blkfront *front, const struct pv_blkif_response *response)
{
	if (response->id >= front->n_slots || !front->sequence[response->id])
		return PV_BLKFRONT_UNKNOWN_ID;
	if (response->operation != front->shadow[response->id].operation)
		return PV_BLKFRONT_WRONG_OPERATION;
	if (response->status > PV_BLKIF_RSP_OKAY || response->status < PV_BLKIF_RSP_EOPNOTSUPP)
		return PV_BLKFRONT_UNKNOWN_STATUS;
	return 0;
}

static void count(struct pv_blkfront *front, const struct pv_blkif_request *request, int16_t status)
{
	uint64_t bytes = 0;

	if (status != PV_BLKIF_RSP_OKAY) {
		front->errors++;
		return;
	}
	for (uint32_t i = 0; i < request->nr_segments; i++)
		bytes += (uint64_t)(request->seg[i].last_sect + 1) << SECTOR_SHIFT;
	switch (request->operation) {
	case PV_BLKIF_OP_READ:
		front->reads++;
		front->read_bytes += bytes;
		break;
	case PV_BLKIF_OP_WRITE:
		front->writes++;
		front->written_bytes += bytes;
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
		count(front, &front->shadow[slot], responses[i].status);
		front->sequence[slot] = 0;
		front->n_in_flight--;
		/* A backend that answers before it lets go of a page could still write into it: not for another use. */
		if (revoke(front, slot, front->shadow[slot].nr_segments))
			front->held[front->n_held++] = slot;
		else
			front->free[front->n_free++] = slot;
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
