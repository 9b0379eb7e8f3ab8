/* SPDX-License-Identifier: MIT */
/*
 * "Write mine, then read yours", at every single place: one side's call is interrupted before its k-th access of a shared
 * word by a whole call of the other side, for every k. Whatever k is, an event or a message may not be lost.
 *
 * Says how many places were tried; exits with 1 at the first that loses something. Sequentially consistent: what weaker
 * orders do is for the sanitizer and for the table in c_ext/README.md.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pv_event.h"
#include "pv_ring.h"

#define SLOT 70
#define SHORT_NS 2000000

static struct pv_waiter waiter;
static struct pv_inbox inbox;
static struct pv_port sender, receiver;
static int bell[2];
static int sent, seen;
static uint64_t slept_before;   /* the other side came only after the sleep was over */

static uint8_t memory[4096] __attribute__((aligned(64)));
static struct pv_ring front, back;
static uint32_t fence;
static const uint64_t request = 42;

static long places_left = -1;
static void (*other_side)(void);

void interrupt(void)
{
	if (places_left < 0 || places_left-- > 0)
		return;
	slept_before = waiter.sleeps;
	other_side();
}

static void set_up(void)
{
	memset(&inbox, 0, sizeof inbox);
	pv_inbox_init(&inbox);
	if (pipe(bell) || pv_waiter_init(&waiter, NULL) || pv_waiter_add(&waiter, &inbox, bell[0]))
		exit(2);
	pv_port_init(&receiver, &waiter, &inbox, SLOT);
	pv_port_init(&sender, NULL, NULL, 0);
	pv_port_set_peer(&sender, &inbox, SLOT, bell[1], 0);
	if (pv_ring_create(&front, memory, sizeof memory, 8, 8, 8, NULL, UINT32_MAX) ||
	    pv_ring_attach(&back, memory, sizeof memory, 8, 8, 8, NULL, 0) || pv_ring_set_fence(&front, fence) ||
	    pv_ring_set_fence(&back, fence))
		exit(2);
	/* The first message always notifies: get over it. */
	pv_ring_push(&front, &request, 1);
	pv_ring_take(&back, &(uint64_t){0}, 1);
	front.notified = 0;
	sent = seen = -1;
}

static void tear_down(void)
{
	pv_waiter_destroy(&waiter);
	close(bell[0]);
	close(bell[1]);
}

static void push(void)
{
	sent = (int)pv_ring_push(&front, &request, 1);
}

static void final_check(void)
{
	seen = pv_ring_final_check(&back);
}

static int message_is_not_lost(void)
{
	return sent == 1 && (seen == 1 || front.notified == 1);
}

static void notify(void)
{
	sent = pv_notify(&sender);
}

static void wait_for_port(void)
{
	seen = pv_wait(&waiter, &receiver, 0, SHORT_NS);
}

static void wait_for_any(void)
{
	seen = pv_wait(&waiter, NULL, 0, SHORT_NS);
}

/* Seen without sleeping, or woken: never found only because the time was over. */
static int woken_for(int result)
{
	if (slept_before)
		return seen == result || pv_wait(&waiter, NULL, 0, 0) == result;
	return seen == result && waiter.sleeps == waiter.wakeups;
}

static int sleeper_is_woken(void)
{
	return woken_for(PV_WAIT_EVENT);
}

/* What a receiver does before it sleeps; it stays asleep. */
static void fall_asleep(void)
{
	__atomic_store_n(&inbox.asleep, 1, __ATOMIC_SEQ_CST);
	seen = (inbox.pending[SLOT / 64] >> SLOT % 64 & 1) && !(inbox.masked[SLOT / 64] >> SLOT % 64 & 1);
}

/* The same for a receiver that waits for any port: it looks at the slots that the selector names. */
static void fall_asleep_for_any(void)
{
	fall_asleep();
	seen = seen && (inbox.selector >> SLOT / 64 & 1);
}

static int sleeper_is_rung(void)
{
	return seen == 1 || sent == PV_NOTIFY_RANG;
}

static void mask_first(void)
{
	pv_port_mask(&receiver);
}

static void unmask(void)
{
	seen = pv_port_unmask(&receiver);
}

static int event_is_deliverable(void)
{
	return pv_wait(&waiter, NULL, 0, 0) == PV_WAIT_EVENT && pv_port_take_pending(&receiver);
}

static void take_all(void)
{
	uint32_t slots[4];

	seen = (int)pv_inbox_take(&inbox, slots, 4);
}

static void notify_first(void)
{
	pv_notify(&sender);
}

/* One event before and one beside the take: the second is taken with the first or is there for the next. */
static int event_is_taken(void)
{
	if (sent == PV_NOTIFY_SUPPRESSED && sender.merged)
		return seen == 1;
	take_all();
	return seen == 1;
}

/* Late EOI: an event is being worked on. */
static void begin_late(void)
{
	pv_port_late_eoi(&receiver, PV_SPURIOUS_THRESHOLD);
	pv_notify(&sender);
	pv_port_take_pending(&receiver);
}

static void late_before_event(void)
{
	pv_port_late_eoi(&receiver, PV_SPURIOUS_THRESHOLD);
	pv_notify(&sender);
}

static void end_event(void)
{
	pv_port_eoi(&receiver, 0);
}

static void take_one(void)
{
	seen = pv_port_take_pending(&receiver);
}

/* One event before and one beside the take: the second is taken with the first, or is there after the EOI. */
static int event_waits_for_the_eoi(void)
{
	if (seen != 1 || pv_wait(&waiter, NULL, 0, 0) == PV_WAIT_EVENT)
		return 0;
	end_event();
	return sender.merged ? 1 : event_is_deliverable();
}

static void kick(void)
{
	pv_waiter_kick(&waiter);
}

static int kick_is_told(void)
{
	return woken_for(PV_WAIT_KICKED) && pv_wait(&waiter, NULL, 0, 0) == PV_WAIT_TIMEOUT;
}

static void drain(void)
{
	seen = pv_waiter_drain(&waiter);
}

static void arm_always(void)
{
	pv_waiter_arm_always(&waiter);
}

/* A foreign loop polls, drains and looks, and polls again: it must find the event or be called for it. */
static int loop_is_called(void)
{
	return pv_wait(&waiter, NULL, 0, 0) == PV_WAIT_EVENT;
}

static void nothing(void)
{
}

static const struct scenario {
	const char *name;
	void (*before)(void);
	void (*interrupted)(void);
	void (*by)(void);
	int (*good)(void);
} scenarios[] = {
	{"final check, interrupted by a push", nothing, final_check, push, message_is_not_lost},
	{"push, interrupted by a final check", nothing, push, final_check, message_is_not_lost},
	{"wait for a port, interrupted by a notify", nothing, wait_for_port, notify, sleeper_is_woken},
	{"wait for any port, interrupted by a notify", nothing, wait_for_any, notify, sleeper_is_woken},
	{"notify, interrupted by falling asleep", nothing, notify, fall_asleep, sleeper_is_rung},
	{"notify, interrupted by falling asleep for any port", nothing, notify, fall_asleep_for_any, sleeper_is_rung},
	{"unmask, interrupted by a notify", mask_first, unmask, notify, event_is_deliverable},
	{"notify, interrupted by an unmask", mask_first, notify, unmask, event_is_deliverable},
	{"take, interrupted by a notify", notify_first, take_all, notify, event_is_taken},
	{"EOI, interrupted by a notify", begin_late, end_event, notify, event_is_deliverable},
	{"notify, interrupted by an EOI", begin_late, notify, end_event, event_is_deliverable},
	{"late take, interrupted by a notify", late_before_event, take_one, notify, event_waits_for_the_eoi},
	{"notify, interrupted by a late take", late_before_event, notify, take_one, event_waits_for_the_eoi},
	{"wait, interrupted by a kick", nothing, wait_for_any, kick, kick_is_told},
	{"drain, interrupted by a notify", arm_always, drain, notify, loop_is_called},
};

/* 1 when the call was over before place k came. */
static int run(const struct scenario *scenario, long k)
{
	int over;

	set_up();
	places_left = -1;
	scenario->before();
	other_side = scenario->by;
	places_left = k;
	scenario->interrupted();
	over = places_left >= 0;
	places_left = -1;
	if (over)
		scenario->by();
	if (!over && !scenario->good()) {
		printf("%s: lost at place %ld (sent %d, seen %d, sleeps %lu, wakeups %lu)\n", scenario->name, k, sent, seen,
		       (unsigned long)waiter.sleeps, (unsigned long)waiter.wakeups);
		exit(1);
	}
	tear_down();
	return over;
}

int main(void)
{
	long tried = 0;

	for (fence = PV_FENCE_FULL; fence <= PV_FENCE_HOST; fence++) {
		for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++) {
			long k = 0;

			while (!run(&scenarios[i], k))
				k++;
			if (k < 2)
				return 3;
			tried += k;
		}
	}
	printf("%ld places\n", tried);
	return 0;
}
