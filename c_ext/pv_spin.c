/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include "pv_atomic.h"
#include "pv_spin.h"

#define MARGIN 4                /* spin that many times the usual gap */
#define MOST_MISSES 4           /* in a row, then it rests */
#define FIRST_REST 8            /* waits; doubles up to LONGEST_REST while the spins after it find nothing either */
#define LONGEST_REST 256
#define REFILL_NS 1000000
#define LOOK_AGAIN_NS 10000000

/* Budget. */

void pv_spin_budget_init(struct pv_spin_budget *budget, uint32_t share, int64_t now_ns)
{
	*budget = (struct pv_spin_budget){.share = share, .left_ns = share ? PV_SPIN_SAVED_NS : 0, .filled_at_ns = now_ns};
}

int pv_spin_budget_open(struct pv_spin_budget *budget, int64_t now_ns)
{
	int64_t filled_at_ns = pv_load_relaxed(&budget->filled_at_ns);

	/* One of several threads adds what was earned since; the others only spend, so the limit of what is saved holds. */
	if (now_ns - filled_at_ns >= REFILL_NS && pv_compare_exchange(&budget->filled_at_ns, &filled_at_ns, now_ns)) {
		int64_t away_ns = now_ns - filled_at_ns, space_ns = PV_SPIN_SAVED_NS - pv_load_relaxed(&budget->left_ns);
		int64_t earned_ns = away_ns / 1000 * budget->share;

		if (space_ns > 0)
			pv_add(&budget->left_ns, earned_ns < space_ns ? earned_ns : space_ns);
	}
	if (pv_load_relaxed(&budget->left_ns) > 0)
		return 1;
	pv_count(&budget->refused);
	return 0;
}

void pv_spin_budget_spend(struct pv_spin_budget *budget, int64_t spun_ns)
{
	pv_add(&budget->left_ns, -spun_ns);
}

/* What it learns. */

void pv_spin_init(struct pv_spin *spin, int64_t most_ns, struct pv_spin_budget *budget)
{
	*spin = (struct pv_spin){.most_ns = most_ns, .next_ns = most_ns, .rest = FIRST_REST, .budget = budget};
}

int64_t pv_spin_begin(struct pv_spin *spin, int64_t now_ns, int idle)
{
	if (spin->most_ns <= 0)
		return 0;
	if (spin->resting) {
		spin->resting--;
		return 0;
	}
	if (!idle) {
		spin->gated++;
		return 0;
	}
	if (spin->budget && !pv_spin_budget_open(spin->budget, now_ns))
		return 0;
	return spin->next_ns ? spin->next_ns : spin->most_ns;
}

static int64_t within(int64_t ns, int64_t most_ns)
{
	return ns > most_ns ? most_ns : ns < PV_SPIN_WORTH_NS ? (PV_SPIN_WORTH_NS < most_ns ? PV_SPIN_WORTH_NS : most_ns) : ns;
}

void pv_spin_end(struct pv_spin *spin, int64_t spun_ns, int found)
{
	spin->spun_ns += (uint64_t)spun_ns;
	if (spin->budget && (!found || spun_ns > PV_SPIN_FREE_NS))
		pv_spin_budget_spend(spin->budget, found ? spun_ns - PV_SPIN_FREE_NS : spun_ns);
	if (found) {
		/* An eighth of the way to the new aim, and up at once: one short gap says little about the next. */
		int64_t aim_ns = within(MARGIN * spun_ns, spin->most_ns);

		spin->next_ns = aim_ns > spin->next_ns ? aim_ns : spin->next_ns - (spin->next_ns - aim_ns) / 8;
		spin->misses = 0;
		spin->rest = FIRST_REST;
	} else if (++spin->misses >= MOST_MISSES || spin->next_ns == 0) {
		spin->next_ns = 0;
		spin->misses = 0;
		spin->resting = spin->rest;
		spin->rest = spin->rest < LONGEST_REST ? spin->rest * 2 : LONGEST_REST;
	}
}

void pv_spin_slept(struct pv_spin *spin, int64_t gap_ns)
{
	if (spin->next_ns == 0)
		return;
	/* A longer spin would have found it; or no spin we may do would have. */
	spin->next_ns = within(gap_ns <= spin->most_ns ? spin->next_ns * 2 : spin->next_ns / 2, spin->most_ns);
}

/* The machine. */

/* Threads that want to run, this one included: the fourth field of /proc/loadavg; 0 when it cannot be read. */
static int runnable_threads(void)
{
	char text[128], *field = text;
	int fd = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof text - 1);

	if (fd >= 0)
		close(fd);
	if (n <= 0)
		return 0;
	text[n] = 0;
	for (int i = 0; i < 3; i++) {
		field = strchr(field, ' ');
		if (!field)
			return 0;
		field++;
	}
	return atoi(field);
}

int pv_spin_cpu_is_idle(int64_t now_ns)
{
	static int64_t looked_at_ns;
	static int cpus, idle;
	int64_t before_ns = pv_load_relaxed(&looked_at_ns);

	/* Unsigned: an answer from a later time is not believed either. */
	if (before_ns && (uint64_t)(now_ns - before_ns) < LOOK_AGAIN_NS)
		return pv_load_relaxed(&idle);
	if (pv_load_relaxed(&cpus) == 0)
		pv_store_relaxed(&cpus, get_nprocs());
	pv_store_relaxed(&idle, cpus > 1 && runnable_threads() <= cpus);
	pv_store_relaxed(&looked_at_ns, now_ns);
	return pv_load_relaxed(&idle);
}
