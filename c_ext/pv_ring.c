/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <string.h>

#include "pv_atomic.h"
#include "pv_home.h"
#include "pv_ring.h"

#define LOOKS_PER_CLOCK_READ 64
#define FEW_MESSAGES 8

/* pv_ring_poll's answer is used as a wait's result. */
_Static_assert(PV_WAIT_TIMEOUT == 0 && PV_WAIT_EVENT == 1, "nothing, something");

/* Making and joining. */

uint32_t pv_ring_entries(uint32_t n_bytes, uint32_t entry_bytes)
{
	uint32_t fit;

	if (n_bytes <= PV_RING_HEADER_BYTES || n_bytes > PV_RING_MAX_BYTES || entry_bytes == 0)
		return 0;
	fit = (n_bytes - PV_RING_HEADER_BYTES) / entry_bytes;
	return fit ? (uint32_t)1 << (31 - __builtin_clz(fit)) : 0;
}

static int set_up(struct pv_ring *ring, void *memory, uint32_t n_bytes, uint32_t entry_bytes, uint32_t request_bytes,
		  uint32_t response_bytes, struct pv_port *port, int is_front)
{
	struct pv_ring_header *header = memory;
	uint32_t size = pv_ring_entries(n_bytes, entry_bytes);

	if (size == 0 || (uintptr_t)memory % 8 || request_bytes == 0 || response_bytes == 0 ||
	    request_bytes > entry_bytes || response_bytes > entry_bytes)
		return -EINVAL;
	*ring = (struct pv_ring){
		.entries = (uint8_t *)memory + PV_RING_HEADER_BYTES,
		.own_prod = is_front ? &header->req_prod : &header->rsp_prod,
		.own_event = is_front ? &header->rsp_event : &header->req_event,
		.peer_prod = is_front ? &header->rsp_prod : &header->req_prod,
		.peer_event = is_front ? &header->req_event : &header->rsp_event,
		.port = port,
		.home_word = pv_home_word(),
		.home = pv_home_mark(),
		.is_front = is_front != 0,
		.size = size,
		.entry_bytes = entry_bytes,
		.out_bytes = is_front ? request_bytes : response_bytes,
		.in_bytes = is_front ? response_bytes : request_bytes,
	};
	return 0;
}

static void start_at(struct pv_ring *ring, uint32_t index)
{
	ring->prod = ring->cons = ring->peer_prod_checked = ring->cons_at_event = index;
	pv_store_relaxed(ring->own_event, index + 1);
}

int pv_ring_create(struct pv_ring *ring, void *memory, uint32_t n_bytes, uint32_t entry_bytes, uint32_t request_bytes,
		   uint32_t response_bytes, struct pv_port *port, uint32_t start)
{
	struct pv_ring_header *header = memory;
	int result = set_up(ring, memory, n_bytes, entry_bytes, request_bytes, response_bytes, port, 1);

	if (result)
		return result;
	memset(header, 0, sizeof *header);
	header->req_prod = header->rsp_prod = start;
	header->req_event = header->rsp_event = start + 1;
	start_at(ring, start);
	return 0;
}

int pv_ring_attach(struct pv_ring *ring, void *memory, uint32_t n_bytes, uint32_t entry_bytes, uint32_t request_bytes,
		   uint32_t response_bytes, struct pv_port *port, int is_front)
{
	int result = set_up(ring, memory, n_bytes, entry_bytes, request_bytes, response_bytes, port, is_front);
	uint32_t own, peer;

	if (result)
		return result;
	own = pv_load_acquire(ring->own_prod);
	peer = pv_load_acquire(ring->peer_prod);
	if (own != peer)
		return -EBUSY;
	start_at(ring, own);
	return 0;
}

/* Counts, from private memory alone. */

uint32_t pv_ring_outstanding(const struct pv_ring *ring)
{
	/* The thread that takes moves cons, the one that pushes moves prod; acquire: a freed slot has been copied out. */
	uint32_t prod = pv_load_acquire(&ring->prod), cons = pv_load_acquire(&ring->cons);

	return ring->is_front ? prod - cons : cons - prod;
}

uint32_t pv_ring_room(const struct pv_ring *ring)
{
	uint32_t outstanding = pv_ring_outstanding(ring);

	return ring->is_front ? ring->size - outstanding : outstanding;
}

static int check_usable(const struct pv_ring *ring)
{
	if (pv_load_relaxed(&ring->dead))
		return -EPROTO;
	return pv_load_relaxed(ring->home_word) == ring->home ? 0 : -ECHILD;
}

/*
 * What the peer has published and we have not consumed, or -EPROTO. A front end can have no more responses than it has
 * requests outstanding; a back end no more requests than slots that hold no unanswered one. Either also catches an index
 * that went backwards. An index once found right stays right, so the shared word is read only for more than is known.
 */
static int64_t available(struct pv_ring *ring, uint32_t wanted)
{
	uint32_t known = ring->peer_prod_checked - ring->cons, outstanding, limit, peer;

	if (known >= wanted)
		return known;
	/* Acquire: the entries before this index, written before the peer's pv_ring_push stored it with release. */
	peer = pv_load_acquire(ring->peer_prod);
	if (peer == ring->peer_prod_checked)
		return known;
	outstanding = pv_ring_outstanding(ring);
	limit = ring->is_front ? outstanding : ring->size - outstanding;
	if (peer - ring->cons > limit || peer - ring->cons < known) {
		pv_store_relaxed(&ring->dead, 1);
		return -EPROTO;
	}
	ring->peer_prod_checked = peer;
	return peer - ring->cons;
}

/*
 * Copies. The entries may change while they are read: what counts is the private copy, complete before anybody looks at
 * it. The barrier keeps the compiler from going back to the shared bytes instead.
 */

#define COPY_EACH(n_bytes)                                                                            \
	for (; n; n--, to += to_step, from += from_step)                                              \
		memcpy(to, from, n_bytes)

static void copy_messages(uint8_t *to, uint32_t to_step, const uint8_t *from, uint32_t from_step, uint32_t bytes,
			  uint32_t n)
{
	if (bytes == 16)
		COPY_EACH(16);
	else if (bytes == 112 && n <= FEW_MESSAGES)
		COPY_EACH(112);
	else if (bytes == to_step && bytes == from_step)
		memcpy(to, from, (size_t)n * bytes);
	else
		COPY_EACH(bytes);
	pv_fence_compiler();
}

static void copy_to_ring(struct pv_ring *ring, const uint8_t *messages, uint32_t n)
{
	uint32_t slot = ring->prod & (ring->size - 1), bytes = ring->out_bytes, step = ring->entry_bytes;
	uint32_t till_end = ring->size - slot < n ? ring->size - slot : n;

	copy_messages(ring->entries + (size_t)slot * step, step, messages, bytes, bytes, till_end);
	if (n > till_end)
		copy_messages(ring->entries, step, messages + (size_t)till_end * bytes, bytes, bytes, n - till_end);
}

static void copy_from_ring(struct pv_ring *ring, uint8_t *messages, uint32_t n)
{
	uint32_t slot = ring->cons & (ring->size - 1), bytes = ring->in_bytes, step = ring->entry_bytes;
	uint32_t till_end = ring->size - slot < n ? ring->size - slot : n;

	copy_messages(messages, bytes, ring->entries + (size_t)slot * step, step, bytes, till_end);
	if (n > till_end)
		copy_messages(messages + (size_t)till_end * bytes, bytes, ring->entries, step, bytes, n - till_end);
}

/* Push. */

/* Make everything before `next` visible; 1 when the peer asked to be notified on the way. */
static int publish(struct pv_ring *ring, uint32_t next)
{
	uint32_t before = ring->prod, event;

	/* Ours before the peer's answer can come: pv_ring_take of another thread checks responses against it. */
	pv_store_release(&ring->prod, next);
	/* Release: the entries. Licence to read them; pairs with available() of the peer. */
	pv_store_release(ring->own_prod, next);
	/* Publish, then look: pairs with the fence in pv_ring_final_check. Without it both may miss the other's store. */
	pv_fence_full();
	event = pv_load_relaxed(ring->peer_event);
	return (uint32_t)(next - event) < (uint32_t)(next - before);
}

static int64_t notify(struct pv_ring *ring)
{
	int result;

	ring->notified++;
	if (!ring->port)
		return 0;
	result = pv_notify(ring->port);
	return result == PV_NOTIFY_STALE ? (int64_t)PV_RING_STALE << 32 : 0;
}

int64_t pv_ring_push(struct pv_ring *ring, const void *messages, uint32_t n)
{
	uint32_t room, outstanding;
	int result = check_usable(ring);

	if (result)
		return result;
	room = pv_ring_room(ring);
	if (n > room) {
		if (!ring->is_front)
			return -EINVAL;
		n = room;
	}
	if (n == 0)
		return 0;
	copy_to_ring(ring, messages, n);
	ring->produced += n;
	ring->batches++;
	outstanding = ring->is_front ? ring->size - room + n : 0;
	if (outstanding > ring->max_outstanding)
		ring->max_outstanding = outstanding;
	if (publish(ring, ring->prod + n))
		return n | notify(ring);
	ring->suppressed++;
	return n;
}

/* Take. */

static int64_t spin_for_work(struct pv_ring *ring, int64_t until_ns)
{
	do {
		for (int i = 0; i < LOOKS_PER_CLOCK_READ; i++) {
			int64_t n = available(ring, 1);

			if (n)
				return n;
			pv_pause();
		}
	} while (pv_now_ns() < until_ns);
	return 0;
}

static int64_t take(struct pv_ring *ring, void *messages, uint32_t n)
{
	uint32_t outstanding;

	copy_from_ring(ring, messages, n);
	/* Release: the copy is done before pv_ring_push of another thread may fill the slots again. */
	pv_store_release(&ring->cons, ring->cons + n);
	ring->consumed += n;
	outstanding = ring->is_front ? 0 : pv_ring_outstanding(ring);
	if (outstanding > ring->max_outstanding)
		ring->max_outstanding = outstanding;
	return n;
}

int64_t pv_ring_take(struct pv_ring *ring, void *messages, uint32_t max)
{
	int64_t n = check_usable(ring);

	if (n == 0)
		n = available(ring, max);
	return n > 0 ? take(ring, messages, n < max ? (uint32_t)n : max) : n;
}

int64_t pv_ring_take_spin(struct pv_ring *ring, void *messages, uint32_t max, int64_t spin_ns)
{
	int64_t n = pv_ring_take(ring, messages, max);

	if (n || max == 0)
		return n;
	n = spin_for_work(ring, pv_now_ns() + (spin_ns < PV_SPIN_SLICE_NS ? spin_ns : PV_SPIN_SLICE_NS));
	return n > 0 ? take(ring, messages, n < max ? (uint32_t)n : max) : n;
}

/* Wait. */

int pv_ring_poll(struct pv_ring *ring)
{
	int64_t n = check_usable(ring);

	if (n == 0)
		n = available(ring, 1);
	return n < 0 ? (int)n : n > 0;
}

int pv_ring_final_check(struct pv_ring *ring)
{
	int result = pv_ring_poll(ring);

	if (result)
		return result;
	pv_store_relaxed(ring->own_event, ring->cons + 1);
	/* Ask, then look again: pairs with the fence in publish() of the peer. */
	pv_fence_full();
	return pv_ring_poll(ring);
}

static void count_event(struct pv_ring *ring, int work)
{
	ring->events++;
	ring->spurious += !work && ring->cons == ring->cons_at_event;
	ring->cons_at_event = ring->cons;
}

/* Spin on the index and on what ends a wait of the waiter; PV_WAIT_TIMEOUT when neither came. */
static int spin_for_anything(struct pv_ring *ring, struct pv_waiter *waiter, int64_t start_ns, int64_t spin_ns)
{
	int64_t until_ns = start_ns + (spin_ns < PV_SPIN_SLICE_NS ? spin_ns : PV_SPIN_SLICE_NS);

	do {
		int64_t n = spin_for_work(ring, 0);
		int result = waiter ? pv_waiter_look(waiter) : PV_WAIT_TIMEOUT;

		if (n)
			return n < 0 ? (int)n : PV_WAIT_EVENT;
		if (result != PV_WAIT_TIMEOUT)
			return result;
	} while (pv_now_ns() < until_ns);
	return spin_ns > PV_SPIN_SLICE_NS ? PV_WAIT_INTERRUPTED : PV_WAIT_TIMEOUT;
}

/* Sleep until the port has an event (1: then look at the ring) or the wait ends otherwise (0: *result). */
static int sleep_for_event(struct pv_ring *ring, struct pv_waiter *waiter, int64_t deadline_ns, int64_t timeout_ns,
			   int *result)
{
	uint64_t sleeps = waiter->sleeps;
	int64_t left_ns = timeout_ns < 0 ? -1 : deadline_ns - pv_now_ns();

	*result = pv_ring_final_check(ring);
	if (*result)
		return 0;
	*result = pv_wait(waiter, ring->port, 0, timeout_ns < 0 || left_ns > 0 ? left_ns : 0);
	ring->sleeps += waiter->sleeps - sleeps;
	return *result == PV_WAIT_EVENT;
}

/* After a look that found nothing: spin, then sleep. */
static int wait_long(struct pv_ring *ring, struct pv_waiter *waiter, int64_t spin_ns, int64_t timeout_ns)
{
	int64_t start_ns = pv_now_ns(), deadline_ns = start_ns + timeout_ns;
	int result = PV_WAIT_TIMEOUT;

	if (!waiter)
		spin_ns = INT64_MAX;
	if (timeout_ns >= 0 && spin_ns > timeout_ns)
		spin_ns = timeout_ns;
	if (spin_ns > 0) {
		result = spin_for_anything(ring, waiter, start_ns, spin_ns);
		ring->spins += result == PV_WAIT_EVENT;
	}
	while (waiter && result == PV_WAIT_TIMEOUT && sleep_for_event(ring, waiter, deadline_ns, timeout_ns, &result)) {
		result = pv_ring_poll(ring);
		if (result >= 0)
			count_event(ring, result);
	}
	return result;
}

int pv_ring_wait(struct pv_ring *ring, int64_t spin_ns, int64_t timeout_ns)
{
	struct pv_waiter *waiter = ring->port ? ring->port->waiter : NULL;
	int event, result = check_usable(ring);

	if (result)
		return result;
	if (ring->port && pv_load_relaxed(&ring->port->closed))
		return -EBADF;
	if (waiter && (result = pv_waiter_look(waiter)) != PV_WAIT_TIMEOUT)
		return result;
	event = ring->port ? pv_port_take_pending(ring->port) : 0;
	result = pv_ring_poll(ring);
	if (event && result >= 0)
		count_event(ring, result);
	if (result || timeout_ns == 0)
		return result;
	result = wait_long(ring, waiter, spin_ns, timeout_ns);
	ring->waits += result != PV_WAIT_INTERRUPTED;
	return result;
}
