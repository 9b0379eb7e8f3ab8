/* SPDX-License-Identifier: MIT */
/* pv_flex.c, over pv_stream.c, against any peer: in bounds, whole packets or nothing, one look at the order. */
#include "prove.h"
#include "pv_stream.c"

/* The checker's offsetof is no constant; the compiler has seen to these. */
#define _Static_assert(condition, why) _Static_assert(1, why)
#include "pv_flex.c"

#define ORDER 0u
#define SIZE (PV_PAGE_BYTES / 2u)
#define MOST_ORDER 2u

static struct pv_flex_indexes page;
static uint8_t data[2 * SIZE];
static struct pv_flex flex;

static int is_shared(const void *at)
{
	return __ESBMC_POINTER_OBJECT(at) == __ESBMC_POINTER_OBJECT(&page);
}

uint32_t pv_home_mark(void) { return 1; }
int pv_home_is_here(uint32_t mark) { return 1; }
int pv_notify(struct pv_port *port) { return (int)(nondet_any() % 4); }

static void attach(void)
{
	int result = pv_flex_attach(&flex, &page, data, ORDER, NULL);

	must(result == 0 || result == -EPROTO);
	assume(result == 0);
	must(flex.stream.in_size == SIZE && flex.stream.out_size == SIZE);
	n_loads = 0;
}

void looks_once_at_the_order(void)
{
	uint32_t refs[1 << MOST_ORDER], max = (uint32_t)nondet_any();
	int order;

	assume(max <= MOST_ORDER);
	order = pv_flex_look(&page, max, refs);
	must(order == -EPROTO || (order >= 0 && (uint32_t)order <= max));
	must(n_loads == (order < 0 ? 1 : 1 + (1 << order)));
}

void reads_a_packet_or_nothing(void)
{
	uint8_t packet[SIZE];
	uint32_t n = (uint32_t)nondet_any(), before;
	int64_t moved;

	attach();
	assume(n <= SIZE || n > 2 * SIZE);
	before = flex.stream.read;
	moved = pv_flex_read(&flex, packet, n);
	must(n_loads <= 2);
	must(moved == n || moved == 0 || moved == -EPROTO || (moved == -EMSGSIZE && n > SIZE));
	must(moved <= 0 || (flex.stream.read == before + n && n <= (uint32_t)last_load - before));
	must((moved == -EPROTO) == flex.stream.dead);
}

void writes_a_packet_or_nothing(void)
{
	uint8_t packet[SIZE];
	uint32_t n = (uint32_t)nondet_any(), before;
	int64_t moved;

	attach();
	assume(n <= SIZE || n > 2 * SIZE);
	before = flex.stream.written;
	moved = pv_flex_write(&flex, packet, n);
	must(n_loads <= 2);
	must(moved == n || moved == 0 || moved == -EPROTO || (moved == -EMSGSIZE && n > SIZE));
	must(moved <= 0 || (flex.stream.written == before + n && before + n - (uint32_t)last_load <= SIZE));
	must((moved == -EPROTO) == flex.stream.dead);
}

void peeks_in_bounds(void)
{
	uint8_t packet[SIZE];
	uint32_t n = (uint32_t)nondet_any(), before;
	int64_t seen;

	attach();
	assume(n <= SIZE || n > 2 * SIZE);
	before = flex.stream.read;
	seen = pv_flex_peek(&flex, packet, n);
	must(n_loads == 1 && flex.stream.read == before);
	must(seen == n || seen == 0 || seen == -EPROTO || (seen == -EMSGSIZE && n > SIZE));
	must(seen <= 0 || n <= (uint32_t)last_load - before);
}
