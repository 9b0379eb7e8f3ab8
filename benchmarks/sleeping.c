/* SPDX-License-Identifier: MIT */
/*
 * What it costs to sleep and be woken, between two pinned processes that never spin.
 *
 *   sleeping eventfd CPU CPU SECONDS           round trip of two bare eventfds, ns
 *   sleeping ring CPU CPU SECONDS              round trip of a request and its response through a ring, ns
 *   sleeping saturated CPU CPU SECONDS PAGES   doorbells rung for each message while the front end keeps a ring full
 *   sleeping ports CPU CPU SECONDS PORTS       round trip to a waiter of so many ports, ns
 *   sleeping cost CPU CPU SECONDS PORTS        CPU time of that waiter for each event, ns
 *   sleeping idle CPU CPU SECONDS PORTS        how often it woke while nothing was sent
 *
 * Prints one number, a median where it is a time of many.
 */
#include "pinned.h"

#include <signal.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pv_atomic.h"
#include "pv_ring.h"

#define PAGE 4096u
#define MOST_PORTS 16384u
#define MOST_INBOXES (MOST_PORTS / PV_INBOX_SLOTS)
#define MOST_SAMPLES (1u << 20)
#define BATCH 32u
#define STRIDE 7919u

/* A page and a doorbell to receive by, for each of MOST_INBOXES. */
struct place {
	struct pv_inbox *inbox;
	int bell;
};

static struct place at_front, at_back[MOST_INBOXES];
static struct pv_waiter waiter;
static struct pv_port ports[MOST_PORTS];
static void *ring_memory;
static uint32_t *attached;
static uint32_t n_ports = 1, pages = 4;
static int64_t samples[MOST_SAMPLES];
static uint8_t messages[BATCH * 112];
static double seconds;
static pid_t back_pid;

static void must(int64_t result)
{
	if (result < 0) {
		fprintf(stderr, "failed: %s\n", strerror((int)-result));
		exit(4);
	}
}

static struct place make_place(void)
{
	struct place place = {share(PAGE), eventfd(0, EFD_CLOEXEC)};

	if (place.bell < 0)
		exit(2);
	pv_inbox_init(place.inbox);
	return place;
}

static uint32_t n_inboxes(void)
{
	return (n_ports + PV_INBOX_SLOTS - 1) / PV_INBOX_SLOTS;
}

/* The front end sends by all ports and receives by the first; the back end the other way round. */
static void open_ports(int is_front)
{
	must(pv_waiter_init(&waiter, NULL));
	for (uint32_t i = 0; i < (is_front ? 1 : n_inboxes()); i++)
		must(is_front ? pv_waiter_add(&waiter, at_front.inbox, at_front.bell)
			      : pv_waiter_add(&waiter, at_back[i].inbox, at_back[i].bell));
	for (uint32_t i = 0; i < n_ports; i++) {
		struct place *there = &at_back[i / PV_INBOX_SLOTS];
		uint32_t slot = i % PV_INBOX_SLOTS;

		pv_port_init(&ports[i], &waiter, is_front ? (i ? NULL : at_front.inbox) : there->inbox, is_front ? 0 : slot);
		if (is_front)
			pv_port_set_peer(&ports[i], there->inbox, slot, there->bell, 0);
		else
			pv_port_set_peer(&ports[i], at_front.inbox, 0, at_front.bell, 0);
	}
}

static int64_t cpu_ns(pid_t pid)
{
	struct timespec used;
	clockid_t clock;

	if (clock_getcpuclockid(pid, &clock) || clock_gettime(clock, &used))
		exit(4);
	return (int64_t)used.tv_sec * 1000000000 + used.tv_nsec;
}

static int compare(const void *left, const void *right)
{
	int64_t a = *(const int64_t *)left, b = *(const int64_t *)right;

	return (a > b) - (a < b);
}

/* Round trips until the time is over: the median. */
static double round_trips(void (*trip)(uint32_t number))
{
	int64_t start = pv_now_ns(), before, now = start;
	uint32_t n = 0;

	while ((double)(now - start) < seconds * 1e9 && n < MOST_SAMPLES) {
		before = now;
		trip(n);
		now = pv_now_ns();
		samples[n++] = now - before;
	}
	qsort(samples, n, sizeof *samples, compare);
	return (double)samples[n / 2];
}

static void wait_for_back(void)
{
	while (!pv_load_acquire(attached))
		sched_yield();
}

/* Bare eventfds. */

static void ring_bell(int bell)
{
	const uint64_t one = 1;

	if (write(bell, &one, sizeof one) != sizeof one)
		exit(4);
}

static void hear_bell(int bell)
{
	uint64_t count;

	if (read(bell, &count, sizeof count) != sizeof count)
		exit(4);
}

static void eventfd_trip(uint32_t number)
{
	ring_bell(at_back[0].bell);
	hear_bell(at_front.bell);
}

static double eventfd_front(void)
{
	wait_for_back();
	return round_trips(eventfd_trip);
}

static void eventfd_back(void)
{
	pv_store_release(attached, 1);
	for (;;) {
		hear_bell(at_back[0].bell);
		ring_bell(at_front.bell);
	}
}

/* A ring. */

static struct pv_ring ring;

static void take_asleep(uint32_t least, uint32_t max)
{
	while (least) {
		int64_t n = pv_ring_take(&ring, messages, max);

		must(n);
		least -= (uint32_t)n < least ? (uint32_t)n : least;
		if (!n)
			must(pv_ring_wait(&ring, 0, -1));
	}
}

static void ring_trip(uint32_t number)
{
	must(pv_ring_push(&ring, messages, 1));
	take_asleep(1, 1);
}

static void front_ring(void)
{
	open_ports(1);
	must(pv_ring_create(&ring, ring_memory, pages * PAGE, 112, 112, 16, &ports[0], 0));
	pv_store_release(attached, 2);
	while (pv_load_acquire(attached) != 1)
		sched_yield();
}

static double ring_front(void)
{
	front_ring();
	return round_trips(ring_trip);
}

static void ring_back(void)
{
	while (pv_load_acquire(attached) != 2)
		sched_yield();
	open_ports(0);
	must(pv_ring_attach(&ring, ring_memory, pages * PAGE, 112, 112, 16, &ports[0], 0));
	pv_store_release(attached, 1);
	for (;;) {
		int64_t n = pv_ring_take(&ring, messages, BATCH);

		must(n);
		if (n) {
			must(pv_ring_push(&ring, messages, (uint32_t)n));
			pv_store_relaxed(attached + 16, (uint32_t)ports[0].rang);
		} else {
			must(pv_ring_wait(&ring, 0, -1));
		}
	}
}

/* Keep it full of batches; what both ends rang, for each request and response. */
static double saturated_front(void)
{
	int64_t start, rang = 0;
	uint64_t done = 0;

	front_ring();
	start = pv_now_ns();
	do {
		while (pv_ring_room(&ring) >= BATCH)
			must(pv_ring_push(&ring, messages, BATCH));
		done += pv_ring_outstanding(&ring);
		take_asleep(1, BATCH);
		done -= pv_ring_outstanding(&ring);
	} while ((double)(pv_now_ns() - start) < seconds * 1e9);
	rang = (int64_t)ports[0].rang + pv_load_relaxed(attached + 16);
	return (double)rang / ((double)done * 2);
}

/* Many ports. */

static void port_trip(uint32_t number)
{
	must(pv_notify(&ports[number * STRIDE % n_ports]));
	must(pv_wait(&waiter, &ports[0], 0, -1));
}

static double ports_front(void)
{
	open_ports(1);
	wait_for_back();
	return round_trips(port_trip);
}

static void ports_back(void)
{
	uint32_t slots[64];

	open_ports(0);
	pv_store_release(attached, 1);
	for (;;) {
		must(pv_wait(&waiter, NULL, 0, -1));
		for (uint32_t i = 0; i < n_inboxes(); i++)
			for (uint32_t n = pv_inbox_take(at_back[i].inbox, slots, 64); n; n--) {
				struct pv_port *port = &ports[i * PV_INBOX_SLOTS + slots[n - 1]];

				pv_port_delivered(port);
				must(pv_notify(port));
			}
	}
}

static double cost_front(void)
{
	int64_t start, before;
	uint32_t n = 0;

	open_ports(1);
	wait_for_back();
	for (uint32_t i = 0; i < 100; i++)
		port_trip(i);
	before = cpu_ns(back_pid);
	start = pv_now_ns();
	do
		port_trip(n++);
	while ((double)(pv_now_ns() - start) < seconds * 1e9);
	return (double)(cpu_ns(back_pid) - before) / n;
}

static double idle_front(void)
{
	int64_t timeout_ns = (int64_t)(seconds * 1e9);

	pv_store_release(attached, 1);
	open_ports(0);
	must(pv_wait(&waiter, NULL, 0, timeout_ns));
	return (double)waiter.wakeups;
}

static void idle_back(void)
{
	for (;;)
		pause();
}

static const struct mode {
	const char *name;
	double (*front)(void);
	void (*back)(void);
} modes[] = {
	{"eventfd", eventfd_front, eventfd_back},
	{"ring", ring_front, ring_back},
	{"saturated", saturated_front, ring_back},
	{"ports", ports_front, ports_back},
	{"cost", cost_front, ports_back},
	{"idle", idle_front, idle_back},
};

static double run(const struct mode *mode, int front_cpu, int back_cpu)
{
	double result;

	at_front = make_place();
	for (uint32_t i = 0; i < n_inboxes(); i++)
		at_back[i] = make_place();
	attached = share(PAGE);
	ring_memory = share(pages * PAGE);
	back_pid = fork();
	if (back_pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		pin(back_cpu);
		mode->back();
	}
	pin(front_cpu);
	result = mode->front();
	kill(back_pid, SIGKILL);
	waitpid(back_pid, NULL, 0);
	return result;
}

int main(int argc, char **argv)
{
	uint32_t number = argc > 5 ? (uint32_t)atoi(argv[5]) : 1;

	if (argc < 5 || number < 1)
		return 2;
	seconds = atof(argv[4]);
	for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
		if (strcmp(modes[i].name, argv[1]))
			continue;
		if (!strcmp(argv[1], "saturated"))
			pages = number;
		else
			n_ports = number;
		if (pages > 16 || n_ports > MOST_PORTS)
			return 2;
		printf("%.6g\n", run(&modes[i], atoi(argv[2]), atoi(argv[3])));
		return 0;
	}
	return 2;
}
