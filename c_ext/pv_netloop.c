/* SPDX-License-Identifier: MIT */
/* The life of a loop and its turns: who is looked at, who sleeps. Its legs are in pv_netloop_legs.c, where frames go in pv_netloop_forward.c. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "netloop_private.h"
#include "pv_atomic.h"
#include "pv_home.h"

#define MAX_EVENTS 64
#define NS_PER_S 1000000000
#define NS_PER_MS 1000000
#define POLL_NS 20000              /* how often a busy loop asks the kernel for news */
#define AGE_NS (10LL * NS_PER_S)   /* how often old addresses are looked for */

int pv_netloop_new(int64_t spin_ns, uint32_t max_addresses, struct pv_netloop **made)
{
	struct pv_netloop *loop = calloc(1, sizeof(*loop));
	struct epoll_event event = { .events = EPOLLIN };
	pthread_condattr_t monotonic;
	int result;

	if (!loop)
		return -ENOMEM;
	loop->home = pv_home_mark();
	loop->spin_ns = spin_ns;
	loop->hold_ns = PV_NETLOOP_HELD_NS;
	loop->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	loop->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	pthread_mutex_init(&loop->lock, NULL);
	pthread_mutex_init(&loop->news_lock, NULL);
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&loop->news, &monotonic);
	pthread_condattr_destroy(&monotonic);
	loop->verdict = calloc(1, sizeof(*loop->verdict));
	loop->burst.capacity = NETLOOP_BURST_BYTES;
	loop->burst.max = 2 * PV_NETLOOP_BURST;
	loop->burst.memory = malloc(NETLOOP_BURST_BYTES + PV_NETIF_MAX_FRAME + 1);
	loop->burst.frames = calloc(loop->burst.max, sizeof(*loop->burst.frames));
	result = pv_switch_init(&loop->sw, max_addresses, 0);
	if (!result && (!loop->verdict || !loop->burst.memory || !loop->burst.frames))
		result = -ENOMEM;
	if (!result && (loop->epoll_fd < 0 || loop->kick_fd < 0 || epoll_ctl(loop->epoll_fd, EPOLL_CTL_ADD, loop->kick_fd, &event)))
		result = -errno;
	if (result) {
		pv_netloop_free(loop);
		return result;
	}
	*made = loop;
	return 0;
}

void pv_netloop_free(struct pv_netloop *loop)
{
	if (!pv_home_is_here(loop->home))
		return;
	if (loop->epoll_fd >= 0)
		close(loop->epoll_fd);
	if (loop->kick_fd >= 0)
		close(loop->kick_fd);
	pv_switch_destroy(&loop->sw);
	free(loop->verdict);
	free(loop->burst.memory);
	free(loop->burst.frames);
	free(loop->legs);
	free(loop->active);
	free(loop->timed);
	free(loop->by_port);
	pthread_mutex_destroy(&loop->lock);
	pthread_mutex_destroy(&loop->news_lock);
	pthread_cond_destroy(&loop->news);
	free(loop);
}

/* ---- visitors ---- */

void netloop_kick(struct pv_netloop *loop)
{
	uint64_t one = 1;

	/* It may be full: then it is readable. */
	while (write(loop->kick_fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

void pv_netloop_enter(struct pv_netloop *loop)
{
	pv_add(&loop->visitors, 1);
	netloop_kick(loop);
	pthread_mutex_lock(&loop->lock);
}

void pv_netloop_leave(struct pv_netloop *loop)
{
	pthread_mutex_unlock(&loop->lock);
	pv_add(&loop->visitors, -1u);
}

/* The mutex is not fair: let all in who wait. */
static void let_visitors_in(struct pv_netloop *loop)
{
	if (!pv_load_relaxed(&loop->visitors))
		return;
	pthread_mutex_unlock(&loop->lock);
	while (pv_load_relaxed(&loop->visitors) && !pv_load_relaxed(&loop->stopping))
		sched_yield();
	pthread_mutex_lock(&loop->lock);
}

void pv_netloop_set_hold(struct pv_netloop *loop, int64_t hold_ns)
{
	loop->hold_ns = hold_ns;
}

struct pv_switch *pv_netloop_switch(struct pv_netloop *loop)
{
	return &loop->sw;
}

int pv_netloop_thread(const struct pv_netloop *loop)
{
	return pv_load_relaxed(&loop->tid);
}

uint64_t pv_netloop_sleeps(const struct pv_netloop *loop)
{
	return pv_load_relaxed(&loop->sleeps);
}

/* ---- news ---- */

static void tell(struct pv_netleg *leg)
{
	struct pv_netloop *loop = leg->loop;

	if (leg->told)
		return;
	leg->told = 1;
	pthread_mutex_lock(&loop->news_lock);
	loop->has_news = 1;
	pthread_cond_signal(&loop->news);
	pthread_mutex_unlock(&loop->news_lock);
}

int64_t pv_netloop_wait_news(struct pv_netloop *loop, int64_t timeout_ns)
{
	int64_t until = pv_now_ns() + timeout_ns;
	struct timespec at = { .tv_sec = until / NS_PER_S, .tv_nsec = until % NS_PER_S };
	int64_t result = 0;

	pthread_mutex_lock(&loop->news_lock);
	while (!loop->has_news && !pv_load_relaxed(&loop->stopping))
		if (pthread_cond_timedwait(&loop->news, &loop->news_lock, &at)) {
			result = -ETIME;
			break;
		}
	if (loop->has_news)
		result = 0;
	else if (pv_load_relaxed(&loop->stopping))
		result = -ECANCELED;
	loop->has_news = 0;
	pthread_mutex_unlock(&loop->news_lock);
	return result;
}

/* ---- turns ---- */

void netloop_settle(struct pv_netleg *leg)
{
	netloop_note_time(leg);
	/* It is to be told of buffers, too, before it sleeps again. */
	if (leg->kind == PV_NETLEG_BACK && leg->back->waiting_frames && !leg->active)
		netloop_rouse(leg);
	if (leg->state || leg->stale)
		tell(leg);
}

/* One burst of a leg: whether there was anything. */
static int serve(struct pv_netleg *leg)
{
	struct pv_netloop *loop = leg->loop;
	int64_t n;

	netleg_look(leg);
	if (leg->wire && !netleg_has_room(leg->wire)) {
		leg->blocked = leg->wire->wants_room = 1;
		/* It asks its peer to say when there is room, before it sleeps again. */
		if (!leg->wire->active)
			netloop_rouse(leg->wire);
		return 0;
	}
	leg->blocked = 0;
	if (netleg_is_held(leg))
		return 0;
	pv_burst_clear(&loop->burst);
	n = leg->state ? 0 : netleg_take(leg, &loop->burst);
	if (n < 0)
		netleg_fail(leg, n);
	/* What came before the peer broke the protocol was well. */
	if (!loop->burst.n)
		return 0;
	leg->had_work = 1;
	leg->counters.bursts++;
	netloop_forward(leg, loop->burst.n);
	return 1;
}

/* A leg has been idle for long enough: have it wake us. */
static void put_to_sleep(struct pv_netleg *leg)
{
	int result;

	/* One that is held and has no buffers to wait for has nothing to wake us for but the time. */
	if (leg->state || leg->blocked || (leg->held_ns && leg->kind != PV_NETLEG_BACK)) {
		netloop_set_polled(leg, 0);
		netloop_deactivate(leg);
		return;
	}
	result = netleg_arm(leg);
	if (result > 0) {
		result = netloop_set_polled(leg, 1);
		if (!result) {
			netloop_deactivate(leg);
			return;
		}
		netleg_disarm(leg, 0);
	}
	if (result < 0)
		netleg_fail(leg, result);
	else
		leg->idle_since_ns = 0;
}

/* Those that waited for room in this one. */
static void unblock(struct pv_netleg *leg)
{
	leg->wants_room = 0;
	if (leg->wire && leg->wire->blocked)
		netloop_rouse(leg->wire);
}

/* Those that were held back and sleep, as something that waited has gone. */
static void release_held(struct pv_netloop *loop)
{
	for (uint32_t i = loop->n_timed; i-- > 0;) {
		struct pv_netleg *leg = loop->timed[i];

		if (leg->held_ns && !leg->active && leg->backlog->bytes <= PV_NETLOOP_FREED_BYTES)
			netloop_rouse(leg);
	}
}

static void look_at(struct pv_netleg *leg)
{
	struct pv_netloop *loop = leg->loop;

	if (serve(leg)) {
		leg->idle_since_ns = 0;
	} else if (!leg->idle_since_ns) {
		leg->idle_since_ns = loop->now_ns;
	}
	if (leg->state || leg->stale)
		tell(leg);
	netloop_note_time(leg);
	if (leg->wants_room && netleg_has_room(leg))
		unblock(leg);
	if (loop->n_held)
		release_held(loop);
	if (leg->idle_since_ns && loop->now_ns - leg->idle_since_ns >= loop->spin_ns)
		put_to_sleep(leg);
}

static void wake(struct pv_netloop *loop, struct pv_netleg *leg)
{
	if (!leg) {
		uint64_t count;

		while (read(loop->kick_fd, &count, sizeof(count)) < 0 && errno == EINTR)
			;
		for (uint32_t i = 0; i < loop->n_legs; i++)
			if (loop->legs[i]->kind == PV_NETLEG_USER)
				netloop_rouse(loop->legs[i]);
		return;
	}
	leg->counters.wakeups++;
	if (!leg->active) {
		netloop_set_polled(leg, 0);
		netleg_disarm(leg, 1);
	}
	netloop_activate(leg);
}

/* When the next leg is to be looked at that sleeps; those that are due by now are woken. 0: none. */
static int64_t look_at_times(struct pv_netloop *loop)
{
	int64_t first = 0;

	for (uint32_t i = loop->n_timed; i-- > 0;) {
		struct pv_netleg *leg = loop->timed[i];
		int64_t due = netleg_due(leg);

		if (!due) {
			netloop_untime(loop, i);
		} else if (due <= loop->now_ns) {
			netloop_rouse(leg);
		} else if (!first || due < first) {
			first = due;
		}
	}
	return first;
}

static int poll_kernel(struct pv_netloop *loop, int64_t until_ns)
{
	struct epoll_event events[MAX_EVENTS];
	uint64_t removals = loop->removals;
	int timeout = 0, n;

	if (until_ns) {
		int64_t left = until_ns < 0 ? -1 : (until_ns - loop->now_ns + NS_PER_MS - 1) / NS_PER_MS;

		timeout = left < 0 ? -1 : left > 60000 ? 60000 : (int)left;
		pv_store_relaxed(&loop->sleeps, loop->sleeps + 1);
		pthread_mutex_unlock(&loop->lock);
	}
	n = epoll_wait(loop->epoll_fd, events, MAX_EVENTS, timeout);
	if (until_ns)
		pthread_mutex_lock(&loop->lock);
	if (n < 0)
		return errno == EINTR ? 0 : -errno;
	loop->now_ns = pv_now_ns();
	/* Of a leg that was removed while we slept there may be an event: those of the others come again. */
	for (int i = 0; i < n && removals == loop->removals; i++)
		wake(loop, events[i].data.ptr);
	return 0;
}

int pv_netloop_run(struct pv_netloop *loop)
{
	int64_t polled_ns = 0, aged_ns = 0;
	int result = 0;

	if (!pv_home_is_here(loop->home))
		return -ECHILD;
	pv_store_relaxed(&loop->tid, (int)syscall(SYS_gettid));
	pthread_mutex_lock(&loop->lock);
	while (!result && !pv_load_relaxed(&loop->stopping)) {
		let_visitors_in(loop);
		loop->now_ns = pv_now_ns();
		/* From the end: who goes to sleep is replaced by the last one, which has had its turn. */
		for (uint32_t i = loop->n_active; i-- > 0;)
			if (i < loop->n_active)
				look_at(loop->active[i]);
		if (loop->now_ns - aged_ns >= AGE_NS) {
			pv_switch_age(&loop->sw, loop->now_ns);
			aged_ns = loop->now_ns;
		}
		if (!loop->n_active) {
			int64_t due = look_at_times(loop);

			if (!loop->n_active)
				result = poll_kernel(loop, due ? due : -1);
		} else if (loop->now_ns - polled_ns >= POLL_NS) {
			look_at_times(loop);
			result = poll_kernel(loop, 0);
			polled_ns = loop->now_ns;
		}
	}
	pthread_mutex_unlock(&loop->lock);
	return result;
}

static void *run(void *argument)
{
	pv_netloop_run(argument);
	return NULL;
}

int pv_netloop_start(struct pv_netloop *loop)
{
	sigset_t all, before;
	int error;

	if (!pv_home_is_here(loop->home))
		return -ECHILD;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&loop->thread, NULL, run, loop);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	loop->started = !error;
	return -error;
}

int pv_netloop_stop(struct pv_netloop *loop)
{
	if (!pv_home_is_here(loop->home))
		return -ECHILD;
	pv_store_relaxed(&loop->stopping, 1);
	netloop_kick(loop);
	if (loop->started && !loop->ended) {
		pthread_join(loop->thread, NULL);
		loop->ended = 1;
	}
	pthread_mutex_lock(&loop->news_lock);
	pthread_cond_broadcast(&loop->news);
	pthread_mutex_unlock(&loop->news_lock);
	return 0;
}
