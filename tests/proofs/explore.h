/* SPDX-License-Identifier: MIT */
/* What a scenario needs of the explorer. */
#ifndef EXPLORE_H
#define EXPLORE_H

#include <stdint.h>

#define MAX_THREADS 3

/* Threads that run `bodies`; set_up makes everything anew before each execution, good (or NULL) says whether it ended well. */
struct scenario {
	const char *name;
	void (*set_up)(void);
	void (*bodies[MAX_THREADS])(void);
	int (*good)(void);
	int less;           /* so many preemptions less than the bound */
};

/* Each ends with one that has no name. */
extern const struct scenario ring_scenarios[], event_scenarios[], page_scenarios[];

/* The execution is wrong. Does not return. */
void violation(const char *what);
#define must(what) ((what) ? (void)0 : violation(#what))

/* A level-triggered signal between threads that orders no memory. */
void raise_signal(int number);
/* The same, and whoever awaits it sees everything from before: the kernel tells of a process that is gone. */
void end_process(int number);
void await_signal(int number);
/* A descriptor that wakes and orders no memory. */
int explore_open(void);
/* A relaxed store of a word that others read by pv_copy_racing. */
void write_word(uint64_t *at, uint64_t value);
/* After a look that found nothing: until somebody has written something. */
void await_change(void);

#endif
