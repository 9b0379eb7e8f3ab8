/* SPDX-License-Identifier: MIT */
/* What measuring programs do at their start, in C and C++: the clock, a CPU of one's own, memory that a child shares. */
#ifndef PINNED_H
#define PINNED_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define CANNOT_RUN 3

static inline int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ll + now.tv_nsec;
}

static inline void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof set, &set)) {
		fprintf(stderr, "CPU %d is not for this process\n", cpu);
		exit(CANNOT_RUN);
	}
}

/* Zeroed, and there already. */
static inline void *share(size_t bytes)
{
	void *shared = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (shared == MAP_FAILED) {
		fprintf(stderr, "no memory to share: %s\n", strerror(errno));
		exit(CANNOT_RUN);
	}
	return shared;
}

#endif
