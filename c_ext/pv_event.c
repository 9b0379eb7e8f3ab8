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
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pv_atomic.h"
#include "pv_event.h"
#include "pv_home.h"

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

int pv_inbox_has_event(struct pv_inbox *inbox)
{
	uint64_t selected = pv_load_ordered(&inbox->selector);

	for (; selected; selected &= selected - 1)
		if (deliverable(inbox, (uint32_t)__builtin_ctzll(selected)))
			return 1;
	return 0;
}

int pv_inbox_slot_has_event(struct pv_inbox *inbox, uint32_t slot)
{
	return (deliverable(inbox, word_of(slot)) & bit_of(slot)) != 0;
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

/* Port. */

static struct pv_doorbell *doorbell_of(const struct pv_waiter *waiter, const struct pv_inbox *inbox)
{
	for (uint32_t i = 0; waiter && i < waiter->n_doorbells; i++)
		if (waiter->doorbells[i]->inbox == inbox)
			return waiter->doorbells[i];
	return NULL;
}

/* Something came through the doorbell's inbox. Not one step: that it changes is what counts. */
static void note_taken(struct pv_port *port)
{
	struct pv_doorbell *doorbell = port->doorbell;

	if (doorbell)
		pv_store_relaxed(&doorbell->taken, pv_load_relaxed(&doorbell->taken) + 1);
}

void pv_port_init(struct pv_port *port, struct pv_waiter *waiter, struct pv_inbox *rx, uint32_t rx_slot)
{
	*port = (struct pv_port){.waiter = waiter, .rx = rx, .rx_slot = rx_slot, .tx_bell = -1, .home = pv_home_mark()};
	port->generation = waiter ? waiter->generation : &port->generation_seen;
	port->generation_seen = pv_load_acquire(port->generation);
	port->doorbell = rx ? doorbell_of(waiter, rx) : NULL;
	if (port->doorbell)
		pv_count(&port->doorbell->n_ports);
	note_taken(port);
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
	struct pv_waiter *waiter = port->waiter;

	enter(port);
	pv_store_relaxed(&port->closed, 1);
	if (port->doorbell)
		pv_add(&port->doorbell->n_ports, -1u);
	port->doorbell = NULL;
	port->waiter = NULL;
	port->rx = port->tx = NULL;
	port->tx_bell = -1;
	port->generation = &port->generation_seen;
	leave(port);
	/* After `closed`: an EOI that another thread is about to delay is found here, or finds that. */
	if (waiter)
		pv_waiter_forget_eoi(waiter, port);
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
		pv_waiter_nudge(port->waiter);
}

/* Masks. The shared bit is set as long as there is a reason; both change under `busy`. */

static void mask_for(struct pv_port *port, uint32_t reason)
{
	port->masked_for |= reason;
	pv_fetch_or(&port->rx->masked[word_of(port->rx_slot)], bit_of(port->rx_slot));
}

/* 1: unmasked, and an event is pending, for which the waiter was woken. */
static int unmask_for(struct pv_port *port, uint32_t reason)
{
	uint32_t word = word_of(port->rx_slot);

	port->masked_for &= ~reason;
	if (port->masked_for)
		return 0;
	pv_fetch_and(&port->rx->masked[word], ~bit_of(port->rx_slot));
	if (!(pv_load_ordered(&port->rx->pending[word]) & bit_of(port->rx_slot)))
		return 0;
	pv_fetch_or(&port->rx->selector, (uint64_t)1 << word);
	if (port->waiter && pv_load_ordered(&port->rx->asleep))
		pv_waiter_nudge(port->waiter);
	return 1;
}

void pv_port_mask(struct pv_port *port)
{
	enter(port);
	if (port->rx)
		mask_for(port, PV_MASK_EXPLICIT);
	leave(port);
}

int pv_port_unmask(struct pv_port *port)
{
	int pending;

	enter(port);
	pending = port->rx && unmask_for(port, PV_MASK_EXPLICIT);
	leave(port);
	return pending;
}

/* Late EOI. */

static void count_for_storm(struct pv_waiter *waiter)
{
	uint32_t events = pv_load_relaxed(&waiter->storm_events) + 1;

	pv_store_relaxed(&waiter->storm_events, events);
	if (events == 1)
		pv_store_relaxed(&waiter->storm_since_ns, pv_now_ns());
	else if (events % PV_STORM_EVENTS == 0)
		pv_store_relaxed(&waiter->storming,
				 pv_now_ns() - pv_load_relaxed(&waiter->storm_since_ns) > PV_STORM_JIFFIES * PV_JIFFY_NS);
}

/* Under `busy`. */
static void begin(struct pv_port *port)
{
	mask_for(port, PV_MASK_EOI);
	if (port->waiter)
		count_for_storm(port->waiter);
}

/* Masked before the bit is cleared: an event that comes in between waits for the EOI, too. */
static int take_late(struct pv_port *port)
{
	uint64_t bit = bit_of(port->rx_slot);
	int taken = 0;

	enter(port);
	if (!(port->masked_for & PV_MASK_EOI)) {
		begin(port);
		taken = (pv_fetch_and(&port->rx->pending[word_of(port->rx_slot)], ~bit) & bit) != 0;
		if (!taken)
			unmask_for(port, PV_MASK_EOI);
		port->received += (uint64_t)taken;
		if (taken)
			note_taken(port);
	}
	leave(port);
	return taken;
}

int pv_port_take_pending(struct pv_port *port)
{
	uint32_t word = word_of(port->rx_slot);
	uint64_t bit = bit_of(port->rx_slot);

	/* The plain look first: an awake end polls here, and a read leaves the line shared. */
	if (!port->rx || !(pv_load_relaxed(&port->rx->pending[word]) & bit))
		return 0;
	if (pv_load_relaxed(&port->late_eoi))
		return take_late(port);
	if (!(pv_fetch_and(&port->rx->pending[word], ~bit) & bit))
		return 0;
	port->received++;
	note_taken(port);
	return 1;
}

void pv_port_discard(struct pv_port *port)
{
	if (port->rx)
		pv_fetch_and(&port->rx->pending[word_of(port->rx_slot)], ~bit_of(port->rx_slot));
}

void pv_port_delivered(struct pv_port *port)
{
	port->received++;
	note_taken(port);
	if (!pv_load_relaxed(&port->late_eoi))
		return;
	enter(port);
	if (port->rx)
		begin(port);
	leave(port);
}

void pv_port_late_eoi(struct pv_port *port, uint32_t spurious_threshold)
{
	enter(port);
	port->spurious_threshold = spurious_threshold;
	pv_store_relaxed(&port->late_eoi, 1);
	leave(port);
}

/* Under `busy`. Jiffies to delay the EOI by; *eoi_class: the same for the same delay. */
static uint32_t back_off(struct pv_port *port, int spurious, uint32_t *eoi_class)
{
	uint32_t jiffies = 0, step;

	*eoi_class = 0;
	if (!spurious) {
		port->spurious_row = 0;
		if (port->waiter)
			pv_waiter_end_storm(port->waiter);
		return 0;
	}
	port->spurious++;
	if ((1u << port->spurious_row) < 4 * PV_JIFFIES_PER_S)
		port->spurious_row++;
	if (port->spurious_row > port->spurious_threshold) {
		step = port->spurious_row - 1 - port->spurious_threshold;
		*eoi_class = step + 1;
		jiffies = 1u << step;
		if (jiffies > PV_JIFFIES_PER_S)
			jiffies = PV_JIFFIES_PER_S;
	}
	if (port->waiter && pv_load_relaxed(&port->waiter->storming) && jiffies < PV_STORM_DELAY_JIFFIES) {
		*eoi_class = 0;
		jiffies = PV_STORM_DELAY_JIFFIES;
	}
	return jiffies;
}

void pv_port_end_eoi(struct pv_port *port)
{
	enter(port);
	port->eoi_at_ns = 0;
	if (port->rx)
		unmask_for(port, PV_MASK_EOI);
	leave(port);
}

int64_t pv_port_eoi(struct pv_port *port, int spurious)
{
	struct pv_waiter *waiter;
	int64_t delay_ns;
	uint32_t eoi_class;
	int result;

	if (!pv_home_is_here(port->home))
		return -ECHILD;
	enter(port);
	waiter = port->waiter;
	if (!port->rx || !(port->masked_for & PV_MASK_EOI) || port->eoi_at_ns) {
		leave(port);
		return -EINVAL;
	}
	delay_ns = (int64_t)back_off(port, spurious, &eoi_class) * PV_JIFFY_NS;
	port->eoi_at_ns = delay_ns ? pv_now_ns() + delay_ns : 0;
	port->eoi_delayed_ns += (uint64_t)delay_ns;
	leave(port);
	result = delay_ns && waiter ? pv_waiter_delay_eoi(waiter, port, eoi_class) : 0;
	if (!delay_ns || !waiter || result)
		pv_port_end_eoi(port);
	return result ? result : delay_ns;
}
