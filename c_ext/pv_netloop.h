/* SPDX-License-Identifier: MIT */
/*
 * A thread that moves frames: between queues of network devices, TAP interfaces and ports of programs, by a switch or from
 * one to the other as through a wire.
 *
 * What it moves between are its *legs*. A leg that is idle costs nothing: it waits in the loop's epoll. One with work is
 * looked at in turn, a burst at a time.
 *
 * Threads: one runs (pv_netloop_run); calls that change something enter first, from any other thread: the loop stands
 * still meanwhile.
 */
#ifndef PV_NETLOOP_H
#define PV_NETLOOP_H

#include <stdint.h>

#include "pv_netback.h"
#include "pv_netctrl.h"
#include "pv_netfront.h"
#include "pv_switch.h"

#define PV_NETLOOP_BURST 64
#define PV_NETLEG_BACK 1           /* a queue of a guest's device */
#define PV_NETLEG_FRONT 2          /* the guest's own end of one */
#define PV_NETLEG_TAP 3            /* an interface of the kernel */
#define PV_NETLEG_USER 4           /* a program of this process */
#define PV_NETLEG_NULL 5           /* takes everything, gives nothing */
#define PV_NETLEG_CTRL 6           /* no way for frames but the control ring of a guest's device */

#define PV_NETLEG_RUNNING 0
#define PV_NETLEG_PEER 1           /* the other end broke the protocol */
#define PV_NETLEG_FAILED 2         /* `error` says what failed */

#define PV_NETLOOP_HELD_BYTES 65536   /* a leg that has so much waiting at guests is held back ... */
#define PV_NETLOOP_FREED_BYTES 32768   /* ... until it is so little, */
#define PV_NETLOOP_HELD_NS 10000000    /* or for so long, unless pv_netloop_set_hold says otherwise */
#define PV_NETLEG_USER_BYTES 1048576 /* that wait in a program's port, each way */

struct pv_netloop;
struct pv_netleg_pipe;
struct pv_nettap;

struct pv_netleg_counters {
	uint64_t in_packets;       /* from the leg */
	uint64_t in_bytes;
	uint64_t out_packets;      /* to it */
	uint64_t out_bytes;
	uint64_t dropped;          /* on the way out: it takes no more */
	uint64_t wakeups;          /* times that it woke the loop */
	uint64_t bursts;
	uint64_t held;             /* times that it was held back */
};

struct pv_netleg {
	struct pv_netloop *loop;
	uint32_t kind;
	uint32_t state;            /* PV_NETLEG_* */
	int32_t error;
	uint32_t token;            /* the owner's */
	int32_t port;              /* of the switch; PV_SWITCH_NO_PORT: of a wire */
	struct pv_netleg *wire;    /* where all goes that comes; NULL: nowhere, or to the switch */
	struct pv_netleg *next_of_port; /* another queue of the same device */
	struct pv_netback *back;
	struct pv_netctrl *ctrl;
	struct pv_nethash *hash;   /* of the device of a queue; NULL: it has none */
	struct pv_netfront *front;
	struct pv_port *events[2]; /* of its rings; the second may be NULL or the same */
	int fd;                    /* of a TAP interface */
	uint32_t vnet_bytes;       /* header before each of its frames; 0: none, so no offloads */
	struct pv_netleg_counters counters;

	uint32_t active;
	uint32_t blocked;          /* what it has to give cannot go on at the moment */
	uint32_t wants_room;       /* others wait for room here */
	struct pv_backlog *backlog; /* what it has waiting at guests */
	int64_t held_ns;           /* until when it is held back at most; 0: it is not */
	uint32_t overdrawn;        /* it was for so long that it is not again before little waits */
	uint32_t had_work;         /* since its last event was taken */
	uint32_t unended[2];       /* events that were taken and not ended */
	uint32_t polled;           /* its descriptors are in the epoll */
	uint32_t timed;            /* in the list of those that something is due for */
	uint32_t told;             /* the owner was told of its state */
	uint32_t stale;            /* its peer could not be notified */
	int64_t idle_since_ns;     /* 0: it had work when it was looked at last */
	uint32_t position;         /* in the list of the active */
	uint32_t number;           /* in the list of all */

	struct pv_frame *out;      /* frames of the present burst that go out here */
	uint32_t n_out;
	struct pv_netleg_pipe *to_user;
	struct pv_netleg_pipe *from_user;
	struct pv_nettap *taps;    /* captures of what passes here */
};

/* For all kinds: 0 or -errno. `spin_ns`: how long a leg without work is looked at before it sleeps. */
int pv_netloop_new(int64_t spin_ns, uint32_t max_addresses, struct pv_netloop **made);
/* Nobody runs it, and no leg is left. */
void pv_netloop_free(struct pv_netloop *loop);
/* Move frames until pv_netloop_stop. 0 or -errno. */
int pv_netloop_run(struct pv_netloop *loop);
int pv_netloop_start(struct pv_netloop *loop);
/* The thread has ended when it returns. 0; -ECHILD. */
int pv_netloop_stop(struct pv_netloop *loop);
/* Wait for a leg whose state has changed, or that is stale: its token; -ETIME; -ECANCELED after a stop. */
int64_t pv_netloop_wait_news(struct pv_netloop *loop, int64_t timeout_ns);

/* Between these the loop stands still. */
void pv_netloop_enter(struct pv_netloop *loop);
void pv_netloop_leave(struct pv_netloop *loop);
struct pv_switch *pv_netloop_switch(struct pv_netloop *loop);
/* The kernel's number of the thread that runs it; 0: none does yet. */
int pv_netloop_thread(const struct pv_netloop *loop);
uint64_t pv_netloop_sleeps(const struct pv_netloop *loop);
/* Entered: how long a leg is held back at most, ns; 0: not at all. */
void pv_netloop_set_hold(struct pv_netloop *loop, int64_t hold_ns);
/*
 * Entered: a leg of this kind. `port`: of the switch, where legs of several queues share one; PV_SWITCH_NO_PORT: none.
 * Fields that the kind needs are set in *leg before. 0 or -errno.
 */
int pv_netloop_add(struct pv_netloop *loop, struct pv_netleg *leg, int32_t port);
/* Entered: all that comes from one goes to the other, and back; NULL: by the switch again, if it has a port. */
void pv_netloop_wire(struct pv_netleg *one, struct pv_netleg *other);
/*
 * Entered: the loop is a wire between two ports of its switch, or not: what comes from one goes to the other, nobody looks
 * at it. PV_SWITCH_NO_PORT: that end is not there yet; what comes from other ports goes nowhere.
 */
void pv_netloop_set_wire(struct pv_netloop *loop, int is_wire, int32_t one, int32_t other);
/* Entered: it is not touched any more. */
void pv_netloop_remove(struct pv_netleg *leg);
/* Entered: a leg whose state was told, or that is no longer stale; it is looked at again. */
void pv_netloop_activate(struct pv_netleg *leg);

/* A program's port, not entered. Frames to the loop: how many there was room for. Frames of it: how many; 0: none yet. */
int64_t pv_netleg_give(struct pv_netleg *leg, const uint8_t *memory, const struct pv_frame *frames, uint32_t n);
/* Wait until there is room for so many bytes of frames to the loop: 1; 0: there is none yet. */
int pv_netleg_wait_room(struct pv_netleg *leg, uint32_t n_bytes, int64_t timeout_ns);
int64_t pv_netleg_get(struct pv_netleg *leg, struct pv_burst *burst, uint32_t max, int64_t timeout_ns);

#endif
