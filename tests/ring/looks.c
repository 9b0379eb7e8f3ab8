/* SPDX-License-Identifier: MIT */
/*
 * What a wake-up costs a waiter of many ports, in accesses to shared words: `looks PORTS`. All ports but one are idle.
 * Prints the accesses of a wait that sleeps without an event, its wake-ups, and the accesses of one that finds an event
 * and takes it.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "interrupt_shim.h"
#include "pv_event.h"

static long looks;

void interrupt(void)
{
	looks++;
}

int main(int argc, char **argv)
{
	uint32_t n_ports = argc > 1 ? (uint32_t)atoi(argv[1]) : 1, n_inboxes, slots[PV_INBOX_SLOTS];
	struct pv_waiter waiter;
	struct pv_port *ports = calloc(n_ports, sizeof *ports), sender;
	struct pv_inbox *inboxes;
	int bell = -1;
	long idle, taken = 0;

	n_inboxes = (n_ports + PV_INBOX_SLOTS - 1) / PV_INBOX_SLOTS;
	inboxes = mmap(NULL, n_inboxes * sizeof *inboxes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (!ports || inboxes == MAP_FAILED || pv_waiter_init(&waiter, NULL))
		return 1;
	for (uint32_t i = 0; i < n_inboxes; i++) {
		pv_inbox_init(&inboxes[i]);
		bell = eventfd(0, EFD_NONBLOCK);
		if (pv_waiter_add(&waiter, &inboxes[i], bell))
			return 1;
	}
	for (uint32_t i = 0; i < n_ports; i++)
		pv_port_init(&ports[i], &waiter, &inboxes[i / PV_INBOX_SLOTS], i % PV_INBOX_SLOTS);
	pv_port_init(&sender, NULL, NULL, 0);
	pv_port_set_peer(&sender, &inboxes[n_inboxes - 1], (n_ports - 1) % PV_INBOX_SLOTS, bell, 0);

	looks = 0;
	if (pv_wait(&waiter, NULL, 0, 20000000) != PV_WAIT_TIMEOUT)
		return 1;
	idle = looks;
	pv_notify(&sender);
	looks = 0;
	if (pv_wait(&waiter, NULL, 0, -1) != PV_WAIT_EVENT)
		return 1;
	for (uint32_t i = 0; i < n_inboxes; i++)
		taken += pv_inbox_take(&inboxes[i], slots, PV_INBOX_SLOTS);
	if (taken != 1)
		return 1;
	printf("%ld %lu %ld\n", idle, (unsigned long)waiter.wakeups, looks);
	pv_waiter_destroy(&waiter);
	return 0;
}
