/* SPDX-License-Identifier: MIT */
/*
 * Runs the real C code in every schedule up to a bound of preemptions, with every stale read that C11 allows.
 *
 * Memory is a list of stores for each word. A thread has a view: of each word, the oldest store it may still read. A load
 * may read any store that is not older; a release store carries the thread's view, an acquire load of it takes that over;
 * sequentially consistent fences and accesses exchange views with one global view. (That is RC11: no load reads what is
 * stored later in the schedule. Words are written by one thread, or by read-modify-writes, so the order of stores is the
 * order of the schedule.) membarrier is a fence here, one in every other thread, and one here again.
 *
 * A thread is preempted where that can make a difference: at fences, read-modify-writes, ordered loads and system calls,
 * and before the first load after one of these or after a store. What else there is, it does in one go with what comes
 * before it: had another thread come in between, the same reads would have been possible had it come earlier (for a load,
 * which may read what is older) or later (for a store, beside which others may read what is older).
 *
 * Plain accesses come in through the compiler's ThreadSanitizer calls; two of them that nothing orders are a violation.
 * So is an execution in which nobody can go on.
 *
 * explore BOUND [SITE LEVEL [SCENARIO [PART PARTS]]]: LEVEL 1, 2 weaken the access SITE (-1: none) by one or two steps;
 * SCENARIO is a name ("": all); of its executions only each PARTS-th share. Exits with 1 at a violation.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include "explore_private.h"

#define MAX_CHOICES 4000
#define STACK_BYTES 65536
#define SHARING_DEPTH 12      /* choices after which the executions are dealt out */

static const struct scenario *const scenario_sets[] = { ring_scenarios, event_scenarios, page_scenarios, NULL };

struct thread threads[MAX_THREADS];
int n_threads, running = -1, discovered;
uint64_t changes;

static uint8_t stacks[MAX_THREADS][STACK_BYTES] __attribute__((aligned(64)));
static int preemptions, bound, aborted;
static uint64_t executions, shares, skipped;
static uint32_t part, parts = 1;
static jmp_buf scheduler;
static const char *scenario_name;

int is_on_a_stack(const void *at)
{
	return (uintptr_t)at - (uintptr_t)stacks < sizeof stacks;
}

/* Leave the execution where it is; its threads are of no use any more. */
static _Noreturn void abort_execution(void)
{
	aborted = 1;
	running = -1;
	_longjmp(scheduler, 1);
}

void violation(const char *what)
{
	/* Until every shared word is known as one, executions mean nothing. */
	if (discovered && running >= 0)
		abort_execution();
	printf("%s: %s (execution %lu, thread %d)\n", scenario_name, what, (unsigned long)executions, running);
	exit(1);
}

/* -- choices: depth first */

static uint8_t chosen[MAX_CHOICES], of_n[MAX_CHOICES];
static int depth, n_chosen;

int choose(int n)
{
	if (n == 1)
		return 0;
	if (depth == MAX_CHOICES)
		violation("too long");
	if (depth == n_chosen) {
		if (depth == SHARING_DEPTH && parts > 1 && !discovered && shares++ % parts != part) {
			skipped++;
			abort_execution();
		}
		chosen[n_chosen] = 0;
		of_n[n_chosen++] = (uint8_t)n;
	} else if (of_n[depth] != n) {
		violation("not deterministic");
	}
	return chosen[depth++];
}

static int next_choice(void)
{
	while (n_chosen && chosen[n_chosen - 1] + 1 == of_n[n_chosen - 1])
		n_chosen--;
	if (n_chosen)
		chosen[n_chosen - 1]++;
	return n_chosen;
}

/* -- threads */

static int can_run(const struct thread *thread)
{
	switch (thread->wait) {
	case RUNS: return 1;
	case WAITS_SIGNAL: return has_signal(thread->argument);
	case WAITS_BELL: return has_bell(thread->argument);
	case WAITS_CHANGE: return thread->changes != changes;
	default: return 0;
	}
}

static void go_to(int number)
{
	int from = running;

	if (number == from)
		return;
	running = number;
	threads[number].wait = RUNS;
	if (!_setjmp(from < 0 ? scheduler : threads[from].here))
		_longjmp(threads[number].here, 1);
}

/* Nobody can run: who waits for a change reads the newest now; if that was the newest, everything stands still. */
static int last_resort(void)
{
	for (int i = 0; i < n_threads; i++) {
		if (threads[i].wait == WAITS_CHANGE && threads[i].fresh != changes + 1) {
			threads[i].fresh = changes + 1;
			return i;
		}
	}
	return -1;
}

void give_way(void)
{
	int able[MAX_THREADS], n = 0, ended = 0;

	threads[running].quiet = 0;
	for (int i = 0; i < n_threads; i++) {
		ended += threads[i].wait == ENDED;
		if (can_run(&threads[i]))
			able[n++] = i;
	}
	if (ended == n_threads) {
		running = -1;
		_longjmp(scheduler, 1);
	}
	if (n == 0 && (able[0] = last_resort()) >= 0)
		n = 1;
	if (n == 0)
		violation("everybody waits");
	go_to(able[choose(n)]);
	threads[running].wait = RUNS;
}

void point(void)
{
	int able[MAX_THREADS] = { running }, n = 1;

	threads[running].quiet = 0;
	if (preemptions == bound)
		return;
	for (int i = 0; i < n_threads; i++)
		if (i != running && can_run(&threads[i]))
			able[n++] = i;
	n = choose(n);
	if (n) {
		preemptions++;
		go_to(able[n]);
	}
}

void point_before_load(void)
{
	if (!threads[running].quiet)
		point();
	threads[running].quiet = 1;
}

void await_change(void)
{
	threads[running].wait = WAITS_CHANGE;
	threads[running].changes = changes;
	give_way();
}

int explore_yield(void)
{
	await_change();
	return 0;
}

static void run_thread(int number)
{
	if (!_setjmp(threads[number].here))
		_longjmp(scheduler, 1);
	for (;;) {
		threads[number].body();
		threads[number].wait = ENDED;
		if (!_setjmp(threads[number].here))
			give_way();
	}
}

static void make_threads(void)
{
	static ucontext_t first;

	volatile int i;

	for (i = 0; i < n_threads; i++) {
		getcontext(&first);
		first.uc_stack.ss_sp = stacks[i];
		first.uc_stack.ss_size = STACK_BYTES;
		makecontext(&first, (void (*)(void))run_thread, 1, i);
		if (!_setjmp(scheduler))
			setcontext(&first);
	}
}

/* -- executions */

static void execute(const struct scenario *scenario)
{
	depth = preemptions = 0;
	changes = 0;
	executions++;
	memory_begin(executions == 1);
	system_begin();
	scenario->set_up();
	for (int i = 0; i < n_threads; i++) {
		struct thread *thread = &threads[i];

		memset(&thread->view, 0, sizeof thread->view);
		thread->acquired = thread->released = thread->view;
		thread->wait = RUNS;
		thread->fresh = 0;
		thread->quiet = 0;
		thread->body = scenario->bodies[i];
	}
	go_to(choose(n_threads));
	if (!aborted && scenario->good && !scenario->good())
		violation("did not end well");
}

static void explore(const struct scenario *scenario, int with_bound)
{
	bound = with_bound > scenario->less ? with_bound - scenario->less : 0;
	scenario_name = scenario->name;
	for (n_threads = 0; n_threads < MAX_THREADS && scenario->bodies[n_threads];)
		n_threads++;
	executions = shares = skipped = 0;
	make_threads();
	do {
		/* A word that turns out to be shared makes more choices: begin again. */
		if (discovered)
			n_chosen = 0, shares = 0;
		if (aborted)
			make_threads();
		discovered = aborted = 0;
		execute(scenario);
	} while (discovered || next_choice());
	printf("%s: %lu executions\n", scenario->name, (unsigned long)(executions - skipped));
	memory_report_sites();
}

int main(int argc, char **argv)
{
	int with_bound = argc > 1 ? atoi(argv[1]) : 2;
	const char *only = argc > 4 ? argv[4] : "";

	if (argc > 3)
		weaken_site(atoi(argv[2]), atoi(argv[3]));
	if (argc > 6) {
		part = (uint32_t)atoi(argv[5]);
		parts = (uint32_t)atoi(argv[6]);
	}
	for (const struct scenario *const *set = scenario_sets; *set; set++)
		for (const struct scenario *scenario = *set; scenario->name; scenario++)
			if (!*only || !strcmp(only, scenario->name))
				explore(scenario, with_bound);
	return 0;
}
