/* SPDX-License-Identifier: MIT */
/*
 * The lost wake-up is excluded by pairs of "write mine, then read yours", all sequentially consistent:
 *
 *   sender   pv_notify: set pending bit -> look at masked -> set selector bit -> look at asleep -> ring
 *   receiver pv_wait:   set asleep      -> look at pending (and selector)     -> sleep on the doorbell
 *   receiver unmask:    clear masked    -> look at pending
 *
 * Of each pair of sides at least one sees the other's write. The order of looks and writes is therefore part of the
 * protocol. The selector is set before `asleep` is looked at, so a receiver that waits for any slot sees it too.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
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

/* Inbox: bits. A slot number may come from anywhere; it is cut to the table. */

static uint32_t word_of(uint32_t slot)
{
	return (slot % PV_INBOX_SLOTS) / 64;
}

static uint64_t bit_of(uint32_t slot)
{
	return (uint64_t)1 << (slot % 64);
}

void pv_inbox_init(struct pv_inbox *inbox)
{
	inbox->version = PV_SHARED_VERSION;
	pv_store_release(&inbox->magic, PV_INBOX_MAGIC);
}

int pv_inbox_check(const struct pv_inbox *inbox)
{
	if (pv_load_acquire(&inbox->magic) != PV_INBOX_MAGIC || pv_load_relaxed(&inbox->version) != PV_SHARED_VERSION)
		return -EPROTO;
	return 0;
}

static uint64_t deliverable(struct pv_inbox *inbox, uint32_t word)
{
	return pv_load_ordered(&inbox->pending[word]) & ~pv_load_ordered(&inbox->masked[word]);
}

static int any_deliverable(struct pv_inbox *inbox)
{
	uint64_t selected = pv_load_ordered(&inbox->selector);

	for (; selected; selected &= selected - 1)
		if (deliverable(inbox, (uint32_t)__builtin_ctzll(selected)))
			return 1;
	return 0;
}

uint32_t pv_inbox_take(struct pv_inbox *inbox, uint32_t *slots, uint32_t max)
{
	uint64_t selected = pv_load_relaxed(&inbox->selector) ? pv_exchange(&inbox->selector, 0) : 0;
	uint32_t n = 0;

	for (; selected; selected &= selected - 1) {
		uint32_t word = (uint32_t)__builtin_ctzll(selected);
		uint64_t ready = deliverable(inbox, word), taken = 0;

		for (; ready && n < max; ready &= ready - 1) {
			taken |= ready & -ready;
			slots[n++] = word * 64 + (uint32_t)__builtin_ctzll(ready);
		}
		if (taken)
			pv_fetch_and(&inbox->pending[word], ~taken);
		if (ready) {
			pv_fetch_or(&inbox->selector, selected);
			break;
		}
	}
	return n;
}

/* Doorbells. */

static int write_bell(int fd)
{
	const uint64_t one = 1;

	if (write(fd, &one, sizeof one) == sizeof one || errno == EAGAIN)
		return 0;
	return -errno;
}

/* A pipe without a reader raises SIGPIPE in the writing thread: hold it back and eat it, whatever its handler is. */
static int write_pipe_bell(int fd)
{
	const struct timespec at_once = {0, 0};
	sigset_t pipe_signal, before, waiting;
	int result;

	sigemptyset(&pipe_signal);
	sigaddset(&pipe_signal, SIGPIPE);
	pthread_sigmask(SIG_BLOCK, &pipe_signal, &before);
	result = write_bell(fd);
	if (result == -EPIPE && sigpending(&waiting) == 0 && sigismember(&waiting, SIGPIPE))
		sigtimedwait(&pipe_signal, NULL, &at_once);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return result;
}

static int is_pipe(int fd)
{
	struct stat status;

	return fd >= 0 && fstat(fd, &status) == 0 && S_ISFIFO(status.st_mode);
}

int pv_bell_ring(int fd)
{
	return is_pipe(fd) ? write_pipe_bell(fd) : write_bell(fd);
}

/* Waiter. */

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

	*waiter = (struct pv_waiter){.home = pv_home_mark(), .epoll_fd = -1, .kick_fd = -1};
	waiter->generation = generation ? generation : &waiter->fixed_generation;
	waiter->generation_seen = pv_load_acquire(waiter->generation);
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
		for (uint32_t i = 0; i < waiter->n_inboxes; i++)
			pv_store_relaxed(&waiter->inboxes[i]->asleep, 0);
	if (waiter->epoll_fd >= 0)
		close(waiter->epoll_fd);
	if (waiter->kick_fd >= 0)
		close(waiter->kick_fd);
	free(waiter->inboxes);
	waiter->epoll_fd = waiter->kick_fd = -1;
	waiter->inboxes = NULL;
	waiter->n_inboxes = 0;
}

/* Makes epoll_fd readable without a kick: whoever sleeps there looks at everything again. */
static void nudge(struct pv_waiter *waiter)
{
	write_bell(waiter->kick_fd);
}

static void arm(struct pv_waiter *waiter, struct pv_inbox *inbox)
{
	pv_exchange(&inbox->asleep, 1);
	if (waiter->always_armed && any_deliverable(inbox))
		nudge(waiter);
}

static int check_at_rest(const struct pv_waiter *waiter)
{
	if (!pv_home_is_here(waiter->home))
		return -ECHILD;
	return pv_load_acquire(&waiter->waiting) ? -EBUSY : 0;
}

int pv_waiter_add(struct pv_waiter *waiter, struct pv_inbox *inbox, int bell_fd)
{
	struct pv_inbox **grown;
	int result = check_at_rest(waiter);

	if (result == 0)
		result = pv_inbox_check(inbox);
	if (result)
		return result;
	grown = realloc(waiter->inboxes, (waiter->n_inboxes + 1) * sizeof *grown);
	if (!grown)
		return -ENOMEM;
	waiter->inboxes = grown;
	result = watch(waiter, bell_fd);
	if (result)
		return result;
	waiter->inboxes[waiter->n_inboxes++] = inbox;
	if (waiter->always_armed)
		arm(waiter, inbox);
	return 0;
}

int pv_waiter_remove(struct pv_waiter *waiter, struct pv_inbox *inbox, int bell_fd)
{
	int result = check_at_rest(waiter);
	uint32_t i;

	if (result)
		return result;
	for (i = 0; i < waiter->n_inboxes && waiter->inboxes[i] != inbox; i++)
		;
	if (i == waiter->n_inboxes)
		return -ENOENT;
	waiter->inboxes[i] = waiter->inboxes[--waiter->n_inboxes];
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
	waiter->always_armed = 1;
	for (i = 0; i < waiter->n_inboxes; i++)
		arm(waiter, waiter->inboxes[i]);
	return 0;
}

void pv_waiter_kick(struct pv_waiter *waiter)
{
	if (pv_home_is_here(waiter->home) && pv_exchange(&waiter->kicked, 1) == 0)
		nudge(waiter);
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
	for (i = 0; i < n; i++)
		silence(waiter, events[i].data.fd);
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
		if (port->rx && deliverable(port->rx, word_of(port->rx_slot)) & bit_of(port->rx_slot))
			return pv_port_take_pending(port) ? PV_WAIT_EVENT : NOTHING;
		return NOTHING;
	}
	for (i = 0; i < waiter->n_inboxes; i++)
		if (any_deliverable(waiter->inboxes[i]))
			return PV_WAIT_EVENT;
	return NOTHING;
}

int pv_waiter_drain(struct pv_waiter *waiter)
{
	int n, result;

	if (!pv_home_is_here(waiter->home))
		return -ECHILD;
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

/* Senders ring from arm_for to disarm. Only the inbox that can end the wait is armed: others need not wake us. */
static void arm_for(struct pv_waiter *waiter, struct pv_port *port)
{
	uint32_t i;

	if (waiter->always_armed)
		return;
	if (port) {
		if (port->rx)
			arm(waiter, port->rx);
		return;
	}
	for (i = 0; i < waiter->n_inboxes; i++)
		arm(waiter, waiter->inboxes[i]);
}

static void disarm(struct pv_waiter *waiter, struct pv_port *port)
{
	uint32_t i;

	if (waiter->always_armed)
		return;
	if (port) {
		if (port->rx)
			pv_store_relaxed(&port->rx->asleep, 0);
		return;
	}
	for (i = 0; i < waiter->n_inboxes; i++)
		pv_store_relaxed(&waiter->inboxes[i]->asleep, 0);
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
	int64_t start_ns = spin_ns > 0 || timeout_ns > 0 ? pv_now_ns() : 0;
	int64_t deadline_ns = timeout_ns < 0 ? -1 : start_ns + timeout_ns;
	int result = look(waiter, port);

	if (result == NOTHING && spin_ns > 0)
		result = spin(waiter, port, start_ns, timeout_ns >= 0 && timeout_ns < spin_ns ? timeout_ns : spin_ns);
	if (result == NOTHING && timeout_ns == 0)
		result = PV_WAIT_TIMEOUT;
	while (result == NOTHING) {
		result = doze(waiter, port, deadline_ns);
		if (result == NOTHING || result == PV_WAIT_INTERRUPTED) {
			int after = look(waiter, port);

			result = after == NOTHING ? result : after;
		}
	}
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
	result = wait_for(waiter, port, spin_ns, timeout_ns);
	pv_store_release(&waiter->waiting, 0);
	return result;
}

/* Port. */

void pv_port_init(struct pv_port *port, struct pv_waiter *waiter, struct pv_inbox *rx, uint32_t rx_slot)
{
	*port = (struct pv_port){.waiter = waiter, .rx = rx, .rx_slot = rx_slot, .tx_bell = -1, .home = pv_home_mark()};
	port->generation = waiter ? waiter->generation : &port->generation_seen;
	port->generation_seen = pv_load_acquire(port->generation);
}

/* Held for a few stores and at most one write that does not block; a holder can only be slow by losing its CPU. */
static void enter(struct pv_port *port)
{
	while (pv_exchange(&port->busy, 1))
		sched_yield();
}

static void leave(struct pv_port *port)
{
	pv_store_release(&port->busy, 0);
}

void pv_port_set_peer(struct pv_port *port, struct pv_inbox *tx, uint32_t tx_slot, int bell_fd, uint32_t generation)
{
	enter(port);
	port->tx = tx;
	port->tx_slot = tx_slot;
	port->tx_bell = bell_fd;
	port->tx_bell_is_pipe = is_pipe(bell_fd);
	pv_store_relaxed(&port->generation_seen, generation);
	leave(port);
}

void pv_port_close(struct pv_port *port)
{
	enter(port);
	pv_store_relaxed(&port->closed, 1);
	port->waiter = NULL;
	port->rx = port->tx = NULL;
	port->tx_bell = -1;
	port->generation = &port->generation_seen;
	leave(port);
}

/* Set the bit; 1 when its receiver sleeps and has to be woken for it. */
static int set_pending(struct pv_inbox *inbox, uint32_t slot, uint64_t *merged)
{
	uint32_t word = word_of(slot);
	uint64_t bit = bit_of(slot);

	if (pv_fetch_or(&inbox->pending[word], bit) & bit) {
		(*merged)++;
		return 0;
	}
	if (pv_load_ordered(&inbox->masked[word]) & bit)
		return 0;
	pv_fetch_or(&inbox->selector, (uint64_t)1 << word);
	return pv_load_ordered(&inbox->asleep) != 0;
}

static int is_stale(const struct pv_port *port)
{
	return pv_load_acquire(port->generation) != pv_load_relaxed(&port->generation_seen);
}

static int send(struct pv_port *port)
{
	if (!port->tx) {
		port->dropped++;
		return PV_NOTIFY_UNBOUND;
	}
	port->sent++;
	if (!set_pending(port->tx, port->tx_slot, &port->merged) || port->tx_bell < 0)
		return PV_NOTIFY_SUPPRESSED;
	/* A dead receiver (EPIPE) hears nothing: dropped, the broker tells us by a new generation. */
	if (port->tx_bell_is_pipe)
		write_pipe_bell(port->tx_bell);
	else
		write_bell(port->tx_bell);
	port->rang++;
	return PV_NOTIFY_RANG;
}

int pv_notify(struct pv_port *port)
{
	int result;

	if (!pv_home_is_here(port->home))
		return -ECHILD;
	enter(port);
	result = is_stale(port) ? PV_NOTIFY_STALE : send(port);
	leave(port);
	return result;
}

int pv_notify_learnt(struct pv_port *port)
{
	int result;

	if (!pv_home_is_here(port->home))
		return -ECHILD;
	enter(port);
	result = send(port);
	leave(port);
	return result;
}

void pv_port_set_pending(struct pv_port *port)
{
	uint64_t merged = 0;

	if (port->rx && set_pending(port->rx, port->rx_slot, &merged) && port->waiter)
		nudge(port->waiter);
}

int pv_port_take_pending(struct pv_port *port)
{
	uint32_t word = word_of(port->rx_slot);
	uint64_t bit = bit_of(port->rx_slot);

	/* The plain look first: an awake end polls here, and a read leaves the line shared. */
	if (!port->rx || !(pv_load_relaxed(&port->rx->pending[word]) & bit))
		return 0;
	if (!(pv_fetch_and(&port->rx->pending[word], ~bit) & bit))
		return 0;
	port->received++;
	return 1;
}

void pv_port_mask(struct pv_port *port)
{
	if (port->rx)
		pv_fetch_or(&port->rx->masked[word_of(port->rx_slot)], bit_of(port->rx_slot));
}

int pv_port_unmask(struct pv_port *port)
{
	uint32_t word = word_of(port->rx_slot);

	if (!port->rx)
		return 0;
	pv_fetch_and(&port->rx->masked[word], ~bit_of(port->rx_slot));
	if (!(pv_load_ordered(&port->rx->pending[word]) & bit_of(port->rx_slot)))
		return 0;
	pv_fetch_or(&port->rx->selector, (uint64_t)1 << word);
	if (port->waiter && pv_load_ordered(&port->rx->asleep))
		nudge(port->waiter);
	return 1;
}
