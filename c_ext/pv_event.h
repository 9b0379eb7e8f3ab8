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

/* Written by the broker alone, mapped read-only by one connection: a word for each of its waiters, which changes whenever
 * the binding of one of that waiter's ports changes. */
struct pv_bindings {
	uint32_t magic;
	uint32_t version;
	uint32_t pad[14];
	uint32_t generation[PV_BINDINGS_WAITERS];
};

/* Private: one local end of a channel. */
struct pv_port {
	struct pv_inbox *rx;            /* our waiter's inbox for the peer's domain; NULL for none */
	struct pv_inbox *tx;            /* the peer waiter's inbox for our domain; NULL while unbound */
	const uint32_t *generation;     /* our waiter's word in pv_bindings */
	uint32_t generation_seen;       /* value under which tx was learnt from the broker */
	uint32_t rx_slot;
	uint32_t tx_slot;
	int32_t tx_bell;                /* doorbell of the peer's waiter, -1 for none */
	uint64_t sent;                  /* pv_notify calls that set the bit */
	uint64_t rang;                  /* of these: doorbell written (a system call) */
	uint64_t merged;                /* bit was set already */
	uint64_t dropped;               /* unbound */
	uint64_t received;              /* pending bits consumed */
};

/* Private: what one thread (or event loop) sleeps on. */
struct pv_waiter {
	struct pv_inbox **inboxes;
	uint32_t n_inboxes;
	int32_t epoll_fd;               /* holds kick_fd and the doorbells of all inboxes */
	int32_t kick_fd;                /* eventfd of this process: pv_waiter_kick */
	int32_t always_armed;           /* 1: `asleep` stays set, for use of epoll_fd in a foreign loop */
	const uint32_t *generation;
	uint64_t sleeps;                /* system calls that really waited */
	uint64_t wakeups;               /* of these: ended by a doorbell or kick, not by time */
};

#define PV_NOTIFY_SUPPRESSED 0  /* delivered, no system call was needed (receiver awake, masked or bit already set) */
#define PV_NOTIFY_RANG 1        /* delivered, doorbell written */
#define PV_NOTIFY_STALE 2       /* not delivered: the binding changed; ask the broker, update the port, notify again */
#define PV_NOTIFY_UNBOUND 3     /* no peer: dropped silently, as Xen does */

#define PV_WAIT_TIMEOUT 0
#define PV_WAIT_EVENT 1
#define PV_WAIT_KICKED 2        /* pv_waiter_kick was called since the last wait; the kick is consumed */
#define PV_WAIT_STALE 3         /* a binding changed (bind, close, peer's death): ask the broker */
#define PV_WAIT_INTERRUPTED 4   /* a signal arrived: let Python run its handlers, then wait again */

void pv_inbox_init(struct pv_inbox *inbox);
/* 0, or -EPROTO when magic or version are not ours. */
int pv_inbox_check(const struct pv_inbox *inbox);

/* Send. Never blocks (a doorbell that would block is one that is rung already). */
int pv_notify(struct pv_port *port);
/* Set our own pending bit without ringing: a bind sets the local port pending. */
void pv_port_set_pending(struct pv_port *port);
/* Take the pending bit: 1 if it was set (now clear), else 0. Clear first, then look at the ring. */
int pv_port_take_pending(struct pv_port *port);
void pv_port_mask(struct pv_port *port);
/* Unmask; 1 if the event is pending. */
int pv_port_unmask(struct pv_port *port);

/* All pending, unmasked slots of one inbox, cleared and written to slots[0..max-1]; how many. */
uint32_t pv_inbox_take(struct pv_inbox *inbox, uint32_t *slots, uint32_t max);

/*
 * Wait until `port` is pending (its bit is taken), the waiter is kicked, or a binding changes. Spins for spin_ns first
 * (0: not at all), then arms and sleeps. timeout_ns < 0: no limit. `port` NULL: any pending unmasked slot ends the wait
 * and nothing is taken. Returns PV_WAIT_*, or -errno.
 * Threads: one thread waits on a waiter at a time; kick and notify may come from any.
 */
int pv_wait(struct pv_waiter *waiter, struct pv_port *port, int64_t spin_ns, int64_t timeout_ns);
void pv_waiter_kick(struct pv_waiter *waiter);
/* CLOCK_MONOTONIC in ns. */
int64_t pv_now_ns(void);

#endif
