/* SPDX-License-Identifier: MIT */
/* What the explorer runs of event channels. */
#include <errno.h>
#include <string.h>

#include "explore_shim.h"
#include "pv_spin.h"
#include "scenarios.h"

/* -- a channel between two waiters */

struct pv_waiter waiters[2];
struct pv_inbox inboxes[2];
struct pv_port ports[2];

void make_channel(void)
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

/* -- late end of interrupt: whatever is sent until the last EOI is taken after it */

#define SENT 2u
#define OTHER_SLOT (SLOT + 1)

static uint32_t last_sent;
static struct pv_port other_port;

static void set_up_late(void)
{
	make_channel();
	pv_port_late_eoi(&ports[1], 0);
	last_sent = 0;
}

static void sends_on(void)
{
	for (uint32_t i = 1; i <= SENT; i++) {
		explore_store(&last_sent, sizeof last_sent, i, RELAXED, NO_SITE);
		must(pv_notify(&ports[0]) >= 0);
	}
}

static void take_all(int spurious)
{
	for (uint32_t seen = 0; seen < SENT;) {
		must(pv_wait(&waiters[1], &ports[1], 0, A_LONG_TIME) == PV_WAIT_EVENT);
		seen = (uint32_t)explore_load(&last_sent, sizeof last_sent, RELAXED, NO_SITE);
		must(pv_port_eoi(&ports[1], spurious) >= 0);
	}
}

static void takes_until_eoi(void)
{
	take_all(0);
}

static void takes_until_delayed_eoi(void)
{
	take_all(1);
}

static void set_up_late_note(void)
{
	set_up_late();
	note = 0;
}

static void runs_eois(void)
{
	pv_waiter_run_eois(&waiters[1]);
}

/* An event is taken and not ended yet. */
static void set_up_taken(void)
{
	set_up_late();
	pv_port_set_pending(&ports[1]);
	must(pv_port_take_pending(&ports[1]) == 1);
}

static void ends_late(void)
{
	int64_t result = pv_port_eoi(&ports[1], 1);

	must(result > 0 || result == -EINVAL);
}

static void closes(void)
{
	pv_port_close(&ports[1]);
}

static int nothing_is_delayed(void)
{
	for (int i = 0; i < PV_EOI_CLASSES; i++)
		if (waiters[1].delayed[i].first || waiters[1].delayed[i].last)
			return 0;
	return 1;
}

/* -- a slot is given up beside one that is not */

static void set_up_two_slots(void)
{
	set_up_events();
	pv_port_init(&other_port, &waiters[1], &inboxes[1], OTHER_SLOT);
	pv_port_set_pending(&other_port);
}

static void gives_up_slot(void)
{
	pv_port_discard(&other_port);
}

/* -- two threads that spin for one peer */

static struct pv_spin_budget budget;

static void set_up_budget(void)
{
	pv_spin_budget_init(&budget, 100, 0);
	pv_spin_budget_spend(&budget, PV_SPIN_SAVED_NS);
}

static void opens_budget(void)
{
	pv_spin_budget_open(&budget, 10000000);
}

static int is_paid_once(void)
{
	return budget.left_ns == 10000000 / 1000 * 100;
}

const struct scenario event_scenarios[] = {
	{"event for a port", set_up_events, {notifies, waits_for_port}, NULL, 0},
	{"event for any port", set_up_events, {notifies, waits_for_any}, NULL, 0},
	{"event and unmask", set_up_masked, {notifies, waits_for_port, unmasks}, NULL, 0},
	{"kick", set_up_events, {kicks, waits_for_kick}, NULL, 0},
	{"two senders", set_up_events, {notifies, notifies_too, rebinds}, NULL, 0},
	{"port that is polled", set_up_events, {notifies, polls_port}, NULL, 0},
	{"new inbox", set_up_page, {makes_inbox, checks_inbox}, NULL, 0},
	{"inbox that is taken one by one", set_up_events, {notifies_two, takes_one_by_one}, NULL, 0},
	{"late EOI", set_up_late, {sends_on, takes_until_eoi}, NULL, 0},
	{"late EOI of a port that is polled", set_up_late_note, {notifies, polls_port}, NULL, 0},
	{"late EOI, delayed", set_up_late, {sends_on, takes_until_delayed_eoi}, NULL, 1},
	{"late EOI, delayed, and a thread that polls", set_up_taken, {ends_late, runs_eois, runs_eois}, NULL, 1},
	{"late EOI of a port that is closed", set_up_taken, {ends_late, closes}, nothing_is_delayed, 0},
	{"slot that is given up", set_up_two_slots, {notifies, waits_for_port, gives_up_slot}, NULL, 1},
	{"budget of two threads", set_up_budget, {opens_budget, opens_budget}, is_paid_once, 0},
	{0},
};
