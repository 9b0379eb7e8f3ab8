/* SPDX-License-Identifier: MIT */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "pv_vbd_throttle.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

#include "pv_atomic.h"
#include "pv_event.h"

#define NS_PER_S 1000000000
#define MAX_WAIT_NS (3600ll * NS_PER_S)
#define TYPICAL_BYTES 4096      /* of a request whose size nobody knows yet */

struct bucket {
	double rate, burst;     /* a second; rate 0: no limit */
	double level;           /* below 0: owed */
};

struct pv_vbd_throttle {
	pthread_mutex_t lock;   /* guards all but `on` */
	pthread_cond_t changed;
	struct bucket requests, bytes;
	int64_t filled_ns;      /* when the levels were right */
	uint32_t on;            /* whether there is a limit */
};

struct pv_vbd_throttle *pv_vbd_throttle_new(void)
{
	struct pv_vbd_throttle *throttle = calloc(1, sizeof(*throttle));
	pthread_condattr_t monotonic;

	if (!throttle)
		return NULL;
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&throttle->changed, &monotonic);
	pthread_condattr_destroy(&monotonic);
	pthread_mutex_init(&throttle->lock, NULL);
	return throttle;
}

void pv_vbd_throttle_free(struct pv_vbd_throttle *throttle)
{
	if (!throttle)
		return;
	pthread_cond_destroy(&throttle->changed);
	pthread_mutex_destroy(&throttle->lock);
	free(throttle);
}

static struct bucket full(uint64_t rate, uint64_t burst)
{
	double size = burst ? (double)burst : (double)rate / 10;

	return (struct bucket){ .rate = (double)rate, .burst = size < 1 ? 1 : size, .level = size < 1 ? 1 : size };
}

void pv_vbd_throttle_set(struct pv_vbd_throttle *throttle, const struct pv_vbd_rates *rates)
{
	pthread_mutex_lock(&throttle->lock);
	throttle->requests = full(rates->requests, rates->requests_burst);
	throttle->bytes = full(rates->bytes, rates->bytes_burst);
	throttle->filled_ns = pv_now_ns();
	pv_store_relaxed(&throttle->on, rates->requests || rates->bytes);
	pthread_cond_broadcast(&throttle->changed);
	pthread_mutex_unlock(&throttle->lock);
}

int pv_vbd_throttle_is_on(const struct pv_vbd_throttle *throttle)
{
	return (int)pv_load_relaxed(&throttle->on);
}

static void fill(struct bucket *bucket, double seconds)
{
	bucket->level += bucket->rate * seconds;
	if (bucket->level > bucket->burst)
		bucket->level = bucket->burst;
}

static double missing_s(const struct bucket *bucket)
{
	return bucket->rate > 0 && bucket->level < 1 ? (1 - bucket->level) / bucket->rate : 0;
}

/* Bring the buckets up to date; how long until both have something. With the lock. */
static int64_t missing_ns(struct pv_vbd_throttle *throttle)
{
	int64_t now_ns = pv_now_ns();
	double seconds = (double)(now_ns - throttle->filled_ns) / NS_PER_S, requests_s, bytes_s, ns;

	fill(&throttle->requests, seconds);
	fill(&throttle->bytes, seconds);
	throttle->filled_ns = now_ns;
	requests_s = missing_s(&throttle->requests);
	bytes_s = missing_s(&throttle->bytes);
	ns = (requests_s > bytes_s ? requests_s : bytes_s) * NS_PER_S;
	return ns >= MAX_WAIT_NS ? MAX_WAIT_NS : ns > 0 ? (int64_t)ns + 1 : 0;
}

static uint32_t at_most(uint32_t most, const struct bucket *bucket, double unit)
{
	double room = bucket->level / unit;

	return bucket->rate == 0 || room >= most ? most : room > 1 ? (uint32_t)room : 1;
}

uint32_t pv_vbd_throttle_room(struct pv_vbd_throttle *throttle, uint32_t most)
{
	uint32_t room = 0;

	pthread_mutex_lock(&throttle->lock);
	if (!missing_ns(throttle))
		room = at_most(at_most(most, &throttle->requests, 1), &throttle->bytes, TYPICAL_BYTES);
	pthread_mutex_unlock(&throttle->lock);
	return room;
}

int64_t pv_vbd_throttle_wait_ns(struct pv_vbd_throttle *throttle)
{
	int64_t wait_ns;

	pthread_mutex_lock(&throttle->lock);
	wait_ns = missing_ns(throttle);
	pthread_mutex_unlock(&throttle->lock);
	return wait_ns;
}

void pv_vbd_throttle_charge(struct pv_vbd_throttle *throttle, uint64_t requests, uint64_t bytes)
{
	pthread_mutex_lock(&throttle->lock);
	throttle->requests.level -= (double)requests;
	throttle->bytes.level -= (double)bytes;
	pthread_mutex_unlock(&throttle->lock);
}

void pv_vbd_throttle_rest(struct pv_vbd_throttle *throttle, const uint32_t *stopping)
{
	struct timespec until;
	int64_t wait_ns;

	pthread_mutex_lock(&throttle->lock);
	wait_ns = missing_ns(throttle);
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += (until.tv_nsec + wait_ns) / NS_PER_S;
	until.tv_nsec = (until.tv_nsec + wait_ns) % NS_PER_S;
	/* Woken for nothing, he asks for room again. */
	if (wait_ns && !pv_load_relaxed(stopping))
		pthread_cond_timedwait(&throttle->changed, &throttle->lock, &until);
	pthread_mutex_unlock(&throttle->lock);
}

void pv_vbd_throttle_kick(struct pv_vbd_throttle *throttle)
{
	pthread_mutex_lock(&throttle->lock);
	pthread_cond_broadcast(&throttle->changed);
	pthread_mutex_unlock(&throttle->lock);
}
