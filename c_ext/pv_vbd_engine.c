/* SPDX-License-Identifier: MIT */
/* The life of an engine: its memory, its thread, its end. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "pv_atomic.h"
#include "pv_home.h"
#include "vbd_private.h"

#define X86_32_BYTES 108
#define NS_PER_S 1000000000

static int make_batch(struct pv_vbd_engine *engine, const struct pv_vbd_setup *setup)
{
	struct pv_blkif_batch *batch = &engine->batch;
	uint32_t n = engine->capacity;

	batch->mapper = setup->mapper;
	batch->limits = setup->limits;
	batch->counters = setup->counters;
	batch->disk = setup->memory;
	batch->disk_bytes = setup->memory_bytes;
	batch->fd = setup->fd;
	batch->kind = setup->kind;
	batch->requests = engine->requests = calloc(n, sizeof(*engine->requests));
	batch->plans = calloc(n, sizeof(*batch->plans));
	batch->responses = calloc(n, sizeof(*batch->responses));
	if (setup->x86_32)
		engine->wire = calloc(n, X86_32_BYTES);
	if (!engine->requests || !batch->plans || !batch->responses || (setup->x86_32 && !engine->wire))
		return -ENOMEM;
	if (pv_blkif_pool_init(&batch->pool, n * PV_BLKIF_MAX_SEGMENTS))
		return -ENOMEM;
	batch->pool.grants = setup->grants;
	return 0;
}

static void release(struct pv_vbd_engine *engine)
{
	vbd_uring_free(engine->uring);
	pv_blkif_pool_free(&engine->batch.pool);
	free(engine->requests);
	free(engine->batch.plans);
	free(engine->batch.responses);
	free(engine->wire);
	pthread_mutex_destroy(&engine->lock);
	free(engine);
}

int pv_vbd_engine_new(const struct pv_vbd_setup *setup, struct pv_vbd_engine **made)
{
	struct pv_vbd_engine *engine = calloc(1, sizeof(*engine));
	uint32_t batch = setup->batch ? setup->batch : PV_VBD_BATCH;

	if (!engine)
		return -ENOMEM;
	pthread_mutex_init(&engine->lock, NULL);
	engine->ring = setup->ring;
	engine->waiter = setup->ring->port->waiter;
	engine->capacity = batch < setup->ring->size ? batch : setup->ring->size;
	engine->room = engine->capacity;
	engine->throttle = setup->throttle;
	engine->home = pv_home_mark();
	engine->take_spin_ns = setup->take_spin_ns;
	engine->wait_spin_ns = setup->wait_spin_ns;
	engine->board = setup->board;
	engine->notice.token = setup->token;
	if (make_batch(engine, setup)) {
		release(engine);
		return -ENOMEM;
	}
	if (setup->uring)
		engine->uring_error = -vbd_uring_new(engine, (int)setup->direct, &engine->uring);
	*made = engine;
	return 0;
}

int pv_vbd_engine_uring(const struct pv_vbd_engine *engine)
{
	return engine->uring ? 1 : -engine->uring_error;
}

void pv_vbd_engine_free(struct pv_vbd_engine *engine)
{
	if (engine && (!engine->started || engine->ended) && pv_home_is_here(engine->home))
		release(engine);
}

/* What ends a wait is looked at when it has: something in the ring, a stop, a binding that others have to ask for. */
int64_t vbd_rest(struct pv_vbd_engine *engine)
{
	int result = pv_ring_wait(engine->ring, engine->wait_spin_ns, -1);

	return result < 0 ? result : 0;
}

static int64_t rest(struct pv_vbd_engine *engine)
{
	if (engine->room)
		return engine->uring ? vbd_uring_rest(engine->uring) : vbd_rest(engine);
	if (engine->uring)
		vbd_uring_rest_throttled(engine->uring);
	else
		pv_vbd_throttle_rest(engine->throttle, &engine->stopping);
	return 0;
}

static void *run(void *argument)
{
	struct pv_vbd_engine *engine = argument;
	int64_t result = 0;

	while (result >= 0 && !pv_load_relaxed(&engine->stopping)) {
		if (engine->throttle)
			engine->room = pv_vbd_throttle_is_on(engine->throttle) ?
					       pv_vbd_throttle_room(engine->throttle, engine->capacity) : engine->capacity;
		result = engine->uring ? vbd_uring_serve(engine->uring, engine->take_spin_ns) :
					 vbd_serve(engine, engine->take_spin_ns);
		if (result == 0)
			result = rest(engine);
	}
	if (engine->uring)
		vbd_uring_drain(engine->uring);
	if (result == -EPROTO) {
		vbd_tell(engine, PV_VBD_PEER, NULL);
	} else if (result < 0 && !pv_load_relaxed(&engine->stopping)) {
		struct pv_vbd_notice detail = {.failure = (int32_t)-result};

		vbd_tell(engine, PV_VBD_FAILED, &detail);
	}
	return NULL;
}

int pv_vbd_engine_start(struct pv_vbd_engine *engine)
{
	sigset_t all, before;
	int error;

	if (!pv_home_is_here(engine->home))
		return -ECHILD;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&engine->thread, NULL, run, engine);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	engine->started = !error;
	return -error;
}

static struct timespec after(int64_t timeout_ns)
{
	struct timespec at;

	clock_gettime(CLOCK_REALTIME, &at);
	at.tv_sec += timeout_ns / NS_PER_S;
	at.tv_nsec += timeout_ns % NS_PER_S;
	if (at.tv_nsec >= NS_PER_S) {
		at.tv_nsec -= NS_PER_S;
		at.tv_sec++;
	}
	return at;
}

int pv_vbd_engine_stop(struct pv_vbd_engine *engine, int64_t timeout_ns)
{
	struct timespec until = after(timeout_ns);

	if (!pv_home_is_here(engine->home))
		return -ECHILD;
	if (engine->started && !engine->ended) {
		int error;

		pv_store_relaxed(&engine->stopping, 1);
		pv_waiter_kick(engine->waiter);
		if (engine->throttle)
			pv_vbd_throttle_kick(engine->throttle);
		error = pthread_timedjoin_np(engine->thread, NULL, &until);
		if (error)
			return -error;
		engine->ended = 1;
	}
	vbd_hush(engine);
	return 0;
}

void pv_vbd_engine_set_limits(struct pv_vbd_engine *engine, const struct pv_blkif_limits *limits)
{
	pthread_mutex_lock(&engine->lock);
	engine->wanted = *limits;
	pv_store_relaxed(&engine->limits_changed, 1);
	pthread_mutex_unlock(&engine->lock);
}

uint64_t pv_vbd_engine_batches(const struct pv_vbd_engine *engine)
{
	return pv_load_relaxed(&engine->batches);
}
