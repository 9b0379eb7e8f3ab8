/* SPDX-License-Identifier: MIT */
/* What the explorer's files share: explore.c has schedules and threads, explore_memory.c words and views, explore_system.c
 * signals, descriptors and time. */
#ifndef EXPLORE_PRIVATE_H
#define EXPLORE_PRIVATE_H

#include <setjmp.h>
#include <stdint.h>

#include "explore.h"
#include "explore_shim.h"

#undef memcpy
#undef close
#undef read
#undef write

#define MAX_WORDS 60

struct view {
	uint8_t of[MAX_WORDS + 4];    /* the oldest store that may be read */
	int16_t clock[MAX_THREADS + 1];
};

enum wait { RUNS, ENDED, WAITS_SIGNAL, WAITS_BELL, WAITS_CHANGE };

struct thread {
	struct view view, acquired, released;
	jmp_buf here;
	enum wait wait;
	int argument;                 /* the signal or epoll descriptor that it waits for */
	uint64_t changes;             /* stores there were when it began to wait for a change */
	uint64_t fresh;               /* reads the newest of so many stores, less one: it has waited for a change in vain */
	int quiet;                    /* nothing that others could see since it last let them come first */
	void (*body)(void);
};

extern struct thread threads[MAX_THREADS];
extern int n_threads, running;        /* -1: none, a scenario is set up or looked at */
extern uint64_t changes;              /* stores of something new, in this execution */
extern int discovered;                /* a word has turned out to be shared */

/* One of n, in turn, over all executions. */
int choose(int n);
/* The running thread waits or has ended: somebody else goes on. */
void give_way(void);
/* Another thread may come first. */
void point(void);
/* The same before a load, where it makes a difference. */
void point_before_load(void);

/* Into `into`, all that `other` has seen. */
void join(struct view *into, const struct view *other);

void memory_begin(int is_new_scenario);
/* Of the scenario that has been explored. */
void memory_report_sites(void);
void weaken_site(int site, int level);
void system_begin(void);
int has_signal(int number);
int has_bell(int epoll_fd);
int is_on_a_stack(const void *at);

#endif
