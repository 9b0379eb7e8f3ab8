/* SPDX-License-Identifier: MIT */
#include "pv_blkqueue.h"

#include <errno.h>
#include <stddef.h>

#include "pv_home.h"

#define NONE PV_BLKFRONT_NONE
#define SECTOR_SHIFT 9

/* Where the next byte to be sent is. */
struct place {
	struct pv_blkqueue_io *io;
	uint32_t piece;
	uint64_t byte;           /* of the piece */
};

/* A request that is being put together: neighbours on the disk, and where each is in memory. */
struct draft {
	struct pv_blkfront_ask ask;
	uint32_t run;            /* the buffer it is in; 0: none, or none in a buffer */
	uint64_t data_end;       /* address behind its last byte */
	uint32_t n_pieces;
	struct place end;        /* what comes after it */
	uint32_t first, last;    /* shares */
	uint32_t n_shares;
};

void pv_blkqueue_init(struct pv_blkqueue *queue)
{
	for (uint32_t i = 0; i < queue->n_shares; i++)
		queue->shares[i] = (struct pv_blkqueue_share){ .next = i + 1 < queue->n_shares ? i + 1 : NONE };
	for (uint32_t slot = 0; slot < queue->front->n_slots; slot++) {
		queue->first_share[slot] = NONE;
		queue->run_of_slot[slot] = 0;
	}
	queue->free_share = queue->n_shares ? 0 : NONE;
	queue->n_free_shares = queue->n_shares;
	queue->n_taken = 0;
	queue->first = queue->last = queue->done_first = queue->done_last = NULL;
	queue->waiting = queue->merged = 0;
}

/* The buffer that all of this memory is in, sectors for sectors; 0: none. */
static uint32_t run_of(const struct pv_blkqueue *queue, uint64_t data, uint64_t length)
{
	uint64_t start = data - queue->buffers_start, bytes = (uint64_t)queue->buffers_pages * PV_PAGE_BYTES;
	uint32_t run;

	if (data < queue->buffers_start || start >= bytes || length == 0 || length > bytes - start ||
	    (start & ((1 << SECTOR_SHIFT) - 1)))
		return 0;
	run = queue->run_of_page[start / PV_PAGE_BYTES];
	/* A buffer's pages stand side by side, so what is between the first and the last is its own, too. */
	return run == queue->run_of_page[(start + length - 1) / PV_PAGE_BYTES] ? run : 0;
}

/* Putting requests together. */

static int is_transfer(uint32_t operation)
{
	return operation == PV_BLKIF_OP_READ || operation == PV_BLKIF_OP_WRITE;
}

static uint64_t min_of(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* The most bytes of one request of this draft's kind. */
static uint64_t most_bytes(const struct pv_blkqueue *queue, const struct draft *draft)
{
	if (!is_transfer(draft->ask.operation))
		return UINT64_MAX;
	return queue->max_bytes - (draft->run ? (uint64_t)draft->ask.first_sector << SECTOR_SHIFT : 0);
}

/* Go on by `bytes` of the piece at this place, and past what has no bytes left. */
static void advance(struct place *place, uint64_t bytes)
{
	place->byte += bytes;
	if (place->byte < place->io->pieces[place->piece].length)
		return;
	place->byte = 0;
	if (++place->piece < place->io->n_pieces)
		return;
	place->piece = 0;
	place->io = place->io->next;
}

/* A share for bytes of a transfer; the last one grows if that is the same memory going on. */
static int add_share(struct pv_blkqueue *queue, struct draft *draft, struct pv_blkqueue_io *io, uint64_t data,
		     uint64_t length)
{
	struct pv_blkqueue_share *last = draft->last == NONE ? NULL : &queue->shares[draft->last];
	uint32_t share = queue->free_share;

	if (last && last->io == io && last->data && last->data + last->length == data) {
		last->length += length;
		return 1;
	}
	/* Each free slot has a share of its own to come: the first request of a batch must not take all. */
	if (last && (draft->n_shares == PV_BLKQUEUE_MAX_SHARES || queue->n_free_shares <= queue->front->n_free))
		return 0;
	queue->free_share = queue->shares[share].next;
	queue->n_free_shares--;
	queue->shares[share] = (struct pv_blkqueue_share){ .io = io, .data = data, .length = length, .next = NONE };
	if (last)
		last->next = share;
	else
		draft->first = share;
	draft->last = share;
	draft->n_shares++;
	io->n_shares++;
	return 1;
}

/* Begin a request with the next piece. */
static void begin(struct pv_blkqueue *queue, struct draft *draft)
{
	struct place *place = &draft->end;
	const struct pv_blkfront_ask *piece;
	uint64_t data, length;

	*draft = (struct draft){ .first = NONE, .last = NONE,
				 .end = { queue->first, queue->first->next_piece, queue->first->next_byte } };
	piece = &place->io->pieces[place->piece];
	draft->ask = *piece;
	draft->ask.offset += place->byte;
	draft->ask.gref = draft->ask.first_sector = 0;
	length = piece->length - place->byte;
	data = piece->data ? piece->data + place->byte : 0;
	draft->run = data && piece->operation != PV_BLKIF_OP_DISCARD ? run_of(queue, data, length) : 0;
	if (draft->run) {
		uint64_t start = data - queue->buffers_start;

		draft->ask.gref = queue->buffers_gref + (uint32_t)(start / PV_PAGE_BYTES);
		draft->ask.first_sector = (uint32_t)(start % PV_PAGE_BYTES) >> SECTOR_SHIFT;
	}
	length = min_of(length, most_bytes(queue, draft));
	draft->ask.data = 0;
	draft->ask.length = length;
	draft->data_end = data + length;
	draft->n_pieces = 1;
	add_share(queue, draft, place->io, data, length);
	advance(place, length);
}

/* Have the next piece, or as much of it as fits, go along; whether it does. */
static int extend(struct pv_blkqueue *queue, struct draft *draft)
{
	struct place *place = &draft->end;
	const struct pv_blkfront_ask *piece;
	uint64_t data, length, room = most_bytes(queue, draft) - draft->ask.length;
	uint32_t run;

	if (!place->io || !room)
		return 0;
	piece = &place->io->pieces[place->piece];
	if (piece->operation != draft->ask.operation || piece->offset + place->byte != draft->ask.offset + draft->ask.length)
		return 0;
	length = piece->length - place->byte;
	data = piece->data + place->byte;
	run = run_of(queue, data, length);
	if (run != draft->run || (run && data != draft->data_end))
		return 0;
	length = min_of(length, room);
	if (!run && pv_blkfront_slots_of(draft->ask.length + length) > queue->front->n_free)
		return 0;
	if (!add_share(queue, draft, place->io, data, length))
		return 0;
	draft->ask.length += length;
	draft->data_end = data + length;
	draft->n_pieces++;
	advance(place, length);
	return 1;
}

/* The shares of a request are not needed any more. */
static void free_shares(struct pv_blkqueue *queue, uint32_t first)
{
	while (first != NONE) {
		uint32_t share = first;

		first = queue->shares[share].next;
		queue->shares[share].io = NULL;
		queue->shares[share].next = queue->free_share;
		queue->free_share = share;
		queue->n_free_shares++;
	}
}

static void announce(struct pv_blkqueue *queue, struct pv_blkqueue_io *io)
{
	io->done = 1;
	if (!io->announce)
		return;
	io->next = NULL;
	if (queue->done_last)
		queue->done_last->next = io;
	else
		queue->done_first = io;
	queue->done_last = io;
}

static int is_sent(const struct pv_blkqueue_io *io)
{
	return io->next_piece == io->n_pieces;
}

/* What waits begins at this place from now on. */
static void move_to(struct pv_blkqueue *queue, const struct place *place)
{
	while (queue->first && queue->first != place->io) {
		struct pv_blkqueue_io *io = queue->first;

		queue->first = io->next;
		queue->waiting--;
		io->next = NULL;
		io->next_piece = io->n_pieces;
		io->next_byte = 0;
	}
	if (!queue->first) {
		queue->last = NULL;
		return;
	}
	queue->first->next_piece = place->piece;
	queue->first->next_byte = place->byte;
}

static void drop_draft(struct pv_blkqueue *queue, const struct draft *draft)
{
	for (uint32_t share = draft->first; share != NONE; share = queue->shares[share].next)
		queue->shares[share].io->n_shares--;
	free_shares(queue, draft->first);
}

static void copy_in(struct pv_blkqueue *queue, const struct draft *draft, uint32_t slot)
{
	uint64_t at = 0;

	for (uint32_t i = draft->first; i != NONE; i = queue->shares[i].next) {
		const struct pv_blkqueue_share *share = &queue->shares[i];

		if (share->data)
			pv_blkfront_copy_in(queue->front, slot, at, (const uint8_t *)(uintptr_t)share->data, share->length);
		at += share->length;
	}
}

/* Stage the next request of what waits. 0, or a negative errno: -ENOSPC when there are not enough slots. */
static int stage(struct pv_blkqueue *queue, uint32_t *slot)
{
	struct draft draft;
	int error;

	begin(queue, &draft);
	while (queue->merge && is_transfer(draft.ask.operation) && extend(queue, &draft))
		;
	error = pv_blkfront_stage(queue->front, &draft.ask, slot);
	if (error) {
		drop_draft(queue, &draft);
		return error;
	}
	queue->first_share[*slot] = draft.first;
	queue->run_of_slot[*slot] = draft.run;
	queue->merged += draft.n_pieces - 1;
	if (draft.run)
		queue->in_flight[draft.run]++;
	else if (draft.ask.operation == PV_BLKIF_OP_WRITE || draft.ask.operation == PV_BLKIF_OP_WRITE_BARRIER)
		copy_in(queue, &draft, *slot);
	move_to(queue, &draft.end);
	return 0;
}

/* A request is over: tell its transfers, copy out what a read has brought. */
static void finish(struct pv_blkqueue *queue, uint32_t slot, int32_t status)
{
	const struct pv_blkif_request *request = &queue->front->shadow[slot];
	uint32_t operation = request->operation == PV_BLKIF_OP_INDIRECT ? request->nr_segments : request->operation;
	uint32_t run = queue->run_of_slot[slot];
	uint64_t at = 0;

	for (uint32_t i = queue->first_share[slot]; i != NONE; i = queue->shares[i].next) {
		struct pv_blkqueue_share *share = &queue->shares[i];
		struct pv_blkqueue_io *io = share->io;

		if (status == PV_BLKIF_RSP_OKAY && io && share->data && !run && operation == PV_BLKIF_OP_READ)
			pv_blkfront_copy_out(queue->front, slot, at, (uint8_t *)(uintptr_t)share->data, share->length);
		if (io && status != PV_BLKIF_RSP_OKAY && io->status == PV_BLKIF_RSP_OKAY) {
			io->status = status;
			io->failed_operation = operation;
			io->failed_offset = (request->sector << SECTOR_SHIFT) + at;
			io->failed_length = share->length;
		}
		at += share->length;
		if (io && --io->n_shares == 0 && is_sent(io))
			announce(queue, io);
	}
	if (run)
		queue->in_flight[run]--;
	free_shares(queue, queue->first_share[slot]);
	queue->first_share[slot] = NONE;
	queue->run_of_slot[slot] = 0;
}

int64_t pv_blkqueue_issue(struct pv_blkqueue *queue, struct pv_ring *ring)
{
	struct pv_blkfront *front = queue->front;
	uint32_t room = pv_ring_room(ring), n = 0, slot;
	int64_t pushed;
	int error = 0;

	if (queue->first && !pv_home_is_here(ring->home))
		return -ECHILD;
	while (queue->first && n < room && !error) {
		error = front->n_free ? stage(queue, &slot) : -ENOSPC;
		if (error == -ENOSPC && front->n_held && pv_blkfront_reclaim(front))
			error = stage(queue, &slot);
		n += !error;
	}
	pushed = n ? pv_blkfront_send(front, ring) : 0;
	if (pushed < 0) {
		/* The slots are free again, and what stood in them is still there to be read. */
		for (uint32_t i = 0; i < n; i++)
			finish(queue, (uint32_t)front->batch[i].id, PV_BLKIF_RSP_ERROR);
		return pushed;
	}
	if (error == -ENOSPC)
		return n || front->n_in_flight ? pushed : -EBUSY;
	return error ? error : pushed;
}

int64_t pv_blkqueue_take(struct pv_blkqueue *queue, struct pv_ring *ring, int64_t spin_ns)
{
	int64_t taken;

	if (spin_ns)
		taken = pv_ring_take_spin(ring, queue->responses, queue->front->n_slots, spin_ns);
	else
		taken = pv_ring_take(ring, queue->responses, queue->front->n_slots);
	queue->n_taken = taken > 0 ? (uint32_t)taken : 0;
	return taken;
}

int pv_blkqueue_complete(struct pv_blkqueue *queue)
{
	uint32_t n = queue->n_taken, right;

	queue->n_taken = 0;
	right = pv_blkfront_complete(queue->front, queue->responses, n, queue->answers);
	for (uint32_t i = 0; i < right; i++)
		finish(queue, queue->answers[i].slot, queue->answers[i].status);
	return right == n;
}

void pv_blkqueue_adopt(struct pv_blkqueue *queue, uint32_t slot, struct pv_blkqueue_io *io)
{
	struct draft draft = { .first = NONE, .last = NONE };

	io->next_piece = io->n_pieces;
	add_share(queue, &draft, io, io->pieces[0].data, io->pieces[0].length);
	queue->first_share[slot] = draft.first;
}
