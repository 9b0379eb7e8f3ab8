/* SPDX-License-Identifier: MIT */
/*
 * This project's own ring, in C.
 *
 *   -DFENCE=PV_FENCE_FULL, PV_FENCE_PROCESS or PV_FENCE_HOST
 *   -DIN_PLACE=1             messages are written into the slots; 0: copied in as a batch
 *   -DWAIT=0                 an end without work spins; otherwise it waits on its port: 1 adaptive, 2 asleep at once
 *
 * One way, slots are handed back for half a ring at a time, by responses that nobody writes.
 */
#include "peer.h"

#include "pv_event.h"
#include "pv_ring.h"

#define ENTRY_BYTES (((REQUEST_BYTES > RESPONSE_BYTES ? REQUEST_BYTES : RESPONSE_BYTES) + 3) / 4 * 4)
#define RING_BYTES (PV_RING_HEADER_BYTES + SLOTS * ENTRY_BYTES)
#define RING_PAGES_BYTES ((RING_BYTES + 4095) / 4096 * 4096)
#define LOOK_AGAIN_NS 5000000   /* a sleeper looks whether all is over */

struct end {
	struct pv_ring ring;
	struct pv_waiter waiter;
	struct pv_port port;
	uint32_t owed;
};

static struct end ends[2];
static int bells[2];

static size_t peer_bytes(void)
{
	return RING_PAGES_BYTES + 2 * sizeof(struct pv_inbox);
}

static struct pv_inbox *inbox(void *memory, int of_front)
{
	return (struct pv_inbox *)((uint8_t *)memory + RING_PAGES_BYTES) + of_front;
}

static void give_up(const char *what, int status)
{
	fprintf(stderr, "%s: %s\n", what, strerror(-status));
	exit(3);
}

static void peer_prepare(void *memory)
{
	for (int i = 0; i < 2; i++) {
		pv_inbox_init(inbox(memory, i));
		bells[i] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
		if (bells[i] < 0)
			give_up("no doorbell", -errno);
	}
}

static struct pv_port *open_port(struct end *end, void *memory, int is_front)
{
	int status = pv_waiter_init(&end->waiter, NULL);

	if (!status)
		status = pv_waiter_add(&end->waiter, inbox(memory, is_front), bells[is_front]);
	if (status)
		give_up("no waiter", status);
	pv_port_init(&end->port, &end->waiter, inbox(memory, is_front), 0);
	pv_port_set_peer(&end->port, inbox(memory, !is_front), 0, bells[!is_front], 0);
	return &end->port;
}

static struct end *peer_open(void *memory, int is_front)
{
	struct end *end = &ends[is_front];
	struct pv_port *port = WAIT ? open_port(end, memory, is_front) : NULL;
	int status;

	if (is_front)
		status = pv_ring_create(&end->ring, memory, RING_BYTES, ENTRY_BYTES, REQUEST_BYTES, RESPONSE_BYTES, port, 0);
	else
		status = pv_ring_attach(&end->ring, memory, RING_BYTES, ENTRY_BYTES, REQUEST_BYTES, RESPONSE_BYTES, port, 0);
	if (status)
		give_up("no ring", status);
	if (end->ring.size != SLOTS)
		give_up("the number of slots is not a power of two", -EINVAL);
	status = pv_ring_set_fence(&end->ring, FENCE);
	if (status)
		give_up("no such fence", status);
	pv_spin_init(&end->ring.spin, PV_SPIN_DEFAULT_NS, NULL);
	return end;
}

INLINE uint32_t moved(int64_t status)
{
	if (status < 0)
		give_up("the ring", (int)status);
	return (uint32_t)status;
}

/* Fill up to n slots themselves, run by run. */
INLINE uint32_t send_in_place(struct end *end, const void *messages, uint32_t bytes, uint32_t n)
{
	struct pv_ring_slots slots;
	uint32_t sent = 0;

	while (sent < n && !pv_ring_reserve(&end->ring, n - sent, &slots) && slots.n) {
		for (uint32_t i = 0; i < slots.n; i++)
			memcpy(slots.first + i * ENTRY_BYTES, (const uint8_t *)messages + (sent + i) * bytes, bytes);
		sent += moved(pv_ring_commit(&end->ring, slots.n));
	}
	return sent;
}

INLINE uint32_t send_requests(struct end *end, const struct request *requests, uint32_t n)
{
	if (IN_PLACE)
		return send_in_place(end, requests, REQUEST_BYTES, n);
	return moved(pv_ring_push(&end->ring, requests, n));
}

INLINE uint32_t take_requests(struct end *end, struct request *requests, uint32_t n)
{
	return moved(pv_ring_take(&end->ring, requests, n));
}

INLINE uint32_t send_responses(struct end *end, const struct response *responses, uint32_t n)
{
	if (IN_PLACE)
		return send_in_place(end, responses, RESPONSE_BYTES, n);
	return moved(pv_ring_push(&end->ring, responses, n));
}

INLINE uint32_t take_responses(struct end *end, struct response *responses, uint32_t n)
{
	return moved(pv_ring_take(&end->ring, responses, n));
}

INLINE void pause_empty(struct end *end)
{
	if (WAIT)
		pv_ring_wait(&end->ring, WAIT == 1 ? PV_RING_LEARNT_NS : 0, LOOK_AGAIN_NS);
}

INLINE void hand_back(struct end *end, uint32_t n)
{
	struct pv_ring_slots slots;

	end->owed += n;
	if (end->owed < SLOTS / 2)
		return;
	while (end->owed && !pv_ring_reserve(&end->ring, end->owed, &slots) && slots.n)
		end->owed -= moved(pv_ring_commit(&end->ring, slots.n));
}

INLINE uint32_t make_room(struct end *end)
{
	static struct response dropped[SLOTS];

	return take_responses(end, dropped, SLOTS);
}
