/* SPDX-License-Identifier: MIT */
/* What the explorer runs: the real ring, events, streams and grants, each between two or three threads. */
#include <string.h>

#include "explore.h"
#include "pv_event.h"
#include "pv_flex.h"
#include "pv_grant.h"
#include "pv_ring.h"
#include "pv_stream.h"

#ifndef MESSAGES
#define MESSAGES 4u
#endif
#define ENTRY_BYTES 8
#define RING_BYTES (PV_RING_HEADER_BYTES + 2 * ENTRY_BYTES)
#define FEW 3u                   /* in what has more threads or more accesses */
#define START (UINT32_MAX - 1)   /* the indexes wrap on the way */
#define SLOT 70
#define A_LONG_TIME (-1)

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

static int is_good(void)
{
	return 1;
}

/* -- the whole of it: pv_ring_wait over event channels */

static struct pv_waiter waiters[2];
static struct pv_inbox inboxes[2];
static struct pv_port ports[2];

static void make_channel(void)
{
	int bells[2];

	memset(inboxes, 0, sizeof inboxes);
	for (int i = 0; i < 2; i++) {
		bells[i] = explore_open();
		pv_inbox_init(&inboxes[i]);
		pv_waiter_destroy(&waiters[i]);
		must(pv_waiter_init(&waiters[i], NULL) == 0);
		must(pv_waiter_add(&waiters[i], &inboxes[i], bells[i]) == 0);
		pv_port_init(&ports[i], &waiters[i], &inboxes[i], SLOT);
	}
	for (int i = 0; i < 2; i++)
		pv_port_set_peer(&ports[i], &inboxes[1 - i], SLOT, bells[1 - i], 0);
}

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

/* -- events alone. The data that an event is about must be visible after its take. */

static uint64_t note;

static void set_up_events(void)
{
	make_channel();
	note = 0;
}

static void notifies(void)
{
	note = 1;
	must(pv_notify(&ports[0]) >= 0);
}

static void waits_for_port(void)
{
	must(pv_wait(&waiters[1], &ports[1], 0, A_LONG_TIME) == PV_WAIT_EVENT);
	must(note == 1);
}

static void waits_for_any(void)
{
	uint32_t slots[2];

	must(pv_wait(&waiters[1], NULL, 0, A_LONG_TIME) == PV_WAIT_EVENT);
	while (pv_inbox_take(&inboxes[1], slots, 2) == 0)
		await_change();
	must(slots[0] == SLOT && note == 1);
}

static void set_up_masked(void)
{
	set_up_events();
	pv_port_mask(&ports[1]);
}

static void unmasks(void)
{
	pv_port_unmask(&ports[1]);
}

static void kicks(void)
{
	note = 1;
	pv_waiter_kick(&waiters[1]);
}

static void waits_for_kick(void)
{
	must(pv_wait(&waiters[1], NULL, 0, A_LONG_TIME) == PV_WAIT_KICKED && note == 1);
}

/* Two threads send through one port, whose counters and peer the lock guards. */
static void notifies_too(void)
{
	must(pv_notify(&ports[0]) >= 0);
}

static void rebinds(void)
{
	pv_port_set_peer(&ports[0], &inboxes[1], SLOT + 1, -1, 0);
}

static void polls_port(void)
{
	while (!pv_port_take_pending(&ports[1]))
		await_change();
	must(note == 1);
}

static struct pv_inbox new_inbox;

static void set_up_page(void)
{
	memset(&new_inbox, 0, sizeof new_inbox);
}

static void makes_inbox(void)
{
	pv_inbox_init(&new_inbox);
}

static void checks_inbox(void)
{
	while (pv_inbox_check(&new_inbox))
		await_change();
}

/* What does not fit into one take stays for the next. */
static void notifies_two(void)
{
	must(pv_notify(&ports[0]) >= 0);
	rebinds();
	must(pv_notify(&ports[0]) >= 0);
}

static void takes_one_by_one(void)
{
	uint32_t slot;

	for (int left = 2; left;) {
		uint32_t n = pv_inbox_take(&inboxes[1], &slot, 1);

		must(!n || slot == SLOT || slot == SLOT + 1);
		left -= (int)n;
		if (!n)
			await_change();
	}
}

/* -- a stream of four bytes */

static uint8_t page[64] __attribute__((aligned(8)));
static struct pv_stream writer, reader;

static void set_up_stream(void)
{
	const struct pv_stream_layout out = { .out = 0, .out_size = 2, .in = 8, .in_size = 2,
					      .out_cons = 16, .out_prod = 20, .in_cons = 24, .in_prod = 28 };
	const struct pv_stream_layout in = { .out = 8, .out_size = 2, .in = 0, .in_size = 2,
					     .out_cons = 28 - 4, .out_prod = 28, .in_cons = 16, .in_prod = 20 };

	memset(page, 0, sizeof page);
	must(pv_stream_attach(&writer, page, sizeof page, &out, NULL) == 0);
	must(pv_stream_attach(&reader, page, sizeof page, &in, NULL) == 0);
}

static void writes_bytes(void)
{
	static const uint8_t text[5] = "abcde";

	for (uint32_t done = 0; done < sizeof text;) {
		int64_t n = pv_stream_write(&writer, text + done, (uint32_t)sizeof text - done);

		must(n >= 0);
		done += (uint32_t)n;
		if (n == 0)
			await_change();
	}
}

static void reads_bytes(void)
{
	uint8_t text[5];

	for (uint32_t done = 0; done < sizeof text;) {
		int64_t n = pv_stream_read(&reader, text + done, (uint32_t)sizeof text - done);

		must(n >= 0);
		for (; n > 0; n--, done++)
			must(text[done] == "abcde"[done]);
		if (done < sizeof text)
			await_change();
	}
}

/* -- a flex ring whose back end says "no more" behind its last bytes */

static struct pv_flex flex_front, flex_back;
static struct pv_flex_indexes flex_page;
static uint8_t flex_data[PV_PAGE_BYTES];

static void set_up_flex(void)
{
	uint32_t refs[1] = { 9 };

	must(pv_flex_create(&flex_front, &flex_page, flex_data, 0, refs, NULL, START) == 0);
	must(pv_flex_look(&flex_page, 0, refs) == 0 && refs[0] == 9);
	must(pv_flex_attach(&flex_back, &flex_page, flex_data, 0, NULL) == 0);
}

static void says_no_more(void)
{
	must(pv_flex_write(&flex_back, (const uint8_t *)"abcd", 4) == 4);
	must(pv_flex_set_error(&flex_back, 1, -5) == 0);
	must(pv_flex_set_error(&flex_back, 0, -5) == 0);
}

static void reads_to_the_end(void)
{
	uint8_t text[4];

	while (!pv_flex_error(&flex_front, 1) && !pv_flex_error(&flex_front, 0))
		await_change();
	must(pv_flex_read(&flex_front, text, 4) == 4 && text[3] == 'd');
}

/* -- a page that is granted, mapped, written, unmapped, revoked and used for something else */

#define BASE 8
static struct pv_grant_entry entries[1];
static struct pv_grant_private granted[1];
static struct pv_pin pins[1];
static struct pv_pinned pinned[1];
static struct pv_granter granter;
static struct pv_mapper mapper;
static uint64_t data;

static void set_up_grant(void)
{
	memset(entries, 0, sizeof entries);
	memset(granted, 0, sizeof granted);
	memset(pins, 0, sizeof pins);
	granter = (struct pv_granter){ .entries = entries, .granted = granted, .base = BASE, .n_pages = 1 };
	mapper = (struct pv_mapper){ .entries = entries, .pins = pins, .pinned = pinned, .base = BASE, .n_pages = 1, .self = 3 };
	data = 0;
}

static void grants(void)
{
	data = 1;
	must(pv_grant_access(&granter, BASE, 3, BASE, 0) == 0);
	/* Not before somebody has mapped it, else nothing would be tried. */
	await_signal(0);
	while (pv_grant_revoke(&granter, BASE))
		await_change();
	must(data == 2);
	data = 3;
}

static void maps(void)
{
	uint64_t offset;

	while (pv_grant_map(&mapper, BASE, 0, &offset))
		await_change();
	raise_signal(0);
	must(data == 1);
	data = 2;
	must(pv_grant_unmap(&mapper, BASE, 0) == PV_GNTST_OKAY);
}

/* Two threads of the mapping process: their pins are counted under its lock. */
static void maps_to_read(void)
{
	uint64_t offset;

	if (pv_grant_map(&mapper, BASE, 1, &offset) == PV_GNTST_OKAY) {
		must(data == 1);
		must(pv_grant_unmap(&mapper, BASE, 1) == PV_GNTST_OKAY);
	}
}

static void grants_only(void)
{
	data = 1;
	must(pv_grant_access(&granter, BASE, 3, BASE, 0) == 0);
}

static int nothing_pinned(void)
{
	return mapper.pinned_pages == 0 && !(entries[0].flags & (PV_GTF_READING | PV_GTF_WRITING));
}

/* A process that dies with a page mapped: the broker gives the page back, but not what another process has mapped. */
static struct pv_pin other_pins[1];
static struct pv_pinned other_pinned[1];
static struct pv_mapper other;

static void set_up_death(void)
{
	set_up_grant();
	memset(other_pins, 0, sizeof other_pins);
	other = mapper;
	other.pins = other_pins;
	other.pinned = other_pinned;
	must(pv_grant_access(&granter, BASE, 3, BASE, 0) == 0);
}

static void maps_and_dies(void)
{
	uint64_t offset;

	if (pv_grant_map(&mapper, BASE, 0, &offset) == PV_GNTST_OKAY)
		data = 2;
	end_process(0);
}

static void is_broker(void)
{
	struct pv_pin *others[] = { other_pins };

	await_signal(0);
	pv_grant_release(entries, 1, pins, others, 1);
}

static void revokes(void)
{
	while (pv_grant_revoke(&granter, BASE))
		await_change();
	data = 3;
}

static void other_maps(void)
{
	uint64_t offset;

	must(pv_grant_map(&other, BASE, 0, &offset) == PV_GNTST_OKAY);
}

static int other_still_maps(void)
{
	return (entries[0].flags & (PV_GTF_READING | PV_GTF_WRITING)) == (PV_GTF_READING | PV_GTF_WRITING);
}

const struct scenario scenarios[] = {
	{"ring", set_up_ring, {front_singles, back_serves}, all_answered, 0},
	{"ring, in pairs", set_up_ring, {front_pairs, back_serves}, all_answered, 0},
	{"ring, light fence", set_up_light_fence, {front_singles, back_serves}, all_answered, 0},
	{"ring, light fence, in pairs", set_up_light_fence, {front_pairs, back_serves}, all_answered, 0},
	{"ring, event after half", set_up_half, {front_singles, back_serves}, all_answered, 0},
	{"ring, a thread that pushes and one that takes", set_up_ring, {front_pushes, front_takes, back_serves_few}, few_answered, 1},
	{"ring and event channel", set_up_channel, {front_sleeps, back_sleeps}, few_answered, 1},
	{"new front", set_up_ring, {front_asks_once, back_serves_once, new_front}, is_good, 0},
	{"event for a port", set_up_events, {notifies, waits_for_port}, is_good, 0},
	{"event for any port", set_up_events, {notifies, waits_for_any}, is_good, 0},
	{"event and unmask", set_up_masked, {notifies, waits_for_port, unmasks}, is_good, 0},
	{"kick", set_up_events, {kicks, waits_for_kick}, is_good, 0},
	{"two senders", set_up_events, {notifies, notifies_too, rebinds}, is_good, 0},
	{"port that is polled", set_up_events, {notifies, polls_port}, is_good, 0},
	{"new inbox", set_up_page, {makes_inbox, checks_inbox}, is_good, 0},
	{"inbox that is taken one by one", set_up_events, {notifies_two, takes_one_by_one}, is_good, 0},
	{"stream", set_up_stream, {writes_bytes, reads_bytes}, is_good, 0},
	{"flex ring", set_up_flex, {says_no_more, reads_to_the_end}, is_good, 0},
	{"grant and revoke", set_up_grant, {grants, maps}, is_good, 0},
	{"two threads that map", set_up_grant, {grants_only, maps_to_read, maps_to_read}, nothing_pinned, 0},
	{"dead mapper", set_up_death, {maps_and_dies, is_broker, revokes}, is_good, 0},
	{"dead mapper beside a live one", set_up_death, {maps_and_dies, is_broker, other_maps}, other_still_maps, 0},
};
const int n_scenarios = sizeof scenarios / sizeof *scenarios;
