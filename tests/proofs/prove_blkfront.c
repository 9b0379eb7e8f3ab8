/* SPDX-License-Identifier: MIT */
/* pv_blkfront_complete for any responses: each answers a request that was in flight, once, and no slot is lost or doubled. */
#include "prove.h"
#include "blkfront_private.h"
/* It changes no slot, and goes through all pages: not for the solver. */
#define blkfront_purge_now_and_then(front) ((void)(front))
#include "pv_blkfront.c"
#undef blkfront_purge_now_and_then
#include "pv_blkfront_grants.c"

#define SLOTS 3u
#define RESPONSES 2u
#define FIRST_GREF 100u
#define FEW_SEGMENTS 2u
#ifndef PERSISTENT
#define PERSISTENT 0
#endif

static struct pv_blkif_request shadow[SLOTS], batch[SLOTS];
static struct pv_blkfront_slot slots[SLOTS];
static struct pv_granter ours = { .base = FIRST_GREF, .n_pages = SLOTS * SLOT_PAGES };
static uint32_t free_slots[SLOTS], held[SLOTS];
static struct pv_blkif_counters counters;
static struct pv_blkfront front;

static int is_shared(const void *at)
{
	return 0;
}

/* Any backend: it has let go of the page or not. */
int pv_grant_revoke(struct pv_granter *granter, uint32_t gref)
{
	must(gref - FIRST_GREF < SLOTS * SLOT_PAGES);
	if (nondet_any() & 1)
		return -EBUSY;
	ours.granted[gref - FIRST_GREF].flags = 0;
	return 0;
}

void pv_grant_expect_back(const struct pv_granter *granter, uint32_t gref) {}
int pv_grant_in_use(struct pv_granter *granter, uint32_t gref) { return (int)(nondet_any() & 1); }
uint32_t pv_grant_now(const struct pv_granter *granter) { return 0; }
int pv_grant_access_at(struct pv_granter *granter, uint32_t gref, uint16_t domid, uint32_t frame, int read_only, uint32_t ms)
{
	return 0;
}
uint32_t pv_ring_room(const struct pv_ring *ring) { return SLOTS; }
int64_t pv_ring_push(struct pv_ring *ring, const void *messages, uint32_t n) { return n; }
int64_t pv_ring_take_spin(struct pv_ring *ring, void *messages, uint32_t max, int64_t spin_ns) { return 0; }
void pv_blkif_count(struct pv_blkif_counters *to, const struct pv_blkif_counters *more) { }

/*
 * Each slot is free, held, or in flight with a request of its own; or it is the last one and lends its pages to the first,
 * whose request is large then.
 */
static void make_front(void)
{
	int lent = nondet_any() & 1;

	front = (struct pv_blkfront){ .granter = &ours, .persistent = PERSISTENT, .shadow = shadow, .batch = batch,
				      .slots = slots, .free = free_slots, .held = held, .n_slots = SLOTS,
				      .first_gref = FIRST_GREF, .counters = &counters };
	for (uint32_t slot = 0; slot < SLOTS; slot++) {
		uint8_t n = (uint8_t)nondet_any(), operation = (uint8_t)nondet_any();
		int large = lent && slot == 0;

		assume(n <= FEW_SEGMENTS);
		assume(operation == PV_BLKIF_OP_READ || operation == PV_BLKIF_OP_WRITE ||
		       operation == PV_BLKIF_OP_WRITE_BARRIER || operation == PV_BLKIF_OP_FLUSH_DISKCACHE ||
		       operation == PV_BLKIF_OP_DISCARD);
		assume(!large || operation == PV_BLKIF_OP_READ || operation == PV_BLKIF_OP_WRITE);
		shadow[slot].operation = large ? PV_BLKIF_OP_INDIRECT : operation;
		shadow[slot].nr_segments = large ? operation : n;
		shadow[slot].id = slot;
		slots[slot] = (struct pv_blkfront_slot){ .n_pages = n,
							 .next = large ? SLOTS - 1 : PV_BLKFRONT_NONE };
		if (lent && slot == SLOTS - 1)
			continue;
		if (!large && nondet_any() & 1) {
			front.free[front.n_free++] = slot;
		} else if (nondet_any() & 1) {
			front.held[front.n_held++] = slot;
		} else {
			slots[slot].sequence = slot + 1;
			front.n_in_flight++;
		}
	}
}

static uint32_t chain(uint32_t slot)
{
	return 1u << slot | (slots[slot].next == PV_BLKFRONT_NONE ? 0 : 1u << slots[slot].next);
}

/* None is lost, and none is in two places. */
static void must_account_for_each_slot(void)
{
	uint32_t n_in_flight = 0, seen = 0;

	must(front.n_free <= SLOTS && front.n_held <= SLOTS);
	for (uint32_t i = 0; i < SLOTS; i++) {
		if (!slots[i].sequence)
			continue;
		n_in_flight++;
		must(!(seen & chain(i)));
		seen |= chain(i);
	}
	for (uint32_t i = 0; i < front.n_free; i++) {
		must(!(seen & 1u << front.free[i]));
		seen |= 1u << front.free[i];
	}
	for (uint32_t i = 0; i < front.n_held; i++) {
		must(!(seen & chain(front.held[i])));
		seen |= chain(front.held[i]);
	}
	must(n_in_flight == front.n_in_flight && seen == (1u << SLOTS) - 1);
}

void answers_only_what_was_asked(void)
{
	struct pv_blkif_response responses[RESPONSES];
	struct pv_blkfront_answer answers[RESPONSES];
	struct pv_grant_private any_granted[SLOTS * SLOT_PAGES];
	uint64_t before[SLOTS];
	uint32_t n;

	make_front();
	ours.granted = any_granted;
	for (uint32_t i = 0; i < RESPONSES; i++)
		responses[i] = (struct pv_blkif_response){ .id = nondet_any(), .operation = (uint8_t)nondet_any(),
							   .status = (int16_t)nondet_any() };
	for (uint32_t i = 0; i < SLOTS; i++)
		before[i] = slots[i].sequence;
	n = pv_blkfront_complete(&front, responses, RESPONSES, answers);
	must(n <= RESPONSES && (n < RESPONSES) == (front.violation != 0));
	for (uint32_t i = 0; i < n; i++) {
		must(answers[i].slot < SLOTS && answers[i].slot == responses[i].id);
		must(before[answers[i].slot] && !slots[answers[i].slot].sequence);
		must(responses[i].operation == operation_of(&shadow[answers[i].slot]));
		must(answers[i].status == responses[i].status && answers[i].status <= 0 && answers[i].status >= -2);
		for (uint32_t j = 0; j < i; j++)
			must(answers[j].slot != answers[i].slot);
	}
	if (n < RESPONSES)
		must(front.wrong.id == responses[n].id);
	must_account_for_each_slot();
}

/* No slot gets lost when a backend that keeps pages is followed by one that does not. */
void forgets_what_stayed_granted(void)
{
	struct pv_grant_private any_granted[SLOTS * SLOT_PAGES];

	make_front();
	ours.granted = any_granted;
	front.persistent = 1;
	pv_blkfront_persist(&front, 0);
	must_account_for_each_slot();
	must(front.persistent == 0);
}
