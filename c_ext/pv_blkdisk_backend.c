/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "blkdisk_private.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define PAGE_BYTES 4096u
#define SLOT_PAGES PV_BLKIF_MAX_SEGMENTS

struct pv_blkdisk *pv_blkdisk_open(int broker_fd, pv_blkdisk_complain *complain, void *context, int *error)
{
	struct pv_front *front = pv_front_open(broker_fd, error);
	struct pv_blkdisk *disk = front ? calloc(1, sizeof(*disk)) : NULL;

	if (!front)
		return NULL;
	if (!disk) {
		pv_front_close(front);
		*error = -ENOMEM;
		return NULL;
	}
	disk->front = front;
	disk->complain = complain;
	disk->context = context;
	pthread_mutex_init(&disk->lock, NULL);
	pthread_cond_init(&disk->changed, NULL);
	return disk;
}

static void free_slots(struct pv_blkdisk *disk)
{
	free(disk->slots.shadow);
	free(disk->slots.batch);
	free(disk->slots.slots);
	free(disk->slots.free);
	free(disk->slots.held);
	free(disk->responses);
	free(disk->answers);
	free(disk->calls);
	memset(&disk->slots, 0, sizeof(disk->slots));
	disk->responses = NULL;
	disk->answers = NULL;
	disk->calls = NULL;
}

void pv_blkdisk_close(struct pv_blkdisk *disk)
{
	pv_front_close(disk->front);
	free_slots(disk);
	free(disk->zeroes);
	pthread_cond_destroy(&disk->changed);
	pthread_mutex_destroy(&disk->lock);
	free(disk);
}

/* ---- what happens to the backend ---- */

static int make_slots(struct pv_blkdisk *disk, uint32_t n)
{
	struct pv_blkfront *slots = &disk->slots;

	slots->shadow = calloc(n, sizeof(*slots->shadow));
	slots->batch = calloc(n, sizeof(*slots->batch));
	slots->slots = calloc(n, sizeof(*slots->slots));
	slots->free = calloc(n, sizeof(*slots->free));
	slots->held = calloc(n, sizeof(*slots->held));
	disk->responses = calloc(n, sizeof(*disk->responses));
	disk->answers = calloc(n, sizeof(*disk->answers));
	disk->calls = calloc(n, sizeof(struct call *));
	slots->counters = &disk->counters;
	slots->n_slots = n;
	if (slots->shadow && slots->batch && slots->slots && slots->free && slots->held && disk->responses &&
	    disk->answers && disk->calls)
		return 0;
	free_slots(disk);
	return -ENOMEM;
}

int pv_blkdisk_make(struct pv_blkdisk *disk, uint32_t backend, uint32_t ring_order, int64_t max_spin_ns,
		    struct pv_front_keys *keys)
{
	uint32_t n = ring_order > PV_FRONT_MAX_RING_ORDER ? 0 : pv_ring_entries(PAGE_BYTES << ring_order,
										sizeof(struct pv_blkif_request));
	struct pv_front_wish wish = { .backend = backend, .ring_order = ring_order, .data_pages = n * SLOT_PAGES,
				      .request_bytes = sizeof(struct pv_blkif_request),
				      .response_bytes = sizeof(struct pv_blkif_response), .max_spin_ns = max_spin_ns };
	int error = n ? 0 : -EINVAL, first = !disk->slots.n_slots;

	if (!error && first)
		error = make_slots(disk, n);
	if (error)
		return error;
	error = pv_front_make(disk->front, &wish, keys);
	if (error) {
		if (first)
			free_slots(disk);
		return error;
	}
	if (first) {
		disk->slots.granter = pv_front_granter(disk->front);
		disk->slots.pages = pv_front_data(disk->front);
		disk->slots.first_gref = disk->slots.granter->base;
		disk->slots.backend = (uint16_t)backend;
		pv_blkfront_init(&disk->slots);
	}
	disk->spin_ns = max_spin_ns ? PV_RING_LEARNT_NS : 0;
	return 0;
}

static int is_sane(const struct pv_blkdisk_shape *shape)
{
	return shape->sector >= 512 && shape->sector <= 65536 && !(shape->sector & (shape->sector - 1)) &&
	       shape->size % shape->sector == 0 && shape->max_request > 0 && shape->max_request % shape->sector == 0 &&
	       shape->max_request <= PV_BLKIF_MAX_INDIRECT_SEGMENTS * PAGE_BYTES;
}

/* What was asked under the shape before has to be right under this one. */
static int can_become(const struct pv_blkdisk *disk, const struct pv_blkdisk_shape *shape)
{
	return is_sane(shape) && pv_blkfront_slots_of(shape->max_request) <= disk->slots.n_slots &&
	       (!disk->connected ||
		(shape->sector == disk->shape.sector && shape->max_request >= disk->shape.max_request));
}

/* Requests stay as large as the first backend takes them. */
static void take_shape(struct pv_blkdisk *disk, const struct pv_blkdisk_shape *shape)
{
	uint32_t max_request = disk->connected ? disk->shape.max_request : shape->max_request;

	disk->shape = *shape;
	disk->shape.max_request = max_request;
}

static void wake_all(struct pv_blkdisk *disk)
{
	for (struct call *call = disk->parked; call; call = call->parked_next)
		pthread_cond_signal(&call->wake);
	pthread_cond_broadcast(&disk->changed);
}

int pv_blkdisk_go(struct pv_blkdisk *disk, const struct pv_blkdisk_shape *shape)
{
	struct pv_ring *ring = pv_front_ring(disk->front);
	int64_t sent;

	if (!ring)
		return -ENOTCONN;
	pthread_mutex_lock(&disk->lock);
	sent = can_become(disk, shape) ? pv_blkfront_reissue(&disk->slots, ring) : -EINVAL;
	if (sent >= 0) {
		if (sent >> 32 & PV_RING_STALE)
			pv_front_learn(disk->front, 1);
		disk->reissued += (uint32_t)sent;
		take_shape(disk, shape);
		disk->connected = 1;
		disk->ring = ring;
		wake_all(disk);
	}
	pthread_mutex_unlock(&disk->lock);
	return sent < 0 ? (int)sent : 0;
}

int pv_blkdisk_reshape(struct pv_blkdisk *disk, const struct pv_blkdisk_shape *shape)
{
	int error = 0;

	pthread_mutex_lock(&disk->lock);
	if (can_become(disk, shape))
		take_shape(disk, shape);
	else
		error = -EINVAL;
	pthread_mutex_unlock(&disk->lock);
	return error;
}

void pv_blkdisk_pause(struct pv_blkdisk *disk)
{
	pthread_mutex_lock(&disk->lock);
	disk->ring = NULL;
	while (disk->watching) {
		pv_front_kick(disk->front);
		pthread_cond_wait(&disk->changed, &disk->lock);
	}
	pthread_mutex_unlock(&disk->lock);
	pv_front_drop(disk->front);
}

void pv_blkdisk_fail(struct pv_blkdisk *disk, int error)
{
	pthread_mutex_lock(&disk->lock);
	if (!disk->error)
		disk->error = error > 0 ? error : EIO;
	disk->ring = NULL;
	pv_front_kick(disk->front);
	wake_all(disk);
	pthread_mutex_unlock(&disk->lock);
}

int pv_blkdisk_await(struct pv_blkdisk *disk)
{
	int error;

	pthread_mutex_lock(&disk->lock);
	while (!disk->connected && !disk->error)
		pthread_cond_wait(&disk->changed, &disk->lock);
	error = -disk->error;
	pthread_mutex_unlock(&disk->lock);
	return error;
}

void pv_blkdisk_shape_now(struct pv_blkdisk *disk, struct pv_blkdisk_shape *shape)
{
	pthread_mutex_lock(&disk->lock);
	*shape = disk->shape;
	pthread_mutex_unlock(&disk->lock);
}

void pv_blkdisk_count(struct pv_blkdisk *disk, struct pv_blkdisk_counters *counters)
{
	pthread_mutex_lock(&disk->lock);
	*counters = (struct pv_blkdisk_counters){
		.reads = disk->counters.reads, .writes = disk->counters.writes, .flushes = disk->counters.flushes,
		.discards = disk->counters.discards, .errors = disk->counters.errors,
		.in_flight = disk->slots.n_in_flight, .reissued = disk->reissued, .sleeps = disk->sleeps };
	pthread_mutex_unlock(&disk->lock);
}
