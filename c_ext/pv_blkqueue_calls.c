/* SPDX-License-Identifier: MIT */
/* What an owner calls: transfers in and out, and whole exchanges in one call. */
#include "pv_blkqueue.h"

#include <errno.h>
#include <stddef.h>

#include "pv_home.h"

#define DIRECT_BYTES (PV_BLKIF_MAX_SEGMENTS * PV_PAGE_BYTES)

static int is_inside(const struct pv_blkqueue *queue, int64_t offset, int64_t length)
{
	/* Not `offset + length > disk`: that sum can wrap. */
	return offset >= 0 && length > 0 && (uint64_t)length <= queue->disk_bytes &&
	       (uint64_t)offset <= queue->disk_bytes - (uint64_t)length &&
	       !(((uint64_t)offset | (uint64_t)length) & (queue->sector_bytes - 1));
}

uint32_t pv_blkqueue_fill(const struct pv_blkqueue *queue, struct pv_blkfront_ask *pieces, const int64_t *offsets,
			  uint32_t n, uint64_t data, uint64_t length, uint32_t operation)
{
	for (uint32_t i = 0; i < n; i++) {
		if (!is_inside(queue, offsets[i], (int64_t)length))
			return i;
		pieces[i] = (struct pv_blkfront_ask){ .offset = (uint64_t)offsets[i], .data = data ? data + i * length : 0,
						      .length = length, .operation = operation };
	}
	return n;
}

void pv_blkqueue_set_buffer(struct pv_blkqueue *queue, uint32_t first, uint32_t n, uint32_t number)
{
	for (uint32_t i = 0; i < n && first + i < queue->buffers_pages; i++)
		queue->run_of_page[first + i] = number;
}

void pv_blkqueue_submit(struct pv_blkqueue *queue, struct pv_blkqueue_io *io)
{
	io->next = NULL;
	if (queue->last)
		queue->last->next = io;
	else
		queue->first = io;
	queue->last = io;
	queue->waiting++;
}

int64_t pv_blkqueue_run(struct pv_blkqueue *queue, struct pv_ring *ring, const struct pv_blkqueue_io *io, int64_t spin_ns,
			uint32_t most)
{
	uint32_t answered = 0;

	for (;;) {
		int64_t result = pv_blkqueue_issue(queue, ring);

		if (result < 0)
			return result;
		/* A backend that could not be told will not answer: the caller tells it first. */
		if (result >> 32)
			return result >> 32 << 32 | io->done;
		if (io->done || answered >= most)
			return io->done;
		result = pv_blkqueue_take(queue, ring, spin_ns);
		if (result <= 0)
			return result;
		answered += (uint32_t)result;
		if (!pv_blkqueue_complete(queue))
			return -EBADMSG;
	}
}

/* The short way. */

static int64_t exchange(struct pv_blkqueue *queue, struct pv_ring *ring, const struct pv_blkfront_ask *ask, int64_t spin_ns,
			int64_t *at)
{
	struct pv_blkfront *front = queue->front;
	int64_t result;
	uint32_t slot;

	if (!pv_home_is_here(ring->home))
		return -ECHILD;
	if (queue->first || queue->n_taken || front->n_in_flight || ask->length > DIRECT_BYTES ||
	    !is_inside(queue, (int64_t)ask->offset, (int64_t)ask->length))
		return PV_BLKQUEUE_LATER;
	if (pv_blkfront_stage(front, ask, &slot))
		return PV_BLKQUEUE_LATER;
	result = pv_blkfront_send(front, ring);
	if (result < 0)
		return result;
	*at = slot;
	if (result >> 32)
		return result >> 32 << 32 | PV_BLKQUEUE_IN_FLIGHT;
	result = pv_blkqueue_take(queue, ring, spin_ns);
	if (result <= 0)
		return result < 0 ? result : PV_BLKQUEUE_IN_FLIGHT;
	if (!pv_blkqueue_complete(queue))
		return -EBADMSG;
	*at = queue->answers[0].status;
	if (*at != PV_BLKIF_RSP_OKAY)
		return PV_BLKQUEUE_FAILED;
	*at = (int64_t)slot * DIRECT_BYTES;
	return PV_BLKQUEUE_ANSWERED;
}

int64_t pv_blkqueue_read(struct pv_blkqueue *queue, struct pv_ring *ring, int64_t offset, int64_t length, int64_t spin_ns,
			 int64_t *at)
{
	struct pv_blkfront_ask ask = { .offset = (uint64_t)offset, .length = (uint64_t)length,
				       .operation = PV_BLKIF_OP_READ };

	return exchange(queue, ring, &ask, spin_ns, at);
}

int64_t pv_blkqueue_write(struct pv_blkqueue *queue, struct pv_ring *ring, int64_t offset, const uint8_t *data,
			  int64_t length, int64_t spin_ns, int64_t *at)
{
	struct pv_blkfront_ask ask = { .offset = (uint64_t)offset, .length = (uint64_t)length,
				       .data = (uint64_t)(uintptr_t)data, .operation = PV_BLKIF_OP_WRITE };

	return exchange(queue, ring, &ask, spin_ns, at);
}

void pv_blkqueue_forget(struct pv_blkqueue *queue, struct pv_blkqueue_io *io)
{
	struct pv_blkqueue_io *before = NULL;

	for (struct pv_blkqueue_io *other = queue->first; other && other != io; other = other->next)
		before = other;
	if (before ? before->next == io : queue->first == io) {
		*(before ? &before->next : &queue->first) = io->next;
		if (queue->last == io)
			queue->last = before;
		queue->waiting--;
	}
	before = NULL;
	for (struct pv_blkqueue_io *other = queue->done_first; other && other != io; other = other->next)
		before = other;
	if (before ? before->next == io : queue->done_first == io) {
		*(before ? &before->next : &queue->done_first) = io->next;
		if (queue->done_last == io)
			queue->done_last = before;
	}
	for (uint32_t i = 0; i < queue->n_shares && io->n_shares; i++) {
		if (queue->shares[i].io != io)
			continue;
		queue->shares[i].io = NULL;
		io->n_shares--;
	}
	io->next = NULL;
	io->done = 1;
}

uint64_t pv_blkqueue_next_done(struct pv_blkqueue *queue)
{
	struct pv_blkqueue_io *io = queue->done_first;

	if (!io)
		return 0;
	queue->done_first = io->next;
	if (!queue->done_first)
		queue->done_last = NULL;
	return io->number;
}
