/* SPDX-License-Identifier: MIT */
/*
 * Late EOI under threads: two senders, one thread that waits and takes, two workers that end events, with and without
 * work, and a port that is closed while its EOI is delayed. Every event is ended once; in the end every port is unmasked.
 * `eoi_stress EVENTS`.
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "pv_atomic.h"
#include "pv_event.h"

#define PORTS 16
#define WORKERS 2

static struct pv_waiter waiter;
static struct pv_port ports[PORTS], senders[PORTS];
static uint32_t given[PORTS];   /* 1: an event of this port waits for a worker */
static uint32_t done, failed;
static long events;

static void *send_events(void *seed)
{
	unsigned int random = (unsigned int)(uintptr_t)seed;

	while (!pv_load_relaxed(&done)) {
		pv_notify(&senders[rand_r(&random) % PORTS]);
		if (rand_r(&random) % 64 == 0)
			sched_yield();
	}
	return NULL;
}

static void *end_events(void *seed)
{
	unsigned int random = (unsigned int)(uintptr_t)seed;

	while (!pv_load_relaxed(&done)) {
		uint32_t i = (uint32_t)rand_r(&random) % PORTS;

		/* Rarely two in a row without work, which cost a delay. */
		if (pv_exchange(&given[i], 0) && pv_port_eoi(&ports[i], rand_r(&random) % 8 == 0) < 0)
			pv_store_relaxed(&failed, 1);
	}
	return NULL;
}

static void take_events(struct pv_inbox *inbox)
{
	uint32_t slots[PORTS];

	for (long taken = 0; taken < events;) {
		int result = pv_wait(&waiter, NULL, 0, 1000000);
		uint32_t n;

		if (result != PV_WAIT_EVENT)
			continue;
		n = pv_inbox_take(inbox, slots, PORTS);
		for (uint32_t i = 0; i < n; i++) {
			pv_port_delivered(&ports[slots[i]]);
			if (pv_exchange(&given[slots[i]], 1))
				pv_store_relaxed(&failed, 2);
		}
		taken += n;
	}
}

/* What a closed port leaves: nothing in a list, nothing pending. */
static void close_delayed(struct pv_inbox *inbox)
{
	struct pv_port *port = &ports[0];

	pv_port_late_eoi(port, 0);
	do
		pv_notify(&senders[0]);
	while (!pv_port_take_pending(port));
	if (pv_port_eoi(port, 1) <= 0 || pv_port_eoi(port, 1) != -EINVAL)
		failed = 3;
	pv_port_discard(port);
	pv_port_close(port);
	for (int i = 0; i < PV_EOI_CLASSES; i++)
		if (waiter.delayed[i].first)
			failed = 4;
	if (inbox->pending[0] & 1)
		failed = 5;
}

int main(int argc, char **argv)
{
	struct pv_inbox *inbox = mmap(NULL, sizeof *inbox, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int bell = eventfd(0, EFD_NONBLOCK);
	pthread_t threads[2 + WORKERS];

	events = argc > 1 ? atol(argv[1]) : 10000;
	if (inbox == MAP_FAILED)
		return 1;
	pv_inbox_init(inbox);
	if (pv_waiter_init(&waiter, NULL) || pv_waiter_add(&waiter, inbox, bell))
		return 1;
	for (uint32_t i = 0; i < PORTS; i++) {
		pv_port_init(&ports[i], &waiter, inbox, i);
		pv_port_late_eoi(&ports[i], PV_SPURIOUS_THRESHOLD);
		pv_port_init(&senders[i], NULL, NULL, 0);
		pv_port_set_peer(&senders[i], inbox, i, bell, 0);
	}
	for (uintptr_t i = 0; i < 2 + WORKERS; i++)
		pthread_create(&threads[i], NULL, i < 2 ? send_events : end_events, (void *)(i + 1));
	take_events(inbox);
	pv_store_relaxed(&done, 1);
	for (int i = 0; i < 2 + WORKERS; i++)
		pthread_join(threads[i], NULL);
	for (int i = 0; i < PORTS; i++)
		if (given[i] && pv_port_eoi(&ports[i], 0) < 0)
			failed = 6;
	while (waiter.eoi_due_ns) {
		pv_wait(&waiter, NULL, 0, 1000000);
		pv_inbox_take(inbox, (uint32_t[PORTS]){0}, PORTS);
	}
	for (int i = 0; i < PORTS; i++)
		if (ports[i].masked_for || inbox->masked[0] & (uint64_t)1 << i)
			failed = 7;
	close_delayed(inbox);
	pv_waiter_destroy(&waiter);
	if (failed) {
		fprintf(stderr, "failed: %u\n", failed);
		return 1;
	}
	puts("ok");
	return 0;
}
