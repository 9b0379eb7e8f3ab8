/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "blkdisk_private.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- who sleeps ---- */

static void wake(struct call *call)
{
	if (call && call->parked)
		pthread_cond_signal(&call->wake);
}

/* Sleep until somebody wakes this call. */
static void park(struct pv_blkdisk *disk, struct call *call)
{
	call->parked = 1;
	call->parked_before = NULL;
	call->parked_next = disk->parked;
	if (disk->parked)
		disk->parked->parked_before = call;
	disk->parked = call;
	pthread_cond_wait(&call->wake, &disk->lock);
	if (call->parked_before)
		call->parked_before->parked_next = call->parked_next;
	else
		disk->parked = call->parked_next;
	if (call->parked_next)
		call->parked_next->parked_before = call->parked_before;
	call->parked = 0;
}

/* ---- the ring ---- */

/* Answered: nothing is sent to this backend any more. */
static void complain(struct pv_blkdisk *disk, const char *text)
{
	disk->ring = NULL;
	if (disk->complain)
		disk->complain(disk->context, text);
}

static void complain_of_answer(struct pv_blkdisk *disk)
{
	const struct pv_blkif_response *wrong = &disk->slots.wrong;
	const char *why = disk->slots.violation == PV_BLKFRONT_UNKNOWN_ID      ? "which is not in flight" :
			  disk->slots.violation == PV_BLKFRONT_WRONG_OPERATION ? "whose operation is not what was asked" :
										 "whose status is unknown";
	char text[160];

	snprintf(text, sizeof(text), "the backend answered request %llu with operation %u and status %d, %s",
		 (unsigned long long)wrong->id, wrong->operation, wrong->status, why);
	complain(disk, text);
}

static void settle(struct pv_blkdisk *disk, uint32_t n)
{
	uint32_t right = pv_blkfront_complete(&disk->slots, disk->responses, n, disk->answers);

	for (uint32_t i = 0; i < right; i++) {
		uint32_t slot = disk->answers[i].slot;
		struct call *call = disk->calls[slot];

		disk->calls[slot] = NULL;
		if (!call)
			continue;
		if (call->into && disk->answers[i].status == PV_BLKIF_RSP_OKAY)
			pv_blkfront_gather(&disk->slots, slot, call->into, call->ask.length);
		call->status = disk->answers[i].status;
		call->done = 1;
		wake(call);
	}
	if (right < n)
		complain_of_answer(disk);
	if (right)
		wake(disk->first_queued);
}

/* Take responses, after waiting for one; without the lock. How many, or a negative errno of the ring. */
static int64_t watch_ring(struct pv_blkdisk *disk, struct pv_ring *ring)
{
	uint32_t room = disk->slots.n_slots;
	int64_t n = pv_ring_take_spin(ring, disk->responses, room, disk->spin_ns);
	int result;

	if (n)
		return n;
	result = pv_ring_wait(ring, 0, -1);
	if (result == PV_WAIT_STALE)
		pv_front_learn(disk->front, 0);
	return result == PV_WAIT_EVENT ? pv_ring_take(ring, disk->responses, room) : result < 0 ? result : 0;
}

/* With the lock, which is let go meanwhile. */
static void watch(struct pv_blkdisk *disk)
{
	struct pv_ring *ring = disk->ring;
	uint64_t sleeps = ring->sleeps;
	int64_t n;

	disk->watching = 1;
	pthread_mutex_unlock(&disk->lock);
	n = watch_ring(disk, ring);
	pthread_mutex_lock(&disk->lock);
	disk->watching = 0;
	disk->sleeps += ring->sleeps - sleeps;
	if (n > 0)
		settle(disk, (uint32_t)n);
	else if (n < 0 && disk->ring)
		complain(disk, n == -EPROTO ? "the backend's index does not fit the ring" : strerror((int)-n));
	pthread_cond_broadcast(&disk->changed);
}

/* Something may have changed for this call: watch the ring, or sleep while another caller does. */
static void wait_some(struct pv_blkdisk *disk, struct call *call)
{
	if (disk->ring && !disk->watching)
		watch(disk);
	else
		park(disk, call);
}

/* A caller leaves: if nobody watches, another one that sleeps has to. */
static void hand_on(struct pv_blkdisk *disk)
{
	struct call *call = disk->ring && !disk->watching ? disk->parked : NULL;

	while (call && call->done)
		call = call->parked_next;
	wake(call);
}

/* ---- a request ---- */

static int fits(struct pv_blkdisk *disk, const struct call *call)
{
	uint32_t n = call->ask.operation == PV_BLKIF_OP_DISCARD ? 1 : pv_blkfront_slots_of(call->ask.length);

	return disk->ring && pv_ring_room(disk->ring) && n <= disk->slots.n_free;
}

/* 0, 1 when it is under way, or a negative errno. */
static int issue(struct pv_blkdisk *disk, struct call *call)
{
	uint32_t slot;
	int64_t pushed;

	if (!fits(disk, call))
		return 0;
	pushed = pv_blkfront_issue(&disk->slots, disk->ring, &call->ask, 1, &slot);
	if (pushed == -EPROTO || pushed == -ECHILD) {
		complain(disk, "the backend's index does not fit the ring");
		return 0;
	}
	if (pushed < 0)
		return pushed == -ENOSPC ? 0 : (int)pushed;
	disk->calls[slot] = call;
	if (pushed >> 32 & PV_RING_STALE)
		pv_front_learn(disk->front, 1);
	return 1;
}

static void enqueue(struct pv_blkdisk *disk, struct call *call)
{
	if (disk->first_queued)
		disk->last_queued->next = call;
	else
		disk->first_queued = call;
	disk->last_queued = call;
}

static void leave_queue(struct pv_blkdisk *disk, struct call *call)
{
	struct call **place = &disk->first_queued, *before = NULL;

	while (*place != call) {
		before = *place;
		place = &before->next;
	}
	*place = call->next;
	if (!call->next)
		disk->last_queued = before;
	wake(disk->first_queued);
}

/* Nobody overtakes a call that waits for slots, or large ones would wait for ever. */
static int issue_in_turn(struct pv_blkdisk *disk, struct call *call)
{
	int issued = disk->first_queued ? 0 : issue(disk, call);

	if (issued)
		return issued;
	enqueue(disk, call);
	while (!disk->error) {
		if (disk->first_queued == call && (issued = issue(disk, call)))
			break;
		/* Slots that the backend has not let go come back without a word; with nothing in flight nobody else looks. */
		if (disk->ring && disk->slots.n_in_flight == 0 && pv_blkfront_reclaim(&disk->slots) < disk->slots.n_slots &&
		    !fits(disk, call)) {
			complain(disk, "the backend keeps the pages of answered requests");
			continue;
		}
		wait_some(disk, call);
	}
	leave_queue(disk, call);
	return issued;
}

static void forget(struct pv_blkdisk *disk, struct call *call)
{
	for (uint32_t slot = 0; slot < disk->slots.n_slots; slot++)
		if (disk->calls[slot] == call)
			disk->calls[slot] = NULL;
}

static int errno_of(int status)
{
	return status == PV_BLKIF_RSP_OKAY ? 0 : status == PV_BLKIF_RSP_EOPNOTSUPP ? -EOPNOTSUPP : -EIO;
}

/* One request. With the lock. */
static int run(struct pv_blkdisk *disk, struct call *call)
{
	int issued, error;

	pthread_cond_init(&call->wake, NULL);
	issued = issue_in_turn(disk, call);
	while (issued > 0 && !call->done && !disk->error)
		wait_some(disk, call);
	if (call->done) {
		error = errno_of(call->status);
	} else {
		forget(disk, call);
		error = issued < 0 ? issued : -disk->error;
	}
	hand_on(disk);
	pthread_cond_destroy(&call->wake);
	return error;
}

static int check(const struct pv_blkdisk *disk, uint64_t length, uint64_t offset)
{
	const struct pv_blkdisk_shape *shape = &disk->shape;

	if (disk->error)
		return -disk->error;
	if (!disk->connected)
		return -ENOTCONN;
	if (length == 0 || offset > shape->size || length > shape->size - offset ||
	    (offset | length) & (shape->sector - 1))
		return -EINVAL;
	return 0;
}

/* One after the other, requests of at most the disk's size. `step`: how far the data moves for each byte, 1 or 0. */
static int transfer(struct pv_blkdisk *disk, uint32_t operation, uint8_t *data, int step, uint64_t length, uint64_t offset)
{
	int error = check(disk, length, offset);

	if (!error && operation == PV_BLKIF_OP_WRITE && disk->shape.read_only)
		error = -EROFS;
	while (!error && length > 0) {
		uint64_t part = length < disk->shape.max_request ? length : disk->shape.max_request;
		struct call call = { .ask = { .offset = offset, .length = part, .operation = operation } };

		if (operation == PV_BLKIF_OP_WRITE)
			call.ask.data = (uint64_t)(uintptr_t)data;
		else
			call.into = data;
		error = run(disk, &call);
		offset += part;
		length -= part;
		data += step ? part : 0;
	}
	return error;
}

int pv_blkdisk_read(struct pv_blkdisk *disk, void *to, uint64_t length, uint64_t offset)
{
	int error;

	pthread_mutex_lock(&disk->lock);
	error = transfer(disk, PV_BLKIF_OP_READ, to, 1, length, offset);
	pthread_mutex_unlock(&disk->lock);
	return error;
}

int pv_blkdisk_write(struct pv_blkdisk *disk, const void *from, uint64_t length, uint64_t offset)
{
	int error;

	pthread_mutex_lock(&disk->lock);
	error = transfer(disk, PV_BLKIF_OP_WRITE, (uint8_t *)(uintptr_t)from, 1, length, offset);
	pthread_mutex_unlock(&disk->lock);
	return error;
}

int pv_blkdisk_zero(struct pv_blkdisk *disk, uint64_t length, uint64_t offset)
{
	int error = 0;

	pthread_mutex_lock(&disk->lock);
	if (!disk->zeroes && disk->connected) {
		disk->zeroes = calloc(1, disk->shape.max_request);
		error = disk->zeroes ? 0 : -ENOMEM;
	}
	if (!error)
		error = transfer(disk, PV_BLKIF_OP_WRITE, disk->zeroes, 0, length, offset);
	pthread_mutex_unlock(&disk->lock);
	return error;
}

int pv_blkdisk_flush(struct pv_blkdisk *disk)
{
	struct call call = { .ask = { .operation = PV_BLKIF_OP_FLUSH_DISKCACHE } };
	int error;

	pthread_mutex_lock(&disk->lock);
	error = disk->error ? -disk->error : disk->connected ? 0 : -ENOTCONN;
	if (!disk->shape.flush)
		call.ask.operation = PV_BLKIF_OP_WRITE_BARRIER;
	/* A disk that offers neither has nothing that could be lost: what it has answered is as durable as it gets. */
	if (!error && (disk->shape.flush || disk->shape.barrier))
		error = run(disk, &call);
	pthread_mutex_unlock(&disk->lock);
	return error;
}

int pv_blkdisk_discard(struct pv_blkdisk *disk, uint64_t length, uint64_t offset)
{
	struct call call = { .ask = { .offset = offset, .length = length, .operation = PV_BLKIF_OP_DISCARD } };
	int error;

	pthread_mutex_lock(&disk->lock);
	error = check(disk, length, offset);
	if (!error && disk->shape.read_only)
		error = -EROFS;
	if (!error && !disk->shape.discard)
		error = -EOPNOTSUPP;
	if (!error)
		error = run(disk, &call);
	if (error == -EOPNOTSUPP)
		disk->shape.discard = 0;
	pthread_mutex_unlock(&disk->lock);
	return error;
}
