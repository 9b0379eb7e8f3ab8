/* SPDX-License-Identifier: MIT */
/* The process's side: what an observed end writes of each batch. */
#define _GNU_SOURCE
#include "pv_look.h"

#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "pv_atomic.h"

_Static_assert(sizeof(struct pv_look_record) <= PV_LOOK_RECORD_BYTES, "a page");
_Static_assert(sizeof(struct pv_look_record) % sizeof(uint64_t) == 0, "whole words");
_Static_assert(sizeof(struct pv_look_head) <= PV_PAGE_BYTES, "a page");
_Static_assert(PV_LOOK_TAP_AT == PV_PAGE_BYTES + PV_LOOK_RECORDS * PV_LOOK_RECORD_BYTES, "records, then the log");
_Static_assert(PV_LOOK_BYTES == PV_LOOK_TAP_AT + PV_LOOK_TAP_BYTES, "nothing after the log");
_Static_assert(sizeof(struct pv_look_entry) == 64, "entries stand at multiples of their head");

#define OCTAVE_FIRST 6  /* 64 ns */

struct pv_look_head *pv_look_map(int fd, int as_dom0)
{
	int all = as_dom0 ? PROT_READ : PROT_READ | PROT_WRITE;
	void *head = mmap(NULL, PV_LOOK_BYTES, all, MAP_SHARED, fd, 0);

	if (head == MAP_FAILED)
		return NULL;
	if (as_dom0 &&
	    mmap(head, PV_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) {
		pv_look_unmap(head);
		return NULL;
	}
	return head;
}

void pv_look_unmap(struct pv_look_head *head)
{
	munmap(head, PV_LOOK_BYTES);
}

void pv_look_init(struct pv_look_head *head)
{
	head->magic = PV_LOOK_MAGIC;
	head->version = PV_LOOK_VERSION;
}

struct pv_look_record *pv_look_at(struct pv_look_head *head, uint32_t number)
{
	return (struct pv_look_record *)((uint8_t *)head + PV_PAGE_BYTES + (size_t)number * PV_LOOK_RECORD_BYTES);
}

static struct pv_look_head *head_of(struct pv_look_record *record)
{
	return (struct pv_look_head *)((uint8_t *)record - PV_PAGE_BYTES - (size_t)record->number * PV_LOOK_RECORD_BYTES);
}

static struct pv_look_record *record_of(struct pv_ring *ring)
{
	return (struct pv_look_record *)((uint8_t *)ring - offsetof(struct pv_look_record, ring));
}

/* The time of the last tick: a third of the price. */
static uint64_t coarse_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* Whether Dom0 wants it still; a wish that ran out is taken back, so that it costs no clock any more. */
static inline int is_wanted(uint64_t *until_ns)
{
	uint64_t until = pv_load_relaxed(until_ns);

	if (until == 0)
		return 0;
	if (coarse_ns() < until)
		return 1;
	pv_store_relaxed(until_ns, 0);
	return 0;
}

/* Latency. */

static uint32_t bucket_of(uint64_t ns)
{
	uint32_t octave, bucket;

	if (ns < (uint64_t)1 << OCTAVE_FIRST)
		return 0;
	octave = 63 - (uint32_t)__builtin_clzll(ns);
	bucket = (octave - OCTAVE_FIRST) * 4 + ((uint32_t)(ns >> (octave - 2)) & 3);
	return bucket < PV_LOOK_BUCKETS ? bucket : PV_LOOK_BUCKETS - 1;
}

/* n messages from `index` on go on their way, `before` were on it. */
static void stamp(struct pv_look_record *record, uint32_t index, uint32_t n, uint32_t before, int measure_all)
{
	uint32_t next = record->stamp_next, since = index - record->stamped, every = record->ring.size / 8;
	int measure = measure_all || (int32_t)(index + n - record->sample_at) > 0;
	struct pv_look_stamp *stamp = &record->stamps[next % PV_LOOK_STAMPS];

	if (!measure && before && since < every)
		return;
	/* Acquire: whoever settled this stamp is done with it. */
	if (next - pv_load_acquire(&record->stamp_first) >= PV_LOOK_STAMPS)
		return;
	stamp->ns = measure ? (uint64_t)pv_now_ns() : coarse_ns();
	stamp->index = index;
	stamp->n = measure_all ? n : (uint32_t)measure;
	record->stamped = index;
	if (measure)
		record->sample_at = index + n + PV_LOOK_SAMPLE;
	pv_store_release(&record->stamp_next, next + 1);
}

/* Every message before `end` has arrived. */
static void settle(struct pv_look_record *record, uint32_t end)
{
	/* Acquire: stamps that another thread has written. */
	uint32_t first = record->stamp_first, next = pv_load_acquire(&record->stamp_next);
	uint64_t now_ns = 0;

	for (; first != next; first++) {
		struct pv_look_stamp *stamp = &record->stamps[first % PV_LOOK_STAMPS];
		uint32_t arrived = end - stamp->index;

		if ((int32_t)arrived <= 0)
			break;
		if (stamp->n) {
			uint32_t n = arrived < stamp->n ? arrived : stamp->n;

			if (now_ns == 0)
				now_ns = (uint64_t)pv_now_ns();
			record->latency[bucket_of(now_ns - stamp->ns)] += n;
			stamp->n -= n;
			stamp->index += n;
			if (stamp->n)
				break;
		}
	}
	/* Release: the place may be written again. */
	pv_store_release(&record->stamp_first, first);
}

/* The tap: room is given out by a compare-exchange, and an entry counts once its position stands in it. */

static uint32_t entry_bytes(uint32_t n_bytes)
{
	return (uint32_t)sizeof(struct pv_look_entry) + ((n_bytes + 63) & ~(uint32_t)63);
}

/* Room for so much: where; UINT64_MAX: there is none. */
static uint64_t tap_reserve(struct pv_look_head *head, uint32_t n_bytes)
{
	uint64_t tail = pv_load_relaxed(&head->tap_tail), used;

	do {
		/* Acquire: the reader has copied what stood there. */
		used = tail - pv_load_acquire(&head->tap_head);
		if (used > PV_LOOK_TAP_BYTES || n_bytes > PV_LOOK_TAP_BYTES - used)
			return UINT64_MAX;
	} while (!pv_compare_exchange(&head->tap_tail, &tail, tail + n_bytes));
	return tail;
}

static void tap_copy(uint8_t *log, uint64_t position, const uint8_t *from, uint32_t n_bytes)
{
	uint32_t at = (uint32_t)(position % PV_LOOK_TAP_BYTES), till_end = PV_LOOK_TAP_BYTES - at;

	if (n_bytes <= till_end) {
		memcpy(log + at, from, n_bytes);
	} else {
		memcpy(log + at, from, till_end);
		memcpy(log, from + till_end, n_bytes - till_end);
	}
}

/* n messages, `step` bytes from one to the next in a ring of `size` from slot `slot` on. */
static void tap(struct pv_look_record *record, const uint8_t *messages, uint32_t step, uint32_t size, uint32_t slot,
		uint32_t index, uint32_t n, uint32_t message_bytes, uint32_t taken)
{
	struct pv_look_head *head = head_of(record);
	uint8_t *log = (uint8_t *)head + PV_LOOK_TAP_AT;
	uint64_t position = tap_reserve(head, entry_bytes(n * message_bytes)), at = position + sizeof(struct pv_look_entry);
	struct pv_look_entry *entry = (struct pv_look_entry *)(log + position % PV_LOOK_TAP_BYTES);

	if (position == UINT64_MAX) {
		pv_add(&head->tap_lost, n);
		return;
	}
	entry->ns = (uint64_t)pv_now_ns();
	entry->record = record->number;
	entry->generation = record->generation;
	entry->index = index;
	entry->n = n;
	entry->message_bytes = message_bytes;
	entry->taken = taken;
	for (uint32_t i = 0; i < n; i++, at += message_bytes)
		tap_copy(log, at, messages + (size_t)((slot + i) & (size - 1)) * step, message_bytes);
	/* Release: the entry is whole. Pairs with pv_look_tap_read. */
	pv_store_release(&entry->position, position + 1);
}

/* What the ring calls. */

static void pushing(struct pv_ring *ring, uint32_t n)
{
	struct pv_look_record *record = record_of(ring);
	struct pv_look_wanted *wanted = &head_of(record)->wanted[record->number];

	if (ring->is_front)
		stamp(record, ring->prod, n, ring->prod - pv_load_relaxed(&ring->cons), is_wanted(&wanted->latency_until_ns));
	else
		settle(record, ring->prod + n);
	if (is_wanted(&wanted->tap_until_ns))
		tap(record, ring->entries, ring->entry_bytes, ring->size, ring->prod & (ring->size - 1), ring->prod, n,
		    ring->out_bytes, 0);
}

static void taking(struct pv_ring *ring, const void *messages, uint32_t n)
{
	struct pv_look_record *record = record_of(ring);
	struct pv_look_wanted *wanted = &head_of(record)->wanted[record->number];

	if (ring->is_front)
		settle(record, ring->cons + n);
	else
		stamp(record, ring->cons, n, ring->cons - pv_load_relaxed(&ring->prod), is_wanted(&wanted->latency_until_ns));
	if (is_wanted(&wanted->tap_until_ns))
		tap(record, messages, ring->in_bytes, PV_RING_MAX_BYTES, 0, ring->cons, n, ring->in_bytes, 1);
}

static const struct pv_ring_observer observer = { pushing, taking };

void pv_look_begin(struct pv_look_record *record, uint32_t number)
{
	uint32_t index = record->ring.is_front ? record->ring.prod : record->ring.cons;

	record->number = number;
	record->created_ns = (uint64_t)pv_now_ns();
	record->stamp_first = record->stamp_next = 0;
	record->stamped = record->sample_at = index;
	memset(record->stamps, 0, sizeof record->stamps);
	memset(record->latency, 0, sizeof record->latency);
	record->counts = PV_LOOK_COUNTS_NOTHING;
	memset(record->counters, 0, sizeof record->counters);
	record->ring.observer = &observer;
	/* Release: a reader that finds it live finds the label. */
	pv_store_release(&record->state, PV_LOOK_LIVE);
}

uint64_t *pv_look_counters(struct pv_ring *ring, uint32_t counts)
{
	struct pv_look_record *record = record_of(ring);

	if (ring->observer != &observer)
		return NULL;
	/* What is looked at before the first batch is zeros, whatever it is called. */
	pv_store_relaxed(&record->counts, counts);
	return record->counters;
}

void pv_look_end(struct pv_look_record *record)
{
	/* The generation last: a copy that began before is told from one of the next owner. */
	pv_store_release(&record->state, PV_LOOK_FREE);
	pv_store_release(&record->generation, record->generation + 1);
}
