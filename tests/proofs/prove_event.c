/* SPDX-License-Identifier: MIT */
/* pv_event.c against any peer: slots in the table, at most as many as asked for, rung only when somebody sleeps. */
#include "prove.h"

#include <sys/stat.h>
#include <unistd.h>

#define read(fd, data, n) ((void)(data), 0)
#define write(fd, data, n) (n_rung++, (long)(n))
#define fstat(fd, status) (-1)

static int n_rung;

#include "pv_event.c"

static struct pv_inbox inbox;
static struct pv_port port;

static int is_shared(const void *at)
{
	return __ESBMC_POINTER_OBJECT(at) == __ESBMC_POINTER_OBJECT(&inbox);
}

uint32_t pv_home_mark(void) { return 1; }
int pv_home_is_here(uint32_t mark) { return 1; }
void pv_waiter_nudge(struct pv_waiter *w) {}

#define FEW 2

void take_gives_slots(void)
{
	uint32_t slots[FEW], max = (uint32_t)nondet_any(), n;

	assume(max <= FEW);
	may_be_set = (uint64_t)1 << 63 | 1;
	n = pv_inbox_take(&inbox, slots, max);
	must(n <= max);
	for (uint32_t i = 0; i < n; i++)
		must(slots[i] < PV_INBOX_SLOTS);
}

void notify_rings_a_sleeper(void)
{
	uint32_t slot = (uint32_t)nondet_any();
	int result;

	pv_port_init(&port, NULL, NULL, 0);
	pv_port_set_peer(&port, &inbox, slot, 5, 0);
	result = pv_notify(&port);
	must(result == PV_NOTIFY_RANG || result == PV_NOTIFY_SUPPRESSED);
	must(n_rung == (result == PV_NOTIFY_RANG));
	/* The last thing it looked at is `asleep`, of which any value but 0 rings. */
	must(result != PV_NOTIFY_RANG || (uint32_t)last_load != 0);
	must(port.busy == 0);
}

void any_slot_is_cut_to_the_table(void)
{
	must(pv_inbox_slot_has_event(&inbox, (uint32_t)nondet_any()) <= 1);
}
