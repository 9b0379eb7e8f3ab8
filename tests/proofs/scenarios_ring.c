/* SPDX-License-Identifier: MIT */
/* What the explorer runs of rings: both ends, and one end in two threads. */
#include <string.h>

#include "scenarios.h"
#include "pv_ring.h"

#ifndef MESSAGES
#define MESSAGES 4u
#endif
#define ENTRY_BYTES 8
#define RING_BYTES (PV_RING_HEADER_BYTES + 2 * ENTRY_BYTES)
#define FEW 3u                   /* in what has more threads or more accesses */

/* -- a ring of two slots; "notify" is a signal that orders nothing */

static uint8_t memory[RING_BYTES] __attribute__((aligned(64)));
static struct pv_ring front, back;

enum { TO_FRONT, TO_BACK };

static uint64_t answer_of(uint64_t request)
{
	return request * 3 + 1;
}

static void make_ring(struct pv_port *front_port, struct pv_port *back_port)
{
	must(pv_ring_create(&front, memory, RING_BYTES, ENTRY_BYTES, 8, 8, front_port, START) == 0);
	must(pv_ring_attach(&back, memory, RING_BYTES, ENTRY_BYTES, 8, 8, back_port, 0) == 0);
	must(front.size == 2);
}

static void set_up_ring(void)
{
	make_ring(NULL, NULL);
}

/* The pushing end has no barrier; the sleeping one has the kernel run it everywhere. */
static void set_up_light_fence(void)
{
	set_up_ring();
	must(pv_ring_set_fence(&front, PV_FENCE_PROCESS) == 0 && pv_ring_set_fence(&back, PV_FENCE_PROCESS) == 0);
	must(front.fence == PV_FENCE_PROCESS && back.fence == PV_FENCE_PROCESS);
}

static void set_up_half(void)
{
	set_up_light_fence();
	must(pv_ring_set_event_policy(&front, PV_EVENT_HALF, 0, 0) == 0);
}

static void push(struct pv_ring *ring, const uint64_t *messages, uint32_t n, int peer)
{
	uint64_t notified = ring->notified;

	must(pv_ring_push(ring, messages, n) == n);
	if (ring->notified != notified)
		raise_signal(peer);
}

static uint32_t take(struct pv_ring *ring, uint64_t *messages, uint32_t max, int self)
{
	for (;;) {
		int64_t n = pv_ring_take(ring, messages, max);
		int result;

		must(n >= 0);
		if (n)
			return (uint32_t)n;
		result = pv_ring_final_check(ring);
		must(result >= 0);
		if (result == 0)
			await_signal(self);
	}
}

static uint32_t got_front, sent_front;

static void take_responses(void)
{
	uint64_t responses[2];
	uint32_t n = take(&front, responses, 2, TO_FRONT);

	for (uint32_t i = 0; i < n; i++)
		must(responses[i] == answer_of(100 + got_front++));
}

static void push_requests(uint32_t n)
{
	uint64_t requests[2] = { 100 + sent_front, 101 + sent_front };

	push(&front, requests, n, TO_BACK);
	sent_front += n;
}

/* Up to `batch` requests, one push. */
static void run_front(uint32_t batch)
{
	got_front = sent_front = 0;
	while (got_front < MESSAGES) {
		uint32_t left = MESSAGES - sent_front, n = left < batch ? left : batch;

		if (n && pv_ring_room(&front) >= n)
			push_requests(n);
		else
			take_responses();
	}
}

static void front_singles(void)
{
	run_front(1);
}

static void front_pairs(void)
{
	run_front(2);
}

static void serve(uint32_t n_messages)
{
	uint64_t messages[2];

	for (uint32_t done = 0; done < n_messages;) {
		uint32_t n = take(&back, messages, 2, TO_BACK);

		for (uint32_t i = 0; i < n; i++) {
			must(messages[i] == 100 + done++);
			messages[i] = answer_of(messages[i]);
		}
		must(!pv_ring_cons_overflow(&back, back.cons - 1));
		push(&back, messages, n, TO_FRONT);
	}
}

static void back_serves(void)
{
	serve(MESSAGES);
}

static int all_answered(void)
{
	return front.cons == START + MESSAGES && !front.dead && !back.dead;
}

/* -- one thread of the front pushes, another takes */

static int few_answered(void)
{
	return front.cons == START + FEW && !front.dead && !back.dead;
}

static void front_pushes(void)
{
	for (sent_front = 0; sent_front < FEW;) {
		if (pv_ring_room(&front))
			push_requests(1);
		else
			await_change();
	}
}

static void back_serves_few(void)
{
	serve(FEW);
}

static void front_takes(void)
{
	for (got_front = 0; got_front < FEW;)
		take_responses();
}

/* -- a new front on an idle ring: it may use the slots that the former back end has read */

static void front_asks_once(void)
{
	got_front = sent_front = 0;
	push_requests(1);
}

static void back_serves_once(void)
{
	serve(1);
}

static void new_front(void)
{
	static struct pv_ring fresh;
	const uint64_t requests[2] = { 200, 201 };

	while (pv_ring_attach(&fresh, memory, RING_BYTES, ENTRY_BYTES, 8, 8, NULL, 1) || fresh.prod != START + 1)
		await_change();
	must(pv_ring_push(&fresh, requests, 2) == 2);
}

/* -- the whole of it: pv_ring_wait over event channels */

static void set_up_channel(void)
{
	make_channel();
	make_ring(&ports[0], &ports[1]);
}

static uint32_t take_or_sleep(struct pv_ring *ring, uint64_t *messages)
{
	int64_t n;

	while ((n = pv_ring_take(ring, messages, 2)) == 0)
		must(pv_ring_wait(ring, 0, A_LONG_TIME) == PV_WAIT_EVENT);
	must(n > 0);
	return (uint32_t)n;
}

static void front_sleeps(void)
{
	uint64_t message, responses[2];

	for (uint32_t sent = 0, got = 0; got < FEW;) {
		if (sent < FEW && pv_ring_room(&front)) {
			message = 100 + sent++;
			must(pv_ring_push(&front, &message, 1) == 1);
			continue;
		}
		for (uint32_t n = take_or_sleep(&front, responses), i = 0; i < n; i++)
			must(responses[i] == answer_of(100 + got++));
	}
}

static void back_sleeps(void)
{
	uint64_t messages[2];

	for (uint32_t done = 0; done < FEW;) {
		uint32_t n = take_or_sleep(&back, messages);

		for (uint32_t i = 0; i < n; i++) {
			must(messages[i] == 100 + done++);
			messages[i] = answer_of(messages[i]);
		}
		must(pv_ring_push(&back, messages, n) == n);
	}
}

const struct scenario ring_scenarios[] = {
	{"ring", set_up_ring, {front_singles, back_serves}, all_answered, 0},
	{"ring, in pairs", set_up_ring, {front_pairs, back_serves}, all_answered, 0},
	{"ring, light fence", set_up_light_fence, {front_singles, back_serves}, all_answered, 0},
	{"ring, light fence, in pairs", set_up_light_fence, {front_pairs, back_serves}, all_answered, 0},
	{"ring, event after half", set_up_half, {front_singles, back_serves}, all_answered, 0},
	{"ring, a thread that pushes and one that takes", set_up_ring, {front_pushes, front_takes, back_serves_few}, few_answered, 2},
	{"ring and event channel", set_up_channel, {front_sleeps, back_sleeps}, few_answered, 1},
	{"new front", set_up_ring, {front_asks_once, back_serves_once, new_front}, NULL, 0},
	{0},
};
