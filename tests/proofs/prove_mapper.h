/* SPDX-License-Identifier: MIT */
/* A mapper of two pages, in any state it may be in. Behind the C files it is of. */
#define PAGES 2u
#define SELF 7

static struct pv_grant_entry shared_entries[PAGES];
static struct pv_pin pins[PAGES];
static struct pv_pinned pinned[PAGES];
static uint8_t pages[PAGES * PAGE_BYTES];
static struct pv_mapper mapper;

static int is_shared(const void *at)
{
	return __ESBMC_POINTER_OBJECT(at) == __ESBMC_POINTER_OBJECT(shared_entries);
}

int sched_yield(void) { return 0; }

static uint32_t any(void)
{
	return (uint32_t)nondet_any();
}

/* A mapper that may have pinned each page already. */
static void make_mapper(void)
{
	mapper = (struct pv_mapper){ .entries = shared_entries, .data = pages, .pins = pins, .pinned = pinned, .base = any(),
				     .n_pages = PAGES, .self = SELF, .read_only = any() & 1 };
	for (uint32_t i = 0; i < PAGES; i++) {
		pins[i] = (struct pv_pin){ (uint16_t)any(), mapper.read_only ? 0 : (uint16_t)any() };
		pinned[i] = (struct pv_pinned){ any(), (uint16_t)any(), 0 };
		if (is_pinned(&pins[i])) {
			assume(pinned[i].frame - mapper.base < PAGES);
			assume((pinned[i].flags & (PV_GTF_TYPE_MASK | PV_GTF_SUB_PAGE)) == PV_GTF_PERMIT_ACCESS);
			assume(!pins[i].writers || !(pinned[i].flags & PV_GTF_READONLY));
		}
	}
}

