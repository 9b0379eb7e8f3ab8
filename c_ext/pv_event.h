/* SPDX-License-Identifier: MIT */
/*
 * Event channels: the delivery half (who is bound to whom is the broker's business).
 *
 * An *inbox* is one page shared by one receiving waiter and one sending domain. It holds the pending and mask bits of the
 * channels between the two and the word that says whether the receiver sleeps. Beside it stands a *doorbell*: one
 * descriptor (eventfd inside one trust domain, pipe across isolation) that wakes the receiver. A port owns one slot (bit)
 * in its receiver's inbox.
 *
 * Everything in an inbox can be written by both sides at any time. A receiver's worst case from a hostile sender is a
 * spurious or missing event of channels of that one domain; nothing here is an index or a length.
 *
 * Source: Xen public/event_channel.h for the semantics of pending, mask and selector.
 */
#ifndef PV_EVENT_H
#define PV_EVENT_H

#include <stdint.h>

#include "pv_spin.h"

#define PV_SHARED_VERSION 1
#define PV_INBOX_MAGIC 0x58425650      /* "PVBX" */
#define PV_INBOX_SLOTS 4096
#define PV_BINDINGS_MAGIC 0x44425650   /* "PVBD" */
#define PV_BINDINGS_WAITERS 1000
#define PV_PAGE_BYTES 4096

/* Shared page: one receiving waiter, one sending domain. */
struct pv_inbox {
	uint32_t magic;
	uint32_t version;
	uint32_t pad0[14];
	uint32_t asleep;       /* the receiver: 1 between arming and waking; senders ring only then */
	uint32_t pad1[15];
	uint64_t selector;     /* bit w: pending[w] may be non-zero. Senders set, the receiver clears */
	uint64_t pad2[7];
	uint64_t pending[64];  /* senders set, the receiver clears */
	uint64_t masked[64];   /* the receiver alone */
	uint64_t pad3[360];
};

/* Written by the broker alone (release; then it rings), mapped read-only by one connection: a word for each of its waiters, which changes whenever
 * the binding of one of that waiter's ports changes. */
struct pv_bindings {
	uint32_t magic;
	uint32_t version;
	uint32_t pad[14];
	uint32_t generation[PV_BINDINGS_WAITERS];
};

/*
 * Late end of interrupt ("late EOI"), the numbers of Linux' drivers/xen/events: a port in this mode is masked from the
 * moment its event is taken until pv_port_eoi. An event without work is spurious; the (threshold + n)th of a row is
 * unmasked 2^(n - 1) jiffies late, at most a second. So a peer that only sends events costs a wake-up a second.
 */
#define PV_JIFFY_NS 4000000            /* 250 a second, as Debian's kernels */
#define PV_JIFFIES_PER_S 250
#define PV_SPURIOUS_THRESHOLD 1
#define PV_STORM_EVENTS 256            /* a waiter looks at the clock once in so many events without work or sleep ... */
#define PV_STORM_JIFFIES 2             /* ... and when they took longer than this, every further EOI without work ... */
#define PV_STORM_DELAY_JIFFIES 10      /* ... is so late at least */
#define PV_EOI_CLASSES 16

#define PV_MASK_EXPLICIT 1             /* why a port is masked; it is unmasked when no reason is left */
#define PV_MASK_EOI 4

/*
 * A doorbell that rings without an event that could be taken: so often in a row, and once for each port, it is heard;
 * then later and later, as with late EOI.
 */
#define PV_BELL_THRESHOLD 16

struct pv_port;

/* Ports whose EOI is late by one and the same delay, so the oldest is the first that is due. */
struct pv_delayed {
	struct pv_port *first;
	struct pv_port *last;
};

/* Private to a waiter: what it knows of one sending domain. */
struct pv_doorbell {
	struct pv_inbox *inbox;
	int32_t fd;
	uint32_t n_ports;               /* that receive through this inbox */
	uint32_t taken;                 /* changes with every event that is taken, and with every new port */
	uint32_t taken_before;          /* at the last ring */
	uint32_t generation_before;     /* at the last ring */
	uint32_t idle_row;              /* rings in a row between which none of these changed */
	int64_t unheard_until_ns;       /* 0: it is listened to */
};

/*
 * Private: what one thread (or event loop) sleeps on.
 *
 * Threads: one thread waits, adds and removes inboxes; kick, notify, mask and unmask may come from any. Fork: a child's
 * calls get -ECHILD. `generation` and the inboxes must stay mapped as long as the waiter knows them.
 */
struct pv_waiter {
	struct pv_doorbell **doorbells;
	uint32_t n_doorbells;
	uint32_t home;                  /* pv_home_mark */
	int32_t epoll_fd;               /* holds kick_fd and the doorbells of all inboxes */
	int32_t kick_fd;                /* eventfd of this process */
	uint32_t kicked;                /* 1: a kick that no wait has returned yet */
	uint32_t waiting;               /* 1: a thread is in pv_wait */
	uint32_t hung_up;               /* 1: a doorbell lost its last writer and no wait has returned that yet */
	int32_t always_armed;           /* 1: `asleep` stays set, for use of epoll_fd in a foreign loop */
	uint32_t generation_seen;       /* the change that a wait has returned last */
	const uint32_t *generation;
	uint32_t fixed_generation;      /* what `generation` points to without a broker */
	uint64_t sleeps;                /* system calls that really waited */
	uint64_t wakeups;               /* of these: ended by a doorbell or kick, not by time */
	struct pv_spin spin;            /* what waits of any of its ports have taught */
	uint64_t unheard;               /* times a doorbell was left unheard for a while */
	int64_t hear_at_ns;             /* when the first of these is listened to again; 0: all are heard */
	int32_t timer_fd;               /* in epoll_fd: something that was left for later is due; -1 before there was any */
	uint32_t eoi_lock;              /* 1: somebody is at `delayed`, `hear_at_ns` or the timer */
	struct pv_delayed delayed[PV_EOI_CLASSES];
	int64_t eoi_due_ns;             /* of the first of all delayed; 0: none */
	int64_t storm_since_ns;         /* time of the first of `storm_events` */
	uint32_t storm_events;          /* late-EOI events since this waiter slept or one of them had work */
	uint32_t storming;              /* 1: these took too long */
};

/*
 * Private: one local end of a channel. Zeroed memory is an end with neither inbox nor peer.
 *
 * Threads: every call from any thread; senders and pv_port_set_peer take turns.
 */
struct pv_port {
	struct pv_waiter *waiter;       /* whose thread receives; NULL for an end that only sends */
	struct pv_inbox *rx;            /* our waiter's inbox for the peer's domain; NULL for none */
	struct pv_doorbell *doorbell;   /* the same one's; NULL if the waiter does not know the inbox */
	struct pv_inbox *tx;            /* the peer waiter's inbox for our domain; NULL while unbound */
	const uint32_t *generation;     /* our waiter's word in pv_bindings */
	uint32_t generation_seen;       /* value under which tx was learnt from the broker */
	uint32_t home;                  /* pv_home_mark */
	uint32_t busy;                  /* 1: a sender or pv_port_set_peer is inside */
	uint32_t closed;                /* 1: sends are dropped, waits fail */
	uint32_t rx_slot;
	uint32_t tx_slot;
	int32_t tx_bell;                /* doorbell of the peer's waiter, -1 for none */
	int32_t tx_bell_is_pipe;        /* writing to it can raise SIGPIPE */
	uint64_t sent;                  /* notifies that had a peer */
	uint64_t rang;                  /* of these: doorbell written (a system call) */
	uint64_t merged;                /* of these: bit was set already */
	uint64_t dropped;               /* unbound */
	uint64_t received;              /* pending bits consumed */
	uint32_t masked_for;            /* PV_MASK_*, under `busy` */
	uint32_t late_eoi;              /* 1: masked from delivery to pv_port_eoi */
	uint32_t spurious_threshold;    /* spurious events of a row that cost nothing */
	uint32_t spurious_row;          /* spurious events since the last one with work, as far as they make a difference */
	uint64_t spurious;              /* spurious events */
	uint64_t eoi_delayed_ns;        /* sum of all delays */
	int64_t eoi_at_ns;              /* when the delayed EOI is due; 0: none is */
	uint32_t eoi_class;             /* in which list of the waiter it stands */
	struct pv_port *eoi_next;
	struct pv_port *eoi_before;
};

#define PV_NOTIFY_SUPPRESSED 0  /* delivered, no system call was needed (receiver awake, masked or bit already set) */
#define PV_NOTIFY_RANG 1        /* delivered, doorbell written */
#define PV_NOTIFY_STALE 2       /* not delivered: the binding changed; ask the broker, update the port, notify again */
#define PV_NOTIFY_UNBOUND 3     /* no peer: dropped silently, as Xen does */

#define PV_WAIT_TIMEOUT 0
#define PV_WAIT_EVENT 1
#define PV_WAIT_KICKED 2        /* pv_waiter_kick was called since the last wait; the kick is consumed */
#define PV_WAIT_STALE 3         /* a binding changed (bind, close, peer's death): ask the broker. Once a change */
#define PV_WAIT_INTERRUPTED 4   /* a signal arrived, or the spin was long: let Python run signal handlers, wait again */

#define PV_SPIN_SLICE_NS 50000000   /* no call spins longer: signal handlers must get their turn */

void pv_inbox_init(struct pv_inbox *inbox);
/* 0, or -EPROTO when magic or version are not ours. */
int pv_inbox_check(const struct pv_inbox *inbox);
/* Whether an event can be delivered: pending and not masked. In any slot (that the selector names), or in one. */
int pv_inbox_has_event(struct pv_inbox *inbox);
int pv_inbox_slot_has_event(struct pv_inbox *inbox, uint32_t slot);
/*
 * All pending, unmasked slots of one inbox, cleared and written to slots[0..max-1]; how many. What does not fit stays
 * pending.
 */
uint32_t pv_inbox_take(struct pv_inbox *inbox, uint32_t *slots, uint32_t max);

/*
 * Write a doorbell without ever blocking or dying of SIGPIPE: 0, also when it was rung already; -EPIPE nobody can hear it
 * any more; another -errno. For the broker, which rings without looking at `asleep`.
 */
int pv_bell_ring(int fd);

/* `generation` NULL: without a broker. 0 or -errno. */
int pv_waiter_init(struct pv_waiter *waiter, const uint32_t *generation);
/* Closes what init opened; the inboxes and their bells are the caller's. */
void pv_waiter_destroy(struct pv_waiter *waiter);
/* bell_fd: the end to read from; it is made nonblocking. 0; -EPROTO not an inbox; -EBUSY a thread waits; -errno. */
int pv_waiter_add(struct pv_waiter *waiter, struct pv_inbox *inbox, int bell_fd);
int pv_waiter_remove(struct pv_waiter *waiter, struct pv_inbox *inbox, int bell_fd);
/*
 * From now on senders always ring, so epoll_fd can stand in a foreign poll loop: when it is readable, drain, then take
 * the pending slots. What is pending already makes it readable at once. 0 or -errno.
 */
int pv_waiter_arm_always(struct pv_waiter *waiter);
/* Silence all doorbells; the PV_WAIT_KICKED or PV_WAIT_STALE that was told by them, else PV_WAIT_EVENT. Never blocks. */
int pv_waiter_drain(struct pv_waiter *waiter);
/* What ends a wait whatever it waits for: PV_WAIT_KICKED or PV_WAIT_STALE, told once, or PV_WAIT_TIMEOUT: neither. */
int pv_waiter_look(struct pv_waiter *waiter);
/* Unmask what is due. Every wait and drain does that; for whoever polls without them. */
void pv_waiter_run_eois(struct pv_waiter *waiter);
/* For pv_event.c: have the EOI ended at port->eoi_at_ns; all of one class have one delay. 0 or -errno. */
int pv_waiter_delay_eoi(struct pv_waiter *waiter, struct pv_port *port, uint32_t eoi_class);
/* For pv_event.c: there was work, or sleep. */
void pv_waiter_end_storm(struct pv_waiter *waiter);
/* For pv_wait.c: this descriptor was rung; if that was for nothing too often it is not listened to for a while. */
void pv_waiter_heard(struct pv_waiter *waiter, int fd);
/* For pv_wait.c: listen again to what was left unheard for long enough. */
void pv_waiter_hear_again(struct pv_waiter *waiter);
/* For pv_event.c: the port is closed, its delayed EOI will not be. */
void pv_waiter_forget_eoi(struct pv_waiter *waiter, struct pv_port *port);
/* The end of an EOI that was delayed. For pv_wait.c. */
void pv_port_end_eoi(struct pv_port *port);
/*
 * For who sleeps on epoll_fd himself, and on other descriptors: have senders ring, look again. PV_WAIT_TIMEOUT: sleep until
 * it is readable, then drain. In any case disarm afterwards. By the thread that waits.
 */
int pv_waiter_arm(struct pv_waiter *waiter, struct pv_port *port);
void pv_waiter_disarm(struct pv_waiter *waiter, struct pv_port *port);
/* Wake whoever sleeps on epoll_fd, for another look at everything. */
void pv_waiter_nudge(struct pv_waiter *waiter);
/* End the wait that runs now, or the next one, with PV_WAIT_KICKED. */
void pv_waiter_kick(struct pv_waiter *waiter);

void pv_port_init(struct pv_port *port, struct pv_waiter *waiter, struct pv_inbox *rx, uint32_t rx_slot);
/*
 * Where to send from now on, as the broker said under `generation`; tx NULL: unbound. When this returns no sender uses
 * the former inbox and bell any more: the caller may unmap and close them.
 */
void pv_port_set_peer(struct pv_port *port, struct pv_inbox *tx, uint32_t tx_slot, int bell_fd, uint32_t generation);
/* The end of it: forgets waiter, inboxes and bell. The struct stays good for late senders, who are told "unbound". */
void pv_port_close(struct pv_port *port);
/* Send: PV_NOTIFY_*, or -ECHILD. Never blocks (a doorbell that would block is one that is rung already). */
int pv_notify(struct pv_port *port);
/*
 * The same for a sender that has just asked the broker: by the binding it learnt, also if the word has moved on since.
 * Whoever is bound after that answer finds his end pending without it, so nothing is lost; and a domain that binds and
 * closes for ever, which moves the word for all ports of this waiter, can keep nobody from sending.
 */
int pv_notify_learnt(struct pv_port *port);
/* Set our own pending bit: a bind sets the local port pending. */
void pv_port_set_pending(struct pv_port *port);
/*
 * Take the pending bit, masked or not: 1 if it was set (now clear), else 0. Clear first, then look at the ring. Late EOI:
 * nothing is taken before pv_port_eoi has ended the last one, and this one masks.
 */
int pv_port_take_pending(struct pv_port *port);
/* Forget the event, taken or not: for a slot that is given up. */
void pv_port_discard(struct pv_port *port);
/* An event of this port was taken through pv_inbox_take: counted, and masked in late-EOI mode. */
void pv_port_delivered(struct pv_port *port);
void pv_port_mask(struct pv_port *port);
/* Unmask; 1 if the event is pending and no other reason masks, and then the waiter wakes. */
int pv_port_unmask(struct pv_port *port);
/* From now on: late EOI. `spurious_threshold`: PV_SPURIOUS_THRESHOLD, or more for a peer that is often too early. */
void pv_port_late_eoi(struct pv_port *port, uint32_t spurious_threshold);
/*
 * The end of the event that was taken last; `spurious`: there was no work. Returns by how many ns the unmask is delayed,
 * -EINVAL when no event has to be ended, -ECHILD, or the -errno of a timer that could not be made (unmasked at once then).
 */
int64_t pv_port_eoi(struct pv_port *port, int spurious);

/*
 * Wait until `port` is pending and not masked (its bit is taken), the waiter is kicked, or a binding changes. Spins for
 * spin_ns first (0: not at all; negative: as long as was learnt; more than PV_SPIN_SLICE_NS: that long, then PV_WAIT_INTERRUPTED), then arms and sleeps. timeout_ns < 0: no limit; a sleep ends up to 1 ms late. `port`
 * NULL: any pending unmasked slot ends the wait and nothing is taken. Returns PV_WAIT_*, -EBUSY when another thread waits
 * here, -EBADF when the port is closed, or another -errno.
 */
int pv_wait(struct pv_waiter *waiter, struct pv_port *port, int64_t spin_ns, int64_t timeout_ns);
/* CLOCK_MONOTONIC in ns. */
int64_t pv_now_ns(void);

#endif
