/* SPDX-License-Identifier: MIT */
/*
 * Fuzz target: ring, byte stream, flex ring, block requests, grants, event words and whoever looks at a statistics object,
 * against a peer that rewrites shared memory before any load of it. The input is a list of steps, each a byte and its
 * arguments, and of what the peer writes.
 *
 * What must hold: nothing outside the buffers is touched (sanitizers; buffers are malloc'ed to size); counts never pass what
 * was asked for, what fits or what is owed; a dead ring stays dead; what a grant was pinned with lies in the chunk and does
 * not change while it is pinned; what was copied from a statistics object is within its bounds.
 */
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fuzz_input.h"
#include "pv_blkif.h"
#include "pv_event.h"
#include "pv_flex.h"
#include "pv_grant.h"
#include "pv_look.h"
#include "pv_ring.h"
#include "pv_stream.h"

#define SHARED_BYTES 8192
#define ENTRY 12
#define RING_BYTES (PV_RING_HEADER_BYTES + 8 * ENTRY)
#define PAGES 2
#define BASE 8
#define SELF 3

/* -- ring */

static void fuzz_ring(void)
{
	uint32_t is_front = byte() & 1, entry = byte() & 1 ? ENTRY : 8, out = is_front ? entry : 8, in = is_front ? 8 : entry;
	uint8_t *messages;
	struct pv_ring ring;

	if (is_front ? pv_ring_create(&ring, shared, RING_BYTES, entry, entry, 8, NULL, number()) :
		       pv_ring_attach(&ring, shared, RING_BYTES, entry, entry, 8, NULL, 0))
		return;
	while (left) {
		uint32_t what = byte(), n = byte() % 20, outstanding = pv_ring_outstanding(&ring), room = pv_ring_room(&ring);
		uint32_t was_dead = ring.dead;
		uint64_t notified = ring.notified;
		int64_t done = 0;

		must(outstanding <= ring.size);
		messages = malloc((size_t)n * (what & 1 ? in : out) + 1);
		memset(messages, (int)n, (size_t)n * (what & 1 ? in : out));
		switch (what % 8) {
		case 0: case 2:
			done = pv_ring_push(&ring, messages, n);
			must(done < 0 || (done <= n && done <= room));
			must(ring.notified - notified <= 1 && (done > 0 || ring.notified == notified));
			must(done < 0 || is_front || (uint32_t)done == n);
			break;
		case 1: case 3: case 5:
			done = pv_ring_take(&ring, messages, n);
			must(done < 0 || (done <= n && done <= (is_front ? outstanding : ring.size - outstanding)));
			break;
		case 4: done = pv_ring_final_check(&ring); break;
		case 6: done = pv_ring_poll(&ring); break;
		default: done = pv_ring_unconsumed(&ring); must(done <= (int64_t)ring.size); break;
		}
		must(done >= 0 || done == -EPROTO || done == -EINVAL);
		must(!was_dead || (done == -EPROTO && ring.dead));
		free(messages);
	}
}

/* -- streams */

static void fuzz_stream(void)
{
	const struct pv_stream_layout layout = { .out = 64, .out_size = 16, .in = 96, .in_size = 32,
						 .out_cons = 0, .out_prod = 4, .in_cons = 8, .in_prod = 12 };
	struct pv_stream stream;

	for (int i = 0; i < 4; i++)
		((uint32_t *)(void *)shared)[i] = number();
	if (pv_stream_attach(&stream, shared, 128, &layout, NULL))
		return;
	while (left) {
		uint32_t what = byte(), n = byte() % 64, read = stream.read, written = stream.written;
		uint8_t *data = malloc(n + 1);
		int64_t done;

		memset(data, (int)n, n);
		done = what & 1 ? pv_stream_read(&stream, data, n) : pv_stream_write(&stream, data, n);
		must(done == -EPROTO || (done >= 0 && done <= n && done <= (what & 1 ? 32 : 16)));
		must(stream.read - read == (what & 1 && done > 0 ? (uint32_t)done : 0));
		must(stream.written - written == (!(what & 1) && done > 0 ? (uint32_t)done : 0));
		must(!stream.dead || done == -EPROTO);
		free(data);
	}
}

static void fuzz_flex(void)
{
	uint8_t *pages = shared + PV_PAGE_BYTES;
	struct pv_flex flex;

	if (byte() & 1) {
		must(pv_flex_create(&flex, shared, pages, 0, NULL, NULL, number()) == 0 || flex.stream.dead);
	} else {
		uint32_t refs[1];

		if (pv_flex_look(shared, 0, refs) || pv_flex_attach(&flex, shared, pages, 0, NULL))
			return;
	}
	while (left) {
		uint32_t what = byte(), n = byte() % 4 ? byte() : number() % 4096;
		uint8_t *data = malloc(n + 1);
		int64_t done;

		memset(data, 1, n);
		done = what % 3 == 0 ? pv_flex_read(&flex, data, n) : what % 3 == 1 ? pv_flex_write(&flex, data, n) :
									      pv_flex_peek(&flex, data, n);
		must(done == 0 || done == n || done == -EPROTO || done == -EMSGSIZE);
		free(data);
	}
}

/* -- grants */

static void check_pinned(struct pv_mapper *mapper, const struct pv_pinned *before, uint32_t index)
{
	if (!mapper->pins[index].readers && !mapper->pins[index].writers)
		return;
	must(mapper->pinned[index].frame - BASE < PAGES);
	if (before->flags)
		must(before->frame == mapper->pinned[index].frame && before->flags == mapper->pinned[index].flags);
}

static void fuzz_grants(void)
{
	struct pv_grant_entry *entries = (struct pv_grant_entry *)(void *)shared;
	struct pv_grant_private granted[PAGES] = { 0 };
	struct pv_pin pins[PAGES] = { 0 };
	struct pv_pinned pinned[PAGES] = { 0 };
	struct pv_granter granter = { .entries = entries, .granted = granted, .base = BASE, .n_pages = PAGES };
	uint8_t *data = malloc(PAGES * 4096), *local = malloc(64);
	struct pv_mapper mapper = { .entries = entries, .data = data, .pins = pins, .pinned = pinned, .base = BASE,
				    .n_pages = PAGES, .self = SELF, .read_only = byte() & 1 };

	memset(data, 0, PAGES * 4096);
	memset(local, 0, 64);
	while (left) {
		uint32_t what = byte(), gref = BASE - 1 + what / 16 % 4, read_only = what >> 6 & 1;
		struct pv_pinned before[PAGES];
		struct pv_grant_copy_op op;
		uint64_t offset;

		for (int i = 0; i < PAGES; i++)
			before[i] = pins[i].readers || pins[i].writers ? pinned[i] : (struct pv_pinned){ 0 };
		switch (what % 8) {
		case 0: pv_grant_access(&granter, gref, SELF + (what >> 7), BASE + byte() % 3, (int)read_only); break;
		case 1: pv_grant_revoke(&granter, gref); break;
		case 2: case 3:
			if (pv_grant_map(&mapper, gref, (int)read_only, &offset) == PV_GNTST_OKAY)
				must(offset % 4096 == 0 && offset < PAGES * 4096 && (read_only || !mapper.read_only));
			break;
		case 4: pv_grant_unmap(&mapper, gref, (int)read_only); break;
		case 5:
			op = (struct pv_grant_copy_op){ .gref = gref, .offset = (uint16_t)number(), .length = (uint16_t)number(),
							.local_offset = number() };
			pv_grant_copy(&mapper, &op, 1, local, 64, (int)!read_only);
			break;
		case 6: entries[what / 16 % PAGES] = (struct pv_grant_entry){ (uint16_t)number(), SELF, BASE + byte() % 3 }; break;
		default: pv_grant_in_use(&granter, gref); break;
		}
		for (uint32_t i = 0; i < PAGES; i++)
			check_pinned(&mapper, &before[i], i);
	}
	free(data);
	free(local);
}

/* -- event words */

static void fuzz_events(void)
{
	struct pv_inbox *inbox = (struct pv_inbox *)(void *)shared;
	struct pv_port port;

	pv_inbox_init(inbox);
	pv_port_init(&port, NULL, inbox, number());
	pv_port_set_peer(&port, inbox, number(), -1, 0);
	while (left) {
		uint32_t what = byte(), n = byte() % 8, *slots = malloc(n * sizeof *slots + 1);
		uint32_t taken;

		switch (what % 6) {
		case 0: must(pv_notify(&port) == PV_NOTIFY_SUPPRESSED); break;
		case 1:
			taken = pv_inbox_take(inbox, slots, n);
			must(taken <= n);
			while (taken--)
				must(slots[taken] < PV_INBOX_SLOTS);
			break;
		case 2: pv_port_mask(&port); break;
		case 3: pv_port_unmask(&port); break;
		case 4: pv_port_take_pending(&port); break;
		default: pv_inbox_has_event(inbox); pv_inbox_slot_has_event(inbox, number()); break;
		}
		free(slots);
	}
	must(port.busy == 0);
}

/* -- statistics objects, as Dom0 reads them */

static void lie_in_the_log(struct pv_look_head *head)
{
	uint8_t *log = shared + PV_LOOK_TAP_AT;
	struct pv_look_entry *entry = (struct pv_look_entry *)(void *)(log + head->tap_head % PV_LOOK_TAP_BYTES / 64 * 64);

	*entry = (struct pv_look_entry){ .position = head->tap_head + (byte() % 8 != 1), .record = byte() % 66, .n = number(),
					 .message_bytes = byte() & 1 ? number() : byte() * 64u };
	head->tap_tail = head->tap_head + (byte() % 8 == 1 ? number() : byte() * 8192u);
}

static void read_the_log(struct pv_look_head *head)
{
	struct pv_look_entry *entry = malloc(sizeof *entry);
	uint8_t *messages = malloc(PV_RING_MAX_BYTES);
	uint64_t n_bytes;
	int done = pv_look_tap_read(head, entry, messages);

	must(done == 0 || done == 1 || done == -EPROTO);
	if (done == 1) {
		n_bytes = (uint64_t)entry->n * entry->message_bytes;
		must(n_bytes > 0 && n_bytes <= PV_RING_MAX_BYTES && entry->record < PV_LOOK_RECORDS);
	}
	must(done == 0 || head->tap_head % 64 == 0);
	free(entry);
	free(messages);
}

static void copy_a_record(struct pv_look_head *head, uint32_t n)
{
	struct pv_look_record *copy = malloc(sizeof *copy);
	uint64_t at_least, at_most;

	if (pv_look_copy(head, n, copy)) {
		must(n < PV_LOOK_RECORDS && copy->number == n && copy->state == PV_LOOK_LIVE && copy->n_refs <= PV_LOOK_REFS);
		must(memchr(copy->kind, 0, PV_LOOK_NAME_BYTES) && memchr(copy->protocol, 0, PV_LOOK_NAME_BYTES));
		must(memchr(copy->request, 0, PV_LOOK_LAYOUT_BYTES) && memchr(copy->response, 0, PV_LOOK_LAYOUT_BYTES));
		for (int i = 0; i < 4; i++) {
			pv_look_age(copy, number(), number(), &at_least, &at_most);
			must(at_least <= at_most);
		}
	}
	free(copy);
}

static void fuzz_look(void)
{
	/* Too large to make anew each time; a step beyond it ends the program. */
	static uint8_t *object;
	struct pv_look_head *head;
	struct pv_look_record *record;

	if (!object) {
		object = mmap(NULL, PV_LOOK_BYTES + 2 * PV_PAGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		must(object != MAP_FAILED);
		object += PV_PAGE_BYTES;
		must(mprotect(object, PV_LOOK_BYTES, PROT_READ | PROT_WRITE) == 0);
	}
	free(shared);
	shared = object;
	shared_bytes = PV_LOOK_BYTES;
	head = (struct pv_look_head *)(void *)object;
	while (left) {
		uint32_t what = byte(), n = byte() % (PV_LOOK_RECORDS + 2);

		record = pv_look_at(head, n % PV_LOOK_RECORDS);
		switch (what % 8) {
		case 0: case 1: lie_in_the_log(head); break;
		case 2: case 3: read_the_log(head); break;
		case 4: head->tap_head = byte() % 4 == 1 ? number() : PV_LOOK_TAP_BYTES - 64u * n; break;
		case 5: pv_look_tap_open(head); must(head->tap_head % 64 == 0); break;
		case 6:
			record->state = byte() % 8 != 1;
			record->n_refs = byte();
			memset((uint8_t *)record + 64, byte(), sizeof *record - 64);
			record->stamps[n % PV_LOOK_STAMPS] = (struct pv_look_stamp){ number(), number(), number() };
			break;
		default: copy_a_record(head, n); break;
		}
	}
	/* All zeros again. */
	must(madvise(object, PV_LOOK_BYTES, MADV_DONTNEED) == 0);
	shared = NULL;
}

/* -- blkif */

#define REQUESTS 3
#define DISK_SECTORS 32

static void make_segments(struct pv_blkif_segment *segments, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		segments[i].gref = BASE + byte() % 3;
		segments[i].first_sect = byte() % 9;
		segments[i].last_sect = byte() % 9;
	}
}

static void make_request(struct pv_blkif_request *request)
{
	struct pv_blkif_indirect indirect = { .operation = byte() % 8, .indirect_op = (uint8_t)number(),
					      .nr_segments = (uint16_t)number(), .sector = number() };
	struct pv_blkif_discard discard = { .nr_sectors = number() };

	memset(request, 0, sizeof(*request));
	for (int i = 0; i < PV_BLKIF_INDIRECT_PAGES; i++)
		indirect.indirect_grefs[i] = BASE + byte() % 3;
	memcpy(request, &indirect, sizeof(indirect));
	if (indirect.operation == PV_BLKIF_OP_DISCARD)
		memcpy((uint8_t *)request + offsetof(struct pv_blkif_discard, nr_sectors), &discard.nr_sectors, 8);
	else if (indirect.operation != PV_BLKIF_OP_INDIRECT)
		make_segments(request->seg, PV_BLKIF_MAX_SEGMENTS);
}

static void check_plans(const struct pv_blkif_batch *batch)
{
	for (int i = 0; i < REQUESTS; i++) {
		const struct pv_blkif_plan *plan = &batch->plans[i];
		uint64_t bytes = 0;

		if (plan->status != PV_BLKIF_PENDING)
			continue;
		must(plan->offset <= DISK_SECTORS * 512 && plan->length <= DISK_SECTORS * 512 - plan->offset);
		must(plan->first + plan->n_extents <= batch->pool.capacity);
		for (uint32_t e = plan->first; e < plan->first + plan->n_extents; e++)
			bytes += batch->pool.extents[e].length;
		must(plan->operation == PV_BLKIF_OP_DISCARD || bytes == plan->length);
	}
}

static void fuzz_blkif(void)
{
	struct pv_grant_entry *entries = (struct pv_grant_entry *)(void *)shared;
	struct pv_pin pins[PAGES] = { 0 };
	struct pv_pinned pinned[PAGES] = { 0 };
	struct pv_blkif_request *requests = malloc(REQUESTS * sizeof(*requests));
	struct pv_blkif_plan plans[REQUESTS];
	struct pv_blkif_response responses[REQUESTS];
	uint8_t *data = malloc(PAGES * 4096), flags = byte();
	struct pv_mapper mapper = { .entries = entries, .data = data, .pins = pins, .pinned = pinned, .base = BASE,
				    .n_pages = PAGES, .self = SELF };
	struct pv_blkif_counters counters = { 0 };
	struct pv_blkif_grants grants;
	struct pv_blkif_batch batch = { .mapper = &mapper, .requests = requests, .plans = plans, .responses = responses,
					.kind = PV_BLKIF_DISK_MEMORY, .counters = &counters,
					.disk = calloc(DISK_SECTORS, 512), .disk_bytes = DISK_SECTORS * 512 };

	batch.limits = (struct pv_blkif_limits){ .sectors = DISK_SECTORS, .sector_size = flags & 1 ? 4096 : 512,
						 .max_indirect_segments = number(), .read_only = flags >> 1 & 1,
						 .flush = 1, .barrier = flags >> 2 & 1, .discard = flags >> 3 & 1,
						 .discard_secure = flags >> 4 & 1 };
	memset(data, 0, PAGES * 4096);
	must(pv_blkif_pool_init(&batch.pool, 2) == 0);
	must(pv_blkif_grants_init(&grants, &mapper, 1 + (flags >> 6 & 1), 0) == 0);
	batch.pool.grants = flags >> 5 & 1 ? &grants : NULL;
	while (left) {
		for (int i = 0; i < PAGES; i++)
			entries[i] = (struct pv_grant_entry){ (uint16_t)(1 | (byte() & 4)), SELF, BASE + byte() % PAGES };
		make_segments((struct pv_blkif_segment *)(void *)(data + 4096 * (byte() % PAGES)), 1 + byte() % 16);
		for (int i = 0; i < REQUESTS; i++)
			make_request(&requests[i]);
		pv_blkif_prepare(&mapper, &batch.limits, requests, REQUESTS, plans, &batch.pool);
		check_plans(&batch);
		pv_blkif_do_all(&batch, REQUESTS);
		pv_blkif_finish(&mapper, requests, plans, REQUESTS, &batch.pool, responses, &counters);
		for (int i = 0; i < REQUESTS; i++)
			must(responses[i].id == requests[i].id && responses[i].status <= 0 && responses[i].status >= -2);
		must(mapper.pinned_pages == grants.cached && grants.in_use == 0);
	}
	pv_blkif_grants_free(&grants);
	must(mapper.pinned_pages == 0);
	pv_blkif_pool_free(&batch.pool);
	free(batch.disk);
	free(requests);
	free(data);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	static void (*const targets[])(void) = { fuzz_ring, fuzz_stream, fuzz_flex, fuzz_grants, fuzz_events,
					       fuzz_look, fuzz_blkif };

	begin(data, n, SHARED_BYTES);
	targets[byte() % (sizeof targets / sizeof *targets)]();
	free(shared);
	return 0;
}
