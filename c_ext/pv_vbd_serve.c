/* SPDX-License-Identifier: MIT */
/* One batch of an engine, from the ring to the disk and back. */
#include <errno.h>
#include <time.h>

#include "pv_atomic.h"
#include "vbd_private.h"

static void take_limits(struct pv_vbd_engine *engine)
{
	if (!pv_load_relaxed(&engine->limits_changed))
		return;
	pthread_mutex_lock(&engine->lock);
	engine->batch.limits = engine->wanted;
	pv_store_relaxed(&engine->limits_changed, 0);
	pthread_mutex_unlock(&engine->lock);
}

void vbd_tell_of_disk(struct pv_vbd_engine *engine)
{
	struct pv_vbd_notice detail = {.error = engine->batch.error, .unsupported = engine->batch.unsupported};
	uint32_t what = detail.unsupported ? PV_VBD_UNSUPPORTED : 0;

	if (detail.error < 0 || detail.error >= VBD_ERRNOS)
		detail.error = EIO;
	if (detail.error && !(engine->errors_told[detail.error / 64] >> (detail.error % 64) & 1))
		what |= PV_VBD_DISK;
	if (what)
		vbd_tell(engine, what, &detail);
}

void vbd_note_refusal(struct pv_vbd_engine *engine, const struct pv_blkif_plan *plan)
{
	struct pv_vbd_notice detail = {.reason = plan->reason};

	if (detail.reason && !(engine->reasons_told >> detail.reason & 1))
		vbd_tell(engine, PV_VBD_REFUSED, &detail);
}

void vbd_pause_after_refusals(void)
{
	struct timespec pause = {.tv_nsec = PV_VBD_REFUSAL_PAUSE_NS};

	nanosleep(&pause, NULL);
}

void vbd_charge(struct pv_vbd_engine *engine, const struct pv_blkif_plan *plans, uint32_t n)
{
	uint64_t requests = 0, bytes = 0;

	if (!engine->throttle || !pv_vbd_throttle_is_on(engine->throttle))
		return;
	for (uint32_t i = 0; i < n; i++) {
		if (plans[i].status != PV_BLKIF_PENDING)
			continue;
		requests++;
		/* What is given back moves no bytes. */
		bytes += plans[i].operation == PV_BLKIF_OP_DISCARD ? 0 : plans[i].length;
	}
	pv_vbd_throttle_charge(engine->throttle, requests, bytes);
}

int64_t vbd_take(struct pv_vbd_engine *engine, uint32_t most, int64_t spin_ns)
{
	void *taken = engine->wire ? (void *)engine->wire : (void *)engine->requests;
	uint32_t max = most < engine->room ? most : engine->room;
	int64_t n = 0;

	if (max == 0)
		return 0;
	n = spin_ns ? pv_ring_take_spin(engine->ring, taken, max, spin_ns) : pv_ring_take(engine->ring, taken, max);
	if (n <= 0)
		return n;
	pv_store_relaxed(&engine->batches, engine->batches + 1);
	take_limits(engine);
	if (engine->wire)
		pv_blkif_from_x86_32(engine->wire, engine->requests, (uint32_t)n);
	return n;
}

int64_t vbd_push(struct pv_vbd_engine *engine, const struct pv_blkif_response *responses, uint32_t n)
{
	int64_t pushed = pv_ring_push(engine->ring, responses, n);

	if (pushed < 0)
		return pushed;
	if (pushed >> 32 & PV_RING_STALE)
		vbd_tell(engine, PV_VBD_STALE, NULL);
	return n;
}

int64_t vbd_serve(struct pv_vbd_engine *engine, int64_t spin_ns)
{
	struct pv_blkif_batch *batch = &engine->batch;
	uint64_t refused = batch->counters->refused;
	int64_t taken = vbd_take(engine, engine->room, spin_ns), pushed;
	uint32_t n = (uint32_t)taken;

	if (taken <= 0)
		return taken;
	batch->error = 0;
	batch->unsupported = 0;
	if (pv_blkif_prepare(batch->mapper, &batch->limits, engine->requests, n, batch->plans, &batch->pool)) {
		vbd_charge(engine, batch->plans, n);
		pv_blkif_do_all(batch, n);
	}
	pv_blkif_finish(batch->mapper, engine->requests, batch->plans, n, &batch->pool, batch->responses,
			batch->counters);
	pushed = vbd_push(engine, batch->responses, n);
	if (pushed < 0)
		return pushed;
	if (batch->error || batch->unsupported)
		vbd_tell_of_disk(engine);
	if (batch->counters->refused != refused) {
		for (uint32_t i = 0; i < n; i++)
			vbd_note_refusal(engine, &batch->plans[i]);
		vbd_pause_after_refusals();
	}
	return n;
}
