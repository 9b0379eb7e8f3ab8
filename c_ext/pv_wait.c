/* SPDX-License-Identifier: MIT */
/* The receiving side of events: arm, look again, sleep. What excludes the lost wake-up stands in pv_event.c. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "pv_atomic.h"
#include "pv_event.h"
#include "pv_home.h"

#define NOTHING (-1)
#define LOOKS_PER_CLOCK_READ 64
#define DRAIN_BYTES 4096

int64_t pv_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static int watch(struct pv_waiter *waiter, int fd)
{
	struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
	int flags = fcntl(fd, F_GETFL);

	if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0)
		return -errno;
	return epoll_ctl(waiter->epoll_fd, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

int pv_waiter_init(struct pv_waiter *waiter, const uint32_t *generation)
{
	int result;

	*waiter = (struct pv_waiter){.home = pv_home_mark(), .epoll_fd = -1, .kick_fd = -1, .timer_fd = -1};
	waiter->generation = generation ? generation : &waiter->fixed_generation;
	waiter->generation_seen = pv_load_acquire(waiter->generation);
	pv_spin_init(&waiter->spin, PV_SPIN_DEFAULT_NS, NULL);
	waiter->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	waiter->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	result = waiter->epoll_fd < 0 || waiter->kick_fd < 0 ? -errno : watch(waiter, waiter->kick_fd);
	if (result)
		pv_waiter_destroy(waiter);
	return result;
}

void pv_waiter_destroy(struct pv_waiter *waiter)
{
	if (pv_home_is_here(waiter->home))
		for (uint32_t i = 0; i < waiter->n_doorbells; i++)
			pv_store_relaxed(&waiter->doorbells[i]->inbox->asleep, 0);
	if (waiter->epoll_fd >= 0)
		close(waiter->epoll_fd);
	if (waiter->kick_fd >= 0)
		close(waiter->kick_fd);
	if (waiter->timer_fd >= 0)
		close(waiter->timer_fd);
	for (uint32_t i = 0; i < waiter->n_doorbells; i++)
		free(waiter->doorbells[i]);
	free(waiter->doorbells);
	waiter->epoll_fd = waiter->kick_fd = waiter->timer_fd = -1;
	waiter->doorbells = NULL;
	waiter->n_doorbells = 0;
}

void pv_waiter_nudge(struct pv_waiter *waiter)
{
	pv_bell_ring(waiter->kick_fd);
}

static void arm(struct pv_waiter *waiter, struct pv_inbox *inbox)
{
	pv_exchange(&inbox->asleep, 1);
	if (pv_load_relaxed(&waiter->always_armed) && pv_inbox_has_event(inbox))
		pv_waiter_nudge(waiter);
}

static int check_at_rest(const struct pv_waiter *waiter)
{
	if (!pv_home_is_here(waiter->home))
		return -ECHILD;
	return pv_load_acquire(&waiter->waiting) ? -EBUSY : 0;
}

int pv_waiter_add(struct pv_waiter *waiter, struct pv_inbox *inbox, int bell_fd)
{
	struct pv_doorbell **grown, *doorbell;
	int result = check_at_rest(waiter);

	if (result == 0)
		result = pv_inbox_check(inbox);
	if (result)
		return result;
	grown = realloc(waiter->doorbells, (waiter->n_doorbells + 1) * sizeof *grown);
	if (!grown)
		return -ENOMEM;
	waiter->doorbells = grown;
	doorbell = malloc(sizeof *doorbell);
	if (!doorbell)
		return -ENOMEM;
	*doorbell = (struct pv_doorbell){.inbox = inbox, .fd = bell_fd};
	result = watch(waiter, bell_fd);
	if (result) {
		free(doorbell);
		return result;
	}
	waiter->doorbells[waiter->n_doorbells++] = doorbell;
	if (pv_load_relaxed(&waiter->always_armed))
		arm(waiter, inbox);
	return 0;
}

int pv_waiter_remove(struct pv_waiter *waiter, struct pv_inbox *inbox, int bell_fd)
{
	int result = check_at_rest(waiter);
	uint32_t i;

	if (result)
		return result;
	for (i = 0; i < waiter->n_doorbells && waiter->doorbells[i]->inbox != inbox; i++)
		;
	if (i == waiter->n_doorbells)
		return -ENOENT;
	free(waiter->doorbells[i]);
	waiter->doorbells[i] = waiter->doorbells[--waiter->n_doorbells];
	pv_store_relaxed(&inbox->asleep, 0);
	/* Not there any more when its last writer was gone: drain took it out. */
	epoll_ctl(waiter->epoll_fd, EPOLL_CTL_DEL, bell_fd, NULL);
	return 0;
}

int pv_waiter_arm_always(struct pv_waiter *waiter)
{
	uint32_t i;

	if (!pv_home_is_here(waiter->home))
		return -ECHILD;
	pv_store_relaxed(&waiter->always_armed, 1);
	for (i = 0; i < waiter->n_doorbells; i++)
		arm(waiter, waiter->doorbells[i]->inbox);
	return 0;
}

void pv_waiter_kick(struct pv_waiter *waiter)
{
	if (pv_home_is_here(waiter->home) && pv_exchange(&waiter->kicked, 1) == 0)
		pv_waiter_nudge(waiter);
}

/* The descriptor first: a kick that comes in between finds `kicked` set, needs no write of its own and is told by this. */
static int take_kick(struct pv_waiter *waiter)
{
	uint64_t count;

	if (!pv_load_relaxed(&waiter->kicked))
		return 0;
	while (read(waiter->kick_fd, &count, sizeof count) < 0 && errno == EINTR)
		;
	return pv_exchange(&waiter->kicked, 0) != 0;
}

/*
 * Empty one descriptor. A doorbell whose last writer is gone would stay readable for ever: it leaves the set. One read a
 * wake-up is enough: a hostile sender that fills its pipe makes us come back, it does not hold us here.
 */
static void silence(struct pv_waiter *waiter, int fd)
{
	char bytes[DRAIN_BYTES];

	if (read(fd, bytes, sizeof bytes) == 0) {
		epoll_ctl(waiter->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
		waiter->hung_up = 1;
	}
}

/* Sleep up to timeout_ms (-1: no limit) on all descriptors and silence those that woke us: how many, or -errno. */
static int sleep_on_bells(struct pv_waiter *waiter, int timeout_ms)
{
	struct epoll_event events[16];
	int i, n = epoll_wait(waiter->epoll_fd, events, 16, timeout_ms);

	if (n < 0)
		return -errno;
	for (i = 0; i < n; i++) {
		silence(waiter, events[i].data.fd);
		pv_waiter_heard(waiter, events[i].data.fd);
	}
	pv_waiter_run_eois(waiter);
	pv_waiter_hear_again(waiter);
	return n;
}

/* What ends a wait whatever it waits for, each told once. */
static int look_at_waiter(struct pv_waiter *waiter)
{
	uint32_t generation;

	if (take_kick(waiter))
		return PV_WAIT_KICKED;
	generation = pv_load_acquire(waiter->generation);
	if (generation != waiter->generation_seen || waiter->hung_up) {
		waiter->generation_seen = generation;
		waiter->hung_up = 0;
		return PV_WAIT_STALE;
	}
	return NOTHING;
}

int pv_waiter_look(struct pv_waiter *waiter)
{
	int result = look_at_waiter(waiter);

	return result == NOTHING ? PV_WAIT_TIMEOUT : result;
}

static int look(struct pv_waiter *waiter, struct pv_port *port)
{
	int result = look_at_waiter(waiter);
	uint32_t i;

	if (result != NOTHING)
		return result;
	if (port) {
		if (port->rx && pv_inbox_slot_has_event(port->rx, port->rx_slot))
			return pv_port_take_pending(port) ? PV_WAIT_EVENT : NOTHING;
		return NOTHING;
	}
	for (i = 0; i < waiter->n_doorbells; i++)
		if (pv_inbox_has_event(waiter->doorbells[i]->inbox))
			return PV_WAIT_EVENT;
	return NOTHING;
}

int pv_waiter_drain(struct pv_waiter *waiter)
{
	int n, result;

	if (!pv_home_is_here(waiter->home))
		return -ECHILD;
	pv_waiter_end_storm(waiter);
	n = sleep_on_bells(waiter, 0);
	if (n < 0 && n != -EINTR)
		return n;
	result = look_at_waiter(waiter);
	return result == NOTHING ? PV_WAIT_EVENT : result;
}

static int spin(struct pv_waiter *waiter, struct pv_port *port, int64_t start_ns, int64_t spin_ns)
{
	int64_t until_ns = start_ns + (spin_ns < PV_SPIN_SLICE_NS ? spin_ns : PV_SPIN_SLICE_NS);

	do {
		for (int i = 0; i < LOOKS_PER_CLOCK_READ; i++) {
			int result = look(waiter, port);

			if (result != NOTHING)
				return result;
			pv_pause();
		}
	} while (pv_now_ns() < until_ns);
	return spin_ns > PV_SPIN_SLICE_NS ? PV_WAIT_INTERRUPTED : NOTHING;
}

/* The spin before the first sleep, of a given or the learnt length. */
static int spin_first(struct pv_waiter *waiter, struct pv_port *port, int64_t start_ns, int64_t spin_ns,
		      int64_t timeout_ns)
{
	int64_t most_ns = spin_ns;
	int result;

	if (spin_ns < 0)
		most_ns = pv_spin_begin(&waiter->spin, start_ns, pv_spin_cpu_is_idle(start_ns));
	if (timeout_ns >= 0 && timeout_ns < most_ns)
		most_ns = timeout_ns;
	if (most_ns <= 0)
		return NOTHING;
	result = spin(waiter, port, start_ns, most_ns);
	if (spin_ns < 0)
		pv_spin_end(&waiter->spin, pv_now_ns() - start_ns, result == PV_WAIT_EVENT);
	return result;
}

/* Senders ring from arm_for to disarm. Only the inbox that can end the wait is armed: others need not wake us. */
static void arm_for(struct pv_waiter *waiter, struct pv_port *port)
{
	uint32_t i;

	if (pv_load_relaxed(&waiter->always_armed))
		return;
	if (port) {
		if (port->rx)
			arm(waiter, port->rx);
		return;
	}
	for (i = 0; i < waiter->n_doorbells; i++)
		arm(waiter, waiter->doorbells[i]->inbox);
}

/* Another thread may be arming for a foreign loop at this moment: whoever exchanges second sees what the other wants. */
static void unarm(struct pv_waiter *waiter, struct pv_inbox *inbox)
{
	pv_exchange(&inbox->asleep, 0);
	if (pv_load_relaxed(&waiter->always_armed))
		arm(waiter, inbox);
}

static void disarm(struct pv_waiter *waiter, struct pv_port *port)
{
	uint32_t i;

	if (pv_load_relaxed(&waiter->always_armed))
		return;
	if (port) {
		if (port->rx)
			unarm(waiter, port->rx);
		return;
	}
	for (i = 0; i < waiter->n_doorbells; i++)
		unarm(waiter, waiter->doorbells[i]->inbox);
}

int pv_waiter_arm(struct pv_waiter *waiter, struct pv_port *port)
{
	int result;

	pv_waiter_run_eois(waiter);
	arm_for(waiter, port);
	result = look(waiter, port);
	if (result != NOTHING)
		return result;
	waiter->sleeps++;
	pv_waiter_end_storm(waiter);
	return PV_WAIT_TIMEOUT;
}

void pv_waiter_disarm(struct pv_waiter *waiter, struct pv_port *port)
{
	disarm(waiter, port);
}

/* Milliseconds to a deadline, rounded up so that a sleep never ends early; -1 for none. */
static int milliseconds_to(int64_t deadline_ns)
{
	int64_t left;

	if (deadline_ns < 0)
		return -1;
	left = (deadline_ns - pv_now_ns() + 999999) / 1000000;
	return left < 0 ? 0 : left > 1000000 ? 1000000 : (int)left;
}

/* Arm, look again, sleep: once. */
static int doze(struct pv_waiter *waiter, struct pv_port *port, int64_t deadline_ns)
{
	int timeout_ms = milliseconds_to(deadline_ns), result, n;

	if (timeout_ms == 0)
		return PV_WAIT_TIMEOUT;
	arm_for(waiter, port);
	result = look(waiter, port);
	if (result == NOTHING) {
		waiter->sleeps++;
		pv_waiter_end_storm(waiter);
		n = sleep_on_bells(waiter, timeout_ms);
		waiter->wakeups += n > 0;
		if (n < 0)
			result = n == -EINTR ? PV_WAIT_INTERRUPTED : n;
	}
	disarm(waiter, port);
	return result;
}

static int wait_for(struct pv_waiter *waiter, struct pv_port *port, int64_t spin_ns, int64_t timeout_ns)
{
	int64_t start_ns = spin_ns || timeout_ns > 0 ? pv_now_ns() : 0;
	int64_t deadline_ns = timeout_ns < 0 ? -1 : start_ns + timeout_ns;
	int result = look(waiter, port), slept = 0;

	if (result == NOTHING && spin_ns)
		result = spin_first(waiter, port, start_ns, spin_ns, timeout_ns);
	if (result == NOTHING && timeout_ns == 0)
		result = PV_WAIT_TIMEOUT;
	while (result == NOTHING) {
		slept = 1;
		result = doze(waiter, port, deadline_ns);
		if (result == NOTHING || result == PV_WAIT_INTERRUPTED) {
			int after = look(waiter, port);

			result = after == NOTHING ? result : after;
		}
	}
	if (slept && spin_ns < 0 && result == PV_WAIT_EVENT)
		pv_spin_slept(&waiter->spin, pv_now_ns() - start_ns);
	return result;
}

int pv_wait(struct pv_waiter *waiter, struct pv_port *port, int64_t spin_ns, int64_t timeout_ns)
{
	int result;

	if (!pv_home_is_here(waiter->home))
		return -ECHILD;
	if (port && pv_load_relaxed(&port->closed))
		return -EBADF;
	if (pv_exchange(&waiter->waiting, 1))
		return -EBUSY;
	pv_waiter_run_eois(waiter);
	result = wait_for(waiter, port, spin_ns, timeout_ns);
	pv_store_release(&waiter->waiting, 0);
	return result;
}
