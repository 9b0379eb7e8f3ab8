/* SPDX-License-Identifier: MIT */
/* pv_stream.c against any peer and any layout: in bounds, never more than is there. */
#include "prove.h"
#include "pv_stream.c"

#define PAGE 64u

static uint8_t page[PAGE] __attribute__((aligned(64)));
static struct pv_stream stream;

static int is_shared(const void *at)
{
	return __ESBMC_POINTER_OBJECT(at) == __ESBMC_POINTER_OBJECT(page);
}

uint32_t pv_home_mark(void) { return 1; }
int pv_home_is_here(uint32_t mark) { return 1; }
int pv_notify(struct pv_port *port) { return (int)(nondet_any() % 4); }

static uint32_t any(void)
{
	return (uint32_t)nondet_any();
}

static int attach(void)
{
	struct pv_stream_layout layout = { any(), any(), any(), any(), any(), any(), any(), any() };

	return pv_stream_attach(&stream, page, PAGE, &layout, NULL);
}

void read_is_in_bounds(void)
{
	uint8_t data[PAGE];
	uint32_t before, n = any();
	int64_t moved;

	assume(attach() == 0 && n <= PAGE);
	before = stream.read;
	n_loads = 0;
	moved = pv_stream_read(&stream, data, n);
	must(n_loads == 1);
	must(moved == -EPROTO || (moved >= 0 && moved <= n && (uint32_t)moved <= (uint32_t)last_load - before));
	must((moved == -EPROTO) == ((uint32_t)last_load - before > stream.in_size));
	must(moved < 0 || stream.read == before + (uint32_t)moved);
}

void write_is_in_bounds(void)
{
	uint8_t data[PAGE];
	uint32_t before, n = any();
	int64_t moved;

	assume(attach() == 0 && n <= PAGE);
	before = stream.written;
	n_loads = 0;
	moved = pv_stream_write(&stream, data, n);
	must(n_loads == 1);
	must((moved == -EPROTO) == (before - (uint32_t)last_load > stream.out_size));
	must(moved < 0 || (moved <= n && before + (uint32_t)moved - (uint32_t)last_load <= stream.out_size));
	must(moved < 0 || stream.written == before + (uint32_t)moved);
}
