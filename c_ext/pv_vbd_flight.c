/* SPDX-License-Identifier: MIT */
/*
 * Requests that are in flight together: memory of its own for each, and their order.
 *
 * Requests that overlap, one of them a write or a discard, are done in the order they came in; a barrier is done when all
 * before it are done, and before any after it. A flush covers what was answered before it came, and waits for nothing.
 */
#include <errno.h>
#include <stdlib.h>

#include "vbd_flight.h"

#define KEPT_SEGMENTS 256           /* a request that had more gives the memory back */

/* Memory. */

static struct vbd_io *new_io(struct vbd_uring *uring)
{
	struct vbd_io *io = uring->n_ios < uring->n_max ? calloc(1, sizeof(*io)) : NULL;

	if (!io)
		return NULL;
	if (pv_blkif_pool_init(&io->pool, PV_BLKIF_MAX_SEGMENTS)) {
		free(io);
		return NULL;
	}
	uring->ios[uring->n_ios++] = io;
	return io;
}

uint32_t vbd_flight_room(struct vbd_uring *uring, uint32_t wanted)
{
	uint32_t n = 0;
	struct vbd_io *io;

	for (io = uring->free; io && n < wanted; io = io->next)
		n++;
	while (n < wanted && (io = new_io(uring))) {
		io->next = uring->free;
		uring->free = io;
		n++;
	}
	return n;
}

void vbd_flight_free(struct vbd_uring *uring)
{
	for (uint32_t i = 0; i < uring->n_ios; i++) {
		pv_blkif_pool_free(&uring->ios[i]->pool);
		free(uring->ios[i]->pieces);
		free(uring->ios[i]);
	}
	free(uring->ios);
	free(uring->responses);
}

/* Order. */

int vbd_is_changing(const struct vbd_io *io)
{
	return io->plan.operation == PV_BLKIF_OP_WRITE || io->plan.operation == PV_BLKIF_OP_WRITE_BARRIER ||
	       io->plan.operation == PV_BLKIF_OP_DISCARD;
}

int vbd_conflict(const struct vbd_io *one, const struct vbd_io *other)
{
	if (one->plan.operation == PV_BLKIF_OP_WRITE_BARRIER || other->plan.operation == PV_BLKIF_OP_WRITE_BARRIER)
		return 1;
	return (vbd_is_changing(one) || vbd_is_changing(other)) && one->plan.offset < other->plan.offset + other->plan.length &&
	       other->plan.offset < one->plan.offset + one->plan.length;
}

void vbd_flight_add(struct vbd_uring *uring, struct vbd_io *io)
{
	io->blocked_by = 0;
	if (uring->n_changing || vbd_is_changing(io))
		for (struct vbd_io *before = uring->first; before; before = before->next)
			io->blocked_by += (uint32_t)vbd_conflict(before, io);
	io->next = NULL;
	io->before = uring->last;
	if (uring->last)
		uring->last->next = io;
	else
		uring->first = io;
	uring->last = io;
	uring->n_changing += (uint32_t)vbd_is_changing(io);
}

void vbd_flight_take_out(struct vbd_uring *uring, struct vbd_io *io)
{
	*(io->before ? &io->before->next : &uring->first) = io->next;
	*(io->next ? &io->next->before : &uring->last) = io->before;
	uring->n_changing -= (uint32_t)vbd_is_changing(io);
}

void vbd_flight_answer(struct vbd_uring *uring, struct vbd_io *io)
{
	struct pv_vbd_engine *engine = uring->engine;
	struct pv_blkif_response unsent;
	struct pv_blkif_response *response = io->abandoned ? &unsent : &uring->responses[uring->n_done++];

	uring->n_refused += io->plan.reason != PV_BLKIF_REFUSED_NOTHING;
	pv_blkif_finish(engine->batch.mapper, &io->request, &io->plan, 1, &io->pool, response, engine->batch.counters);
	if (io->pool.capacity > KEPT_SEGMENTS) {
		pv_blkif_pool_free(&io->pool);
		free(io->pieces);
		io->pieces = NULL;
		io->n_room = 0;
	}
	io->state = VBD_FREE;
	io->next = uring->free;
	uring->free = io;
}
