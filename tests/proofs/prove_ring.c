/* SPDX-License-Identifier: MIT */
/* pv_ring.c against any peer: in bounds, indexes in their order, notified exactly when asked, wherever the indexes wrap. */
#include "prove.h"
#include "pv_ring.c"

#define BIG 4u                  /* entries; few, so that it is fast */
#ifndef ENTRY
#define ENTRY 8u                /* also run with 16 and 112, which have code of their own */
#endif

static uint8_t memory[PV_RING_HEADER_BYTES + BIG * ENTRY] __attribute__((aligned(64)));
static uint32_t here;

static int is_shared(const void *at)
{
	return __ESBMC_POINTER_OBJECT(at) == __ESBMC_POINTER_OBJECT(memory);
}

uint32_t pv_home_mark(void) { return here; }
const uint32_t *pv_home_word(void) { return &here; }
int pv_home_is_here(uint32_t mark) { return mark == here; }
void pv_spin_init(struct pv_spin *spin, int64_t most_ns, struct pv_spin_budget *budget) {}
int pv_notify(struct pv_port *port) { return PV_NOTIFY_RANG; }

/* Any end, in any state that it can be in. */
static struct pv_ring ring;

static void make_ring(int is_front)
{
	uint32_t known = (uint32_t)nondet_any(), outstanding, limit;

	must(set_up(&ring, memory, sizeof memory, ENTRY, ENTRY, ENTRY, NULL, is_front) == 0);
	ring.prod = (uint32_t)nondet_any();
	ring.cons = (uint32_t)nondet_any();
	ring.dead = (uint32_t)nondet_any() & 1;
	outstanding = pv_ring_outstanding(&ring);
	assume(outstanding <= ring.size);
	limit = ring.is_front ? outstanding : ring.size - outstanding;
	assume(known <= limit);
	ring.peer_prod_checked = ring.cons + known;
	ring.checked = ring.prod;
	must(ring.size == BIG);
}

static void must_be_right(void)
{
	uint32_t outstanding = pv_ring_outstanding(&ring);

	must(outstanding <= ring.size);
	must(ring.peer_prod_checked - ring.cons <= (ring.is_front ? outstanding : ring.size - outstanding));
}

static void take_is_in_bounds(int is_front)
{
	uint8_t messages[BIG * ENTRY];
	uint32_t cons, max = (uint32_t)nondet_any();
	int64_t n;

	make_ring(is_front);
	cons = ring.cons;
	assume(max <= BIG);
	n = pv_ring_take(&ring, messages, max);
	must(n == -EPROTO || (n >= 0 && n <= max && n <= ring.size));
	must(ring.cons == cons + (n > 0 ? (uint32_t)n : 0));
	must(n_loads <= 1);
	must_be_right();
}

static void take_refuses_what_cannot_be(int is_front)
{
	uint8_t messages[BIG * ENTRY];
	uint32_t cons, limit, known;
	int64_t n;

	make_ring(is_front);
	assume(!ring.dead);
	cons = ring.cons;
	known = ring.peer_prod_checked - cons;
	limit = ring.is_front ? pv_ring_outstanding(&ring) : ring.size - pv_ring_outstanding(&ring);
	n = pv_ring_take(&ring, messages, BIG);
	if (n_loads)
		must((n == -EPROTO) == ((uint32_t)last_load - cons > limit || (uint32_t)last_load - cons < known));
	must((n == -EPROTO) == ring.dead);
}

static void push_notifies_when_asked(int is_front)
{
	uint8_t messages[BIG * ENTRY];
	uint32_t prod, room, n = (uint32_t)nondet_any();
	int64_t pushed;

	make_ring(is_front);
	prod = ring.prod;
	room = pv_ring_room(&ring);
	assume(n <= BIG);
	pushed = pv_ring_push(&ring, messages, n);
	must(n_loads <= 1);
	if (pushed > 0) {
		uint32_t count = (uint32_t)pushed;

		must(count <= room && count <= n && ring.prod == prod + count && *ring.own_prod == ring.prod);
		/* Asked for one of those that were pushed: its index is the event's, less one. */
		must(ring.notified == ((uint32_t)last_load - 1 - prod < count));
	} else {
		must(ring.notified == 0 && ring.prod == prod);
	}
	must_be_right();
}

void attach_only_when_idle(void)
{
	int result = pv_ring_attach(&ring, memory, sizeof memory, ENTRY, ENTRY, ENTRY, NULL, 0);
	must(result == 0 || result == -EBUSY);
	must(n_loads == 2);
	if (result == 0) {
		must(ring.prod == (uint32_t)last_load && ring.cons == ring.prod && pv_ring_outstanding(&ring) == 0);
		must_be_right();
	}
}

void front_takes(void) { take_is_in_bounds(1); }
void back_takes(void) { take_is_in_bounds(0); }
void front_refuses(void) { take_refuses_what_cannot_be(1); }
void back_refuses(void) { take_refuses_what_cannot_be(0); }
void front_pushes(void) { push_notifies_when_asked(1); }
void back_pushes(void) { push_notifies_when_asked(0); }
