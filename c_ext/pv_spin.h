/* SPDX-License-Identifier: MIT */
/*
 * How long to look before sleeping: a length that learns from recent waits, asked for only while a CPU is idle, and paid
 * from a budget that all rings of one peer share.
 *
 * Waking a sleeper costs some 13-30 us each way, a look costs nothing if the peer answers at once and nobody else
 * wants the CPU. So a wait spins as long as waits of this ring usually take, if that is less than `most_ns`, but not
 * less than what it would lose by a sleep. Misses make it rest: it sleeps at once, and tries again after a while. All
 * state is private memory; nothing here is believed from a peer, who can only make us spin what the budget allows.
 */
#ifndef PV_SPIN_H
#define PV_SPIN_H

#include <stdint.h>

/* A spin this short is free: to sleep and be woken would have cost this process as much CPU. */
#define PV_SPIN_FREE_NS 5000
/* Sleeping and being woken takes this long at least: as long as spins pay at all, none is shorter. */
#define PV_SPIN_WORTH_NS 20000
/* What a budget can have saved up. */
#define PV_SPIN_SAVED_NS 20000000
#define PV_SPIN_DEFAULT_NS 50000

/*
 * What all rings of one peer may spin together: a share of one CPU.
 *
 * Threads: any. Must outlive the rings that use it.
 */
struct pv_spin_budget {
	uint32_t share;         /* thousandths of a CPU */
	int64_t left_ns;        /* to spend; negative: overdrawn by spins that ran when it ran out */
	int64_t filled_at_ns;   /* CLOCK_MONOTONIC of the last refill */
	uint64_t refused;       /* spins not begun for it */
};

/* Private to one ring: one thread waits. */
struct pv_spin {
	int64_t most_ns;        /* never longer; 0: never spin */
	int64_t next_ns;        /* what the next wait spins; 0 while it rests */
	uint32_t misses;        /* spins in a row that found nothing */
	uint32_t rest;          /* waits to sleep through at once after the next time it gives up */
	uint32_t resting;       /* of these: still to come */
	struct pv_spin_budget *budget;  /* NULL: no limit */
	uint64_t spun_ns;
	uint64_t gated;         /* spins not begun: no idle CPU, or the peer on this one */
};

/* `share`: thousandths of one CPU, 0 to 1000. */
void pv_spin_budget_init(struct pv_spin_budget *budget, uint32_t share, int64_t now_ns);
/* 1 while there is something left to spend at `now_ns`. */
int pv_spin_budget_open(struct pv_spin_budget *budget, int64_t now_ns);
void pv_spin_budget_spend(struct pv_spin_budget *budget, int64_t spun_ns);

/* most_ns: 0 never spins. It begins with the whole of it. */
void pv_spin_init(struct pv_spin *spin, int64_t most_ns, struct pv_spin_budget *budget);
/* Before a wait: for how long to spin at most, 0 for not at all. `idle`: there is a CPU for the peer beside ours. */
int64_t pv_spin_begin(struct pv_spin *spin, int64_t now_ns, int idle);
/* After a spin that pv_spin_begin allowed. */
void pv_spin_end(struct pv_spin *spin, int64_t spun_ns, int found);
/* After a sleep that followed a spin in vain: the whole wait took gap_ns. */
void pv_spin_slept(struct pv_spin *spin, int64_t gap_ns);

/*
 * 1 unless more threads want to run on this machine than it has CPUs. Looked up every 10 ms at most; where the kernel
 * does not tell (no /proc/loadavg) 1 if there are two CPUs at all. Threads: any.
 */
int pv_spin_cpu_is_idle(int64_t now_ns);

#endif
