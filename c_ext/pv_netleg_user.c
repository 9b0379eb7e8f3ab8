/* SPDX-License-Identifier: MIT */
/* A port for programs of this process: frames wait in a pipe each way, of so many bytes and no more. */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "netloop_private.h"

#define NS_PER_S 1000000000

struct parcel {
	struct parcel *next;
	struct pv_frame frame;
	uint8_t bytes[];
};

struct pv_netleg_pipe {
	pthread_mutex_t lock;
	pthread_cond_t filled;
	pthread_cond_t drained;
	uint32_t n_waiting;        /* for room */
	struct parcel *oldest, *newest;
	uint64_t n_bytes;
	uint32_t n;
	uint32_t closed;
};

static struct pv_netleg_pipe *make_pipe(void)
{
	struct pv_netleg_pipe *made = calloc(1, sizeof(*made));
	pthread_condattr_t monotonic;

	if (!made)
		return NULL;
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_mutex_init(&made->lock, NULL);
	pthread_cond_init(&made->filled, &monotonic);
	pthread_cond_init(&made->drained, &monotonic);
	pthread_condattr_destroy(&monotonic);
	return made;
}

static void free_pipe(struct pv_netleg_pipe *pipe)
{
	if (!pipe)
		return;
	while (pipe->oldest) {
		struct parcel *oldest = pipe->oldest;

		pipe->oldest = oldest->next;
		free(oldest);
	}
	pthread_mutex_destroy(&pipe->lock);
	pthread_cond_destroy(&pipe->filled);
	pthread_cond_destroy(&pipe->drained);
	free(pipe);
}

int netleg_make_pipes(struct pv_netleg *leg)
{
	leg->to_user = make_pipe();
	leg->from_user = make_pipe();
	if (leg->to_user && leg->from_user)
		return 0;
	netleg_free_pipes(leg);
	return -ENOMEM;
}

void netleg_free_pipes(struct pv_netleg *leg)
{
	free_pipe(leg->to_user);
	free_pipe(leg->from_user);
	leg->to_user = leg->from_user = NULL;
}

/* How many of the frames there was room for, in order. */
static uint32_t fill(struct pv_netleg_pipe *pipe, const uint8_t *memory, const struct pv_frame *frames, uint32_t n)
{
	uint32_t done = 0;

	pthread_mutex_lock(&pipe->lock);
	for (; done < n && pipe->n_bytes + frames[done].length <= PV_NETLEG_USER_BYTES; done++) {
		struct parcel *parcel = malloc(sizeof(*parcel) + frames[done].length);

		if (!parcel)
			break;
		parcel->next = NULL;
		parcel->frame = frames[done];
		memcpy(parcel->bytes, memory + frames[done].offset, frames[done].length);
		if (pipe->newest)
			pipe->newest->next = parcel;
		else
			pipe->oldest = parcel;
		pipe->newest = parcel;
		pipe->n_bytes += parcel->frame.length;
		pipe->n++;
	}
	if (done)
		pthread_cond_signal(&pipe->filled);
	pthread_mutex_unlock(&pipe->lock);
	return done;
}

/* Locked. How many there was room for in the burst. */
static uint32_t drain(struct pv_netleg_pipe *pipe, struct pv_burst *burst, uint32_t max)
{
	uint32_t done = 0;

	for (; done < max && pipe->oldest; done++) {
		struct parcel *parcel = pipe->oldest;
		struct pv_frame *frame = pv_burst_next(burst, parcel->frame.length);
		uint32_t offset;

		if (!frame)
			break;
		offset = frame->offset;
		*frame = parcel->frame;
		frame->offset = offset;
		memcpy(burst->memory + offset, parcel->bytes, parcel->frame.length);
		pv_burst_keep(burst, frame);
		pipe->oldest = parcel->next;
		if (!parcel->next)
			pipe->newest = NULL;
		pipe->n_bytes -= parcel->frame.length;
		pipe->n--;
		free(parcel);
	}
	if (done && pipe->n_waiting)
		pthread_cond_broadcast(&pipe->drained);
	return done;
}

/* ---- the loop's side ---- */

int64_t netleg_take_user(struct pv_netleg *leg, struct pv_burst *burst)
{
	uint32_t n;

	pthread_mutex_lock(&leg->from_user->lock);
	n = drain(leg->from_user, burst, PV_NETLOOP_BURST);
	pthread_mutex_unlock(&leg->from_user->lock);
	return n;
}

void netleg_send_user(struct pv_netleg *leg, const uint8_t *memory, const struct pv_frame *frames, uint32_t n)
{
	uint32_t done = fill(leg->to_user, memory, frames, n);

	leg->counters.out_packets += done;
	leg->counters.dropped += n - done;
	for (uint32_t i = 0; i < done; i++)
		leg->counters.out_bytes += frames[i].length;
}

int netleg_has_user(struct pv_netleg *leg)
{
	uint32_t n;

	pthread_mutex_lock(&leg->from_user->lock);
	n = leg->from_user->n;
	pthread_mutex_unlock(&leg->from_user->lock);
	return n != 0;
}

/* ---- the program's ---- */

int64_t pv_netleg_give(struct pv_netleg *leg, const uint8_t *memory, const struct pv_frame *frames, uint32_t n)
{
	uint32_t done = fill(leg->from_user, memory, frames, n);

	/* The leg may be asleep, and is its loop's to touch: the loop looks at all ports of programs when it is kicked. */
	if (done)
		netloop_kick(leg->loop);
	return done;
}

int pv_netleg_wait_room(struct pv_netleg *leg, uint32_t n_bytes, int64_t timeout_ns)
{
	struct pv_netleg_pipe *pipe = leg->from_user;
	int64_t until = pv_now_ns() + timeout_ns;
	struct timespec at = { .tv_sec = until / NS_PER_S, .tv_nsec = until % NS_PER_S };
	int is_there;

	pthread_mutex_lock(&pipe->lock);
	pipe->n_waiting++;
	while (pipe->n_bytes + n_bytes > PV_NETLEG_USER_BYTES)
		if (pthread_cond_timedwait(&pipe->drained, &pipe->lock, &at))
			break;
	pipe->n_waiting--;
	is_there = pipe->n_bytes + n_bytes <= PV_NETLEG_USER_BYTES;
	pthread_mutex_unlock(&pipe->lock);
	return is_there;
}

int64_t pv_netleg_get(struct pv_netleg *leg, struct pv_burst *burst, uint32_t max, int64_t timeout_ns)
{
	struct pv_netleg_pipe *pipe = leg->to_user;
	int64_t until = pv_now_ns() + timeout_ns;
	struct timespec at = { .tv_sec = until / NS_PER_S, .tv_nsec = until % NS_PER_S };
	uint32_t n;

	pthread_mutex_lock(&pipe->lock);
	while (!pipe->n && timeout_ns > 0)
		if (pthread_cond_timedwait(&pipe->filled, &pipe->lock, &at))
			break;
	n = drain(pipe, burst, max);
	pthread_mutex_unlock(&pipe->lock);
	return n;
}
