/* SPDX-License-Identifier: MIT */
/*
 * What a waiter leaves for later because its peer storms: ends of interrupts, and doorbells that ring for nothing. One
 * timer wakes for both.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "pv_atomic.h"
#include "pv_event.h"
#include "pv_home.h"

/* Delayed EOIs. The lists, the timer and eoi_due_ns change under `eoi_lock`, which is taken before a port's `busy`. */

static void lock_eois(struct pv_waiter *waiter)
{
	while (pv_exchange(&waiter->eoi_lock, 1))
		sched_yield();
}

static void unlock_eois(struct pv_waiter *waiter)
{
	pv_store_release(&waiter->eoi_lock, 0);
}

static void unlink_eoi(struct pv_waiter *waiter, struct pv_port *port)
{
	struct pv_delayed *list = &waiter->delayed[port->eoi_class];

	*(port->eoi_before ? &port->eoi_before->eoi_next : &list->first) = port->eoi_next;
	*(port->eoi_next ? &port->eoi_next->eoi_before : &list->last) = port->eoi_before;
	port->eoi_next = port->eoi_before = NULL;
}

static int is_listed(const struct pv_waiter *waiter, const struct pv_port *port)
{
	return port->eoi_before || waiter->delayed[port->eoi_class].first == port;
}

/* Set the timer to what is due first. It only wakes: a late or lost expiry costs time, never an event. */
static int set_timer(struct pv_waiter *waiter)
{
	struct itimerspec at = {0};
	int64_t due_ns = 0;

	for (uint32_t i = 0; i < PV_EOI_CLASSES; i++) {
		const struct pv_port *first = waiter->delayed[i].first;

		if (first && (!due_ns || first->eoi_at_ns < due_ns))
			due_ns = first->eoi_at_ns;
	}
	pv_store_relaxed(&waiter->eoi_due_ns, due_ns);
	if (waiter->hear_at_ns && (!due_ns || waiter->hear_at_ns < due_ns))
		due_ns = waiter->hear_at_ns;
	at.it_value.tv_sec = due_ns / 1000000000;
	at.it_value.tv_nsec = due_ns % 1000000000;
	return timerfd_settime(waiter->timer_fd, TFD_TIMER_ABSTIME, &at, NULL) ? -errno : 0;
}

static int make_timer(struct pv_waiter *waiter)
{
	struct epoll_event event = {.events = EPOLLIN};
	int result;

	if (waiter->timer_fd >= 0)
		return 0;
	event.data.fd = waiter->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	if (waiter->timer_fd < 0)
		return -errno;
	result = epoll_ctl(waiter->epoll_fd, EPOLL_CTL_ADD, waiter->timer_fd, &event) ? -errno : 0;
	if (result) {
		close(waiter->timer_fd);
		waiter->timer_fd = -1;
	}
	return result;
}

int pv_waiter_delay_eoi(struct pv_waiter *waiter, struct pv_port *port, uint32_t eoi_class)
{
	struct pv_delayed *list = &waiter->delayed[eoi_class % PV_EOI_CLASSES];
	int result;

	lock_eois(waiter);
	result = pv_load_relaxed(&port->closed) ? -EINVAL : make_timer(waiter);
	if (result == 0) {
		port->eoi_class = eoi_class % PV_EOI_CLASSES;
		port->eoi_before = list->last;
		port->eoi_next = NULL;
		*(list->last ? &list->last->eoi_next : &list->first) = port;
		list->last = port;
		result = set_timer(waiter);
		if (result)
			unlink_eoi(waiter, port);
	}
	unlock_eois(waiter);
	return result;
}

void pv_waiter_forget_eoi(struct pv_waiter *waiter, struct pv_port *port)
{
	lock_eois(waiter);
	if (is_listed(waiter, port))
		unlink_eoi(waiter, port);
	unlock_eois(waiter);
}

void pv_waiter_end_storm(struct pv_waiter *waiter)
{
	pv_store_relaxed(&waiter->storm_events, 0);
	pv_store_relaxed(&waiter->storming, 0);
}

void pv_waiter_run_eois(struct pv_waiter *waiter)
{
	int64_t due_ns = pv_load_relaxed(&waiter->eoi_due_ns), now_ns;

	if (!due_ns || !pv_home_is_here(waiter->home))
		return;
	now_ns = pv_now_ns();
	if (now_ns < due_ns)
		return;
	lock_eois(waiter);
	for (uint32_t i = 0; i < PV_EOI_CLASSES; i++) {
		struct pv_port *port;

		while ((port = waiter->delayed[i].first) && port->eoi_at_ns <= now_ns) {
			unlink_eoi(waiter, port);
			pv_port_end_eoi(port);
		}
	}
	set_timer(waiter);
	unlock_eois(waiter);
}

/*
 * Doorbells. Whoever holds one can write to it as often as he likes, and each write that is heard costs a wake-up. So rings
 * are counted between which none of the sender's events was taken. An honest sender rings once for each port that is not
 * pending yet, and once more for each of its threads that was overtaken: beyond that, the doorbell is left unheard for
 * 1, 2, 4 ... jiffies, up to a second, and then listened to again. What it would have told is seen by any look at the
 * inbox meanwhile; only a sleeper sees it late.
 */

static struct pv_doorbell *doorbell_of(const struct pv_waiter *waiter, int fd)
{
	for (uint32_t i = 0; i < waiter->n_doorbells; i++)
		if (waiter->doorbells[i]->fd == fd)
			return waiter->doorbells[i];
	return NULL;
}

static void listen_to(const struct pv_waiter *waiter, const struct pv_doorbell *doorbell, uint32_t events)
{
	struct epoll_event event = {.events = events, .data.fd = doorbell->fd};

	epoll_ctl(waiter->epoll_fd, EPOLL_CTL_MOD, doorbell->fd, &event);
}

static uint32_t jiffies_unheard(const struct pv_doorbell *doorbell)
{
	uint32_t free_rings = PV_BELL_THRESHOLD + pv_load_relaxed(&doorbell->n_ports), jiffies;

	if (doorbell->idle_row <= free_rings)
		return 0;
	jiffies = 1u << (doorbell->idle_row - free_rings < 9 ? doorbell->idle_row - free_rings - 1 : 8);
	return jiffies < PV_JIFFIES_PER_S ? jiffies : PV_JIFFIES_PER_S;
}

void pv_waiter_heard(struct pv_waiter *waiter, int fd)
{
	struct pv_doorbell *doorbell = doorbell_of(waiter, fd);
	uint32_t taken, generation, jiffies;

	if (!doorbell)
		return;
	taken = pv_load_relaxed(&doorbell->taken);
	generation = pv_load_relaxed(waiter->generation);
	if (taken != doorbell->taken_before)
		doorbell->idle_row = 0;
	else if (generation == doorbell->generation_before && jiffies_unheard(doorbell) < PV_JIFFIES_PER_S)
		doorbell->idle_row++;
	doorbell->taken_before = taken;
	doorbell->generation_before = generation;
	jiffies = jiffies_unheard(doorbell);
	if (!jiffies)
		return;
	lock_eois(waiter);
	if (make_timer(waiter) == 0) {
		doorbell->unheard_until_ns = pv_now_ns() + (int64_t)jiffies * PV_JIFFY_NS;
		if (!waiter->hear_at_ns || doorbell->unheard_until_ns < waiter->hear_at_ns)
			waiter->hear_at_ns = doorbell->unheard_until_ns;
		set_timer(waiter);
		listen_to(waiter, doorbell, 0);
		waiter->unheard++;
	}
	unlock_eois(waiter);
}

void pv_waiter_hear_again(struct pv_waiter *waiter)
{
	int64_t now_ns, next_ns = 0;

	if (!waiter->hear_at_ns || (now_ns = pv_now_ns()) < waiter->hear_at_ns)
		return;
	for (uint32_t i = 0; i < waiter->n_doorbells; i++) {
		struct pv_doorbell *doorbell = waiter->doorbells[i];

		if (!doorbell->unheard_until_ns)
			continue;
		if (doorbell->unheard_until_ns <= now_ns) {
			doorbell->unheard_until_ns = 0;
			listen_to(waiter, doorbell, EPOLLIN);
		} else if (!next_ns || doorbell->unheard_until_ns < next_ns) {
			next_ns = doorbell->unheard_until_ns;
		}
	}
	lock_eois(waiter);
	waiter->hear_at_ns = next_ns;
	set_timer(waiter);
	unlock_eois(waiter);
}
