/* SPDX-License-Identifier: MIT */
/* Dom0's side of a statistics object. The process that owns it may write anything at any time. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>

#include "pv_atomic.h"
#include "pv_look.h"

#define OCTAVE_FIRST 6

/* Word by word: a counter is of one moment, however the compiler would like to copy it. */
static void copy_words(const struct pv_look_record *record, struct pv_look_record *copy)
{
	const uint64_t *from = (const void *)record;
	uint64_t *to = (void *)copy;

	for (size_t i = 0; i < sizeof *copy / sizeof *to; i++)
		to[i] = pv_load_relaxed(&from[i]);
}

int pv_look_copy(const struct pv_look_head *head, uint32_t number, struct pv_look_record *copy)
{
	const struct pv_look_record *record;
	uint32_t generation;

	if (number >= PV_LOOK_RECORDS)
		return 0;
	record = (const void *)((const uint8_t *)head + PV_PAGE_BYTES + (size_t)number * PV_LOOK_RECORD_BYTES);
	generation = pv_load_acquire(&record->generation);
	/* Acquire: its label. */
	if (pv_load_acquire(&record->state) != PV_LOOK_LIVE)
		return 0;
	copy_words(record, copy);
	/* The copy comes before the second look. */
	pv_fence_full();
	if (pv_load_relaxed(&record->state) != PV_LOOK_LIVE || pv_load_relaxed(&record->generation) != generation)
		return 0;
	copy->state = PV_LOOK_LIVE;
	copy->generation = generation;
	copy->number = number;
	if (copy->n_refs > PV_LOOK_REFS)
		copy->n_refs = PV_LOOK_REFS;
	copy->kind[PV_LOOK_NAME_BYTES - 1] = copy->protocol[PV_LOOK_NAME_BYTES - 1] = 0;
	copy->request[PV_LOOK_LAYOUT_BYTES - 1] = copy->response[PV_LOOK_LAYOUT_BYTES - 1] = 0;
	return 1;
}

void pv_look_want(struct pv_look_head *head, uint32_t number, uint32_t what, uint64_t until_ns)
{
	struct pv_look_wanted *wanted = &head->wanted[number % PV_LOOK_RECORDS];

	if (what & PV_LOOK_LATENCY && pv_load_relaxed(&wanted->latency_until_ns) < until_ns)
		pv_store_relaxed(&wanted->latency_until_ns, until_ns);
	if (what & PV_LOOK_TAP && pv_load_relaxed(&wanted->tap_until_ns) < until_ns)
		pv_store_relaxed(&wanted->tap_until_ns, until_ns);
}

uint64_t pv_look_bucket_ns(uint32_t bucket)
{
	if (bucket == 0)
		return 0;
	return (uint64_t)(4 + bucket % 4) << (bucket / 4 + OCTAVE_FIRST - 2);
}

static uint64_t age_at(uint64_t now_ns, uint64_t ns)
{
	return now_ns > ns ? now_ns - ns : 0;
}

int pv_look_age(const struct pv_look_record *copy, uint32_t index, uint64_t now_ns, uint64_t *at_least_ns,
		uint64_t *at_most_ns)
{
	uint32_t before = UINT32_MAX, after = UINT32_MAX;

	*at_least_ns = 0;
	*at_most_ns = UINT64_MAX;
	for (uint32_t i = 0; i < PV_LOOK_STAMPS; i++) {
		const struct pv_look_stamp *stamp = &copy->stamps[i];
		uint32_t back = index - stamp->index, on = stamp->index - index;

		if (stamp->ns == 0)
			continue;
		if ((int32_t)back >= 0 && back < before) {
			before = back;
			*at_most_ns = age_at(now_ns, stamp->ns);
		}
		if ((int32_t)on >= 0 && on < after) {
			after = on;
			*at_least_ns = age_at(now_ns, stamp->ns);
		}
	}
	/* Only an owner that lies has them the other way round. */
	if (*at_least_ns > *at_most_ns)
		*at_least_ns = *at_most_ns;
	return before != UINT32_MAX || after != UINT32_MAX;
}

/* The tap. */

void pv_look_tap_open(struct pv_look_head *head)
{
	pv_store_release(&head->tap_head, pv_load_acquire(&head->tap_tail) & ~(uint64_t)63);
}

static int tap_skip(struct pv_look_head *head)
{
	pv_look_tap_open(head);
	return -EPROTO;
}

int pv_look_tap_read(struct pv_look_head *head, struct pv_look_entry *entry, void *messages)
{
	const uint8_t *log = (const uint8_t *)head + PV_LOOK_TAP_AT;
	uint64_t position = pv_load_relaxed(&head->tap_head), n_bytes, total;
	uint64_t there = pv_load_acquire(&head->tap_tail) - position;
	uint32_t at = (uint32_t)(position % PV_LOOK_TAP_BYTES), till_end;
	const struct pv_look_entry *found = (const struct pv_look_entry *)(log + at);

	if (there == 0)
		return 0;
	if (there > PV_LOOK_TAP_BYTES || there % 64 || position % 64)
		return tap_skip(head);
	/* Acquire: the entry is whole. */
	if (pv_load_acquire(&found->position) != position + 1)
		return 0;
	memcpy(entry, found, sizeof *entry);
	/* From here on only the copy is looked at. */
	pv_fence_compiler();
	n_bytes = (uint64_t)entry->n * entry->message_bytes;
	total = sizeof *entry + ((n_bytes + 63) & ~(uint64_t)63);
	if (n_bytes == 0 || n_bytes > PV_RING_MAX_BYTES || total > there || entry->record >= PV_LOOK_RECORDS)
		return tap_skip(head);
	at = (at + (uint32_t)sizeof *entry) % PV_LOOK_TAP_BYTES;
	till_end = PV_LOOK_TAP_BYTES - at;
	if (n_bytes <= till_end) {
		memcpy(messages, log + at, n_bytes);
	} else {
		memcpy(messages, log + at, till_end);
		memcpy((uint8_t *)messages + till_end, log, n_bytes - till_end);
	}
	/* Release: it is copied. Pairs with tap_reserve. */
	pv_store_release(&head->tap_head, position + total);
	return 1;
}

int pv_look_tap_free(int fd)
{
	return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, PV_LOOK_TAP_AT, PV_LOOK_TAP_BYTES) ? -errno : 0;
}
