/* SPDX-License-Identifier: MIT */
/*
 * A frontend's end of a connection, from a connected broker socket: a waiter, an arena, and one ring and port at a time.
 *
 * What frontend/ring_end.py is in Python, for frontends in C: they ask the broker themselves, so ports and memory belong to
 * their own connection and end with their process. The keys of xenstore are somebody else's business.
 *
 * Threads: open, make, drop and close from one at a time, while nobody uses the ring; pv_front_learn from any.
 * Fork: a child must not use it.
 */
#ifndef PV_FRONT_H
#define PV_FRONT_H

#include <stdint.h>

#include "pv_grant.h"
#include "pv_ring.h"

#define PV_FRONT_MAX_RING_ORDER 4
#define PV_FRONT_MAX_REFS 16

struct pv_front;

/* What pv_front_make is asked for. */
struct pv_front_wish {
	uint32_t backend;        /* domid */
	uint32_t ring_order;     /* the ring has 2^ring_order pages */
	uint32_t data_pages;     /* of the arena beside its rings */
	uint32_t request_bytes;
	uint32_t response_bytes;
	int64_t max_spin_ns;     /* of a wait of the learnt length; 0: never */
};

/* What the backend has to be told. */
struct pv_front_keys {
	uint32_t port;
	uint32_t n_refs;
	uint32_t refs[16];       /* of the pages of the ring, in order */
};

/*
 * Greet the broker. The socket is the front's from then on, also when it fails: NULL with *error a negative errno (-EPIPE:
 * the broker is gone; -EPROTO: it is another version).
 */
struct pv_front *pv_front_open(int broker_fd, int *error);
/*
 * A new ring and port; the first call makes the arena and decides its size and that of the ring. 0; -EINVAL for another
 * size; -EBUSY while a ring is there, or while a backend that is gone still holds pages of both places a ring can have
 * (try again); -EPIPE the broker is gone; or the negative errno of a refusal.
 */
int pv_front_make(struct pv_front *front, const struct pv_front_wish *wish, struct pv_front_keys *keys);
/* Let go of ring and port; harmless when there is none. Nobody may use them. */
void pv_front_drop(struct pv_front *front);
/* Give everything back. */
void pv_front_close(struct pv_front *front);

/* The present ring, or NULL; it stays at its place from one make to the next. */
struct pv_ring *pv_front_ring(struct pv_front *front);
/* After the first make. The pages begin with the data. */
struct pv_granter *pv_front_granter(struct pv_front *front);
uint8_t *pv_front_data(struct pv_front *front);
/* End the wait on the ring that runs now, or the next one, with PV_WAIT_KICKED. */
void pv_front_kick(struct pv_front *front);
/*
 * Ask the broker where to send, because a binding has changed (PV_RING_STALE, PV_WAIT_STALE). `notify`: send by what it
 * said. Without a broker the last binding stands.
 */
void pv_front_learn(struct pv_front *front, int notify);

#endif
