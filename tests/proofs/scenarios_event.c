/* SPDX-License-Identifier: MIT */
/* What the explorer runs of event channels. */
#include <string.h>

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

const struct scenario event_scenarios[] = {
	{"event for a port", set_up_events, {notifies, waits_for_port}, NULL, 0},
	{"event for any port", set_up_events, {notifies, waits_for_any}, NULL, 0},
	{"event and unmask", set_up_masked, {notifies, waits_for_port, unmasks}, NULL, 0},
	{"kick", set_up_events, {kicks, waits_for_kick}, NULL, 0},
	{"two senders", set_up_events, {notifies, notifies_too, rebinds}, NULL, 0},
	{"port that is polled", set_up_events, {notifies, polls_port}, NULL, 0},
	{"new inbox", set_up_page, {makes_inbox, checks_inbox}, NULL, 0},
	{"inbox that is taken one by one", set_up_events, {notifies_two, takes_one_by_one}, NULL, 0},
	{0},
};
