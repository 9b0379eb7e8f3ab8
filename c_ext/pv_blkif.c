/* SPDX-License-Identifier: MIT */
#include "pv_blkif.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "pv_atomic.h"

#define SECTOR_SHIFT 9
#define PAGE_SECTORS 8
#define X86_32_BYTES 108
#define X86_32_HEAD 4        /* bytes before the id, which has a gap before it in the other ABI */

/* The segments of a request, in the pool, and how many sectors they are. */
struct asked {
	const struct pv_blkif_segment *segments;
	uint32_t n;
	uint64_t sectors;
};

int pv_blkif_pool_init(struct pv_blkif_pool *pool, uint32_t segments)
{
	pool->used = 0;
	pool->capacity = segments;
	pool->grants = NULL;
	pool->extents = calloc(segments, sizeof(*pool->extents));
	pool->segments = calloc(segments, sizeof(*pool->segments));
	if (pool->extents && pool->segments)
		return 0;
	pv_blkif_pool_free(pool);
	return -ENOMEM;
}

void pv_blkif_pool_free(struct pv_blkif_pool *pool)
{
	free(pool->extents);
	free(pool->segments);
	memset(pool, 0, sizeof(*pool));
}

/* Room for n more. 0 or -ENOMEM. */
static int reserve(struct pv_blkif_pool *pool, uint32_t n)
{
	uint32_t wanted = pool->used + n;
	struct pv_blkif_extent *extents;
	struct pv_blkif_segment *segments;

	if (wanted <= pool->capacity)
		return 0;
	if (wanted < 2 * pool->capacity)
		wanted = 2 * pool->capacity;
	extents = realloc(pool->extents, wanted * sizeof(*extents));
	if (!extents)
		return -ENOMEM;
	pool->extents = extents;
	segments = realloc(pool->segments, wanted * sizeof(*segments));
	if (!segments)
		return -ENOMEM;
	pool->segments = segments;
	pool->capacity = wanted;
	return 0;
}

void pv_blkif_from_x86_32(const uint8_t *wire, struct pv_blkif_request *requests, uint32_t n)
{
	/* Whatever the operation: what comes after the gap is the same, four bytes earlier. */
	for (uint32_t i = 0; i < n; i++, wire += X86_32_BYTES) {
		uint8_t *request = (uint8_t *)&requests[i];

		memcpy(request, wire, X86_32_HEAD);
		memset(request + X86_32_HEAD, 0, 4);
		memcpy(request + X86_32_HEAD + 4, wire + X86_32_HEAD, X86_32_BYTES - X86_32_HEAD);
	}
}

/* Always 0, for `return refuse(...)` of those that say whether a request may go on. */
static int refuse(struct pv_blkif_plan *plan, int16_t status, uint16_t reason)
{
	plan->status = status;
	plan->reason = reason;
	plan->n_extents = 0;
	return 0;
}

static int is_write(uint32_t operation)
{
	return operation == PV_BLKIF_OP_WRITE || operation == PV_BLKIF_OP_WRITE_BARRIER;
}

/* Whether the disk has it. */
static int check_operation(const struct pv_blkif_limits *limits, struct pv_blkif_plan *plan)
{
	uint8_t offered;

	switch (plan->operation) {
	case PV_BLKIF_OP_READ:
	case PV_BLKIF_OP_WRITE:
		offered = 1;
		break;
	case PV_BLKIF_OP_WRITE_BARRIER:
		offered = limits->barrier;
		break;
	case PV_BLKIF_OP_FLUSH_DISKCACHE:
		offered = limits->flush;
		break;
	case PV_BLKIF_OP_DISCARD:
		offered = limits->discard && (!plan->secure || limits->discard_secure);
		break;
	default:
		offered = 0;
	}
	if (!offered)
		return refuse(plan, PV_BLKIF_RSP_EOPNOTSUPP, PV_BLKIF_REFUSED_OPERATION);
	if (limits->read_only && (is_write(plan->operation) || plan->operation == PV_BLKIF_OP_DISCARD))
		return refuse(plan, PV_BLKIF_RSP_ERROR, PV_BLKIF_REFUSED_READ_ONLY);
	return 1;
}

/* Where on the disk. */
static int check_place(const struct pv_blkif_limits *limits, uint64_t sector, uint64_t sectors, struct pv_blkif_plan *plan)
{
	/* Not `sector + sectors > limit`: that sum can wrap. */
	if (sector > limits->sectors || sectors > limits->sectors - sector)
		return refuse(plan, PV_BLKIF_RSP_ERROR, PV_BLKIF_REFUSED_RANGE);
	if ((sector | sectors) % (limits->sector_size >> SECTOR_SHIFT))
		return refuse(plan, PV_BLKIF_RSP_ERROR, PV_BLKIF_REFUSED_ALIGNMENT);
	plan->offset = sector << SECTOR_SHIFT;
	plan->length = sectors << SECTOR_SHIFT;
	return 1;
}

/* Map the page of a segment that is private to us, or find it mapped. Whether it is. */
static int hold(struct pv_mapper *mapper, const struct pv_blkif_pool *pool, struct pv_blkif_segment *segment, int read_only,
		uint64_t *offset, struct pv_blkif_plan *plan)
{
	uint16_t reason = PV_BLKIF_REFUSED_NOTHING;

	segment->pad = 0;
	if (pool->grants)
		reason = pv_blkif_grants_take(pool->grants, segment->gref, read_only, offset, &segment->pad);
	else if (pv_grant_map_next(mapper, segment->gref, read_only, offset) != PV_GNTST_OKAY)
		reason = PV_BLKIF_REFUSED_GRANT;
	return reason ? refuse(plan, PV_BLKIF_RSP_ERROR, reason) : 1;
}

static void let_go(struct pv_mapper *mapper, const struct pv_blkif_pool *pool, const struct pv_blkif_segment *segment,
		   int read_only)
{
	if (pool->grants)
		pv_blkif_grants_give(pool->grants, segment->gref, read_only, segment->pad);
	else
		pv_grant_unmap_next(mapper, segment->gref, read_only);
}

/* Around pages that are held or let go; grants that stay are locked one at a time, since few of them are mapped. */
static void begin(struct pv_mapper *mapper, const struct pv_blkif_pool *pool)
{
	if (!pool->grants)
		pv_grant_begin(mapper);
}

static void end(struct pv_mapper *mapper, const struct pv_blkif_pool *pool)
{
	if (!pool->grants)
		pv_grant_end(mapper);
}

/* Copy the segments of an indirect request into the pool. The pages are the guest's, who may be writing them. */
static int fetch(struct pv_mapper *mapper, const struct pv_blkif_indirect *indirect, struct pv_blkif_plan *plan,
		 struct pv_blkif_pool *pool)
{
	uint32_t left = indirect->nr_segments;
	struct pv_blkif_segment *to = pool->segments + plan->first;
	int held;

	for (uint32_t i = 0; left > 0; i++) {
		uint32_t n = left < PV_BLKIF_INDIRECT_PAGE_SEGMENTS ? left : PV_BLKIF_INDIRECT_PAGE_SEGMENTS;
		struct pv_blkif_segment with_segments = { .gref = indirect->indirect_grefs[i] };
		uint64_t page;

		begin(mapper, pool);
		held = hold(mapper, pool, &with_segments, 1, &page, plan);
		if (held) {
			memcpy(to, mapper->data + page, n * sizeof(*to));
			/* From here on the copy counts: the compiler must not go back to the page. */
			pv_fence_compiler();
			let_go(mapper, pool, &with_segments, 1);
		}
		end(mapper, pool);
		if (!held)
			return 0;
		to += n;
		left -= n;
	}
	return 1;
}

/* How many segments a request has. */
static int count_segments(const struct pv_blkif_limits *limits, const struct pv_blkif_request *request,
			  const struct pv_blkif_indirect *indirect, struct pv_blkif_plan *plan, uint32_t *n)
{
	uint32_t most = PV_BLKIF_MAX_SEGMENTS;

	*n = request->nr_segments;
	if (request->operation == PV_BLKIF_OP_INDIRECT) {
		*n = indirect->nr_segments;
		most = limits->max_indirect_segments < PV_BLKIF_MAX_INDIRECT_SEGMENTS ? limits->max_indirect_segments :
											PV_BLKIF_MAX_INDIRECT_SEGMENTS;
	}
	/* Old frontends flush by an empty barrier. */
	if ((*n == 0 && plan->operation != PV_BLKIF_OP_WRITE_BARRIER) || *n > most)
		return refuse(plan, PV_BLKIF_RSP_ERROR, PV_BLKIF_REFUSED_SEGMENTS);
	return 1;
}

/* The segments of a request of either kind, in the pool. */
static int take_segments(struct pv_mapper *mapper, const struct pv_blkif_limits *limits,
			 const struct pv_blkif_request *request, struct pv_blkif_plan *plan, struct pv_blkif_pool *pool,
			 struct asked *asked)
{
	struct pv_blkif_indirect indirect;

	memcpy(&indirect, request, sizeof(indirect));
	if (!count_segments(limits, request, &indirect, plan, &asked->n))
		return 0;
	if (reserve(pool, asked->n))
		return refuse(plan, PV_BLKIF_RSP_ERROR, PV_BLKIF_REFUSED_MEMORY);
	asked->segments = pool->segments + plan->first;
	if (request->operation == PV_BLKIF_OP_INDIRECT)
		return fetch(mapper, &indirect, plan, pool);
	memcpy(pool->segments + plan->first, request->seg, asked->n * sizeof(*request->seg));
	return 1;
}

/* The bounds of all segments, and how many sectors they are. */
static int check_segments(const struct pv_blkif_limits *limits, struct asked *asked, struct pv_blkif_plan *plan)
{
	uint32_t unit = limits->sector_size >> SECTOR_SHIFT;

	asked->sectors = 0;
	for (uint32_t i = 0; i < asked->n; i++) {
		const struct pv_blkif_segment *segment = &asked->segments[i];
		uint32_t sectors = segment->last_sect - segment->first_sect + 1;

		if (segment->first_sect > segment->last_sect || segment->last_sect >= PAGE_SECTORS)
			return refuse(plan, PV_BLKIF_RSP_ERROR, PV_BLKIF_REFUSED_BOUNDS);
		if (sectors % unit)
			return refuse(plan, PV_BLKIF_RSP_ERROR, PV_BLKIF_REFUSED_ALIGNMENT);
		asked->sectors += sectors;
	}
	return 1;
}

static void unpin(struct pv_mapper *mapper, const struct pv_blkif_pool *pool, struct pv_blkif_plan *plan)
{
	/* The backend writes the pages of a read and reads those of a write. */
	for (uint32_t i = 0; i < plan->pinned; i++)
		let_go(mapper, pool, &pool->segments[plan->first + i], is_write(plan->operation));
	plan->pinned = 0;
}

/* Map all pages of a request, those side by side as one extent. Whether it is still pending. */
static int pin(struct pv_mapper *mapper, struct pv_blkif_plan *plan, const struct pv_blkif_pool *pool)
{
	struct pv_blkif_extent *extents = pool->extents + plan->first, *last = NULL;
	int read_only = is_write(plan->operation);

	for (; plan->pinned < plan->n_segments; plan->pinned++) {
		struct pv_blkif_segment *segment = &pool->segments[plan->first + plan->pinned];
		uint64_t length = (uint64_t)(segment->last_sect - segment->first_sect + 1) << SECTOR_SHIFT;
		uint64_t offset;

		if (!hold(mapper, pool, segment, read_only, &offset, plan)) {
			unpin(mapper, pool, plan);
			return 0;
		}
		offset += (uint64_t)segment->first_sect << SECTOR_SHIFT;
		if (last && last->offset + last->length == offset) {
			last->length += length;
			continue;
		}
		last = &extents[plan->n_extents++];
		last->offset = offset;
		last->length = length;
	}
	return 1;
}

/* Map the pages of all that are pending; how many still are. */
static uint32_t pin_all(struct pv_mapper *mapper, struct pv_blkif_plan *plans, uint32_t n, const struct pv_blkif_pool *pool)
{
	uint32_t pending = 0;

	if (!pool->grants)
		for (uint32_t i = 0; i < pool->used; i++)
			pv_grant_expect(mapper, pool->segments[i].gref);
	begin(mapper, pool);
	for (uint32_t i = 0; i < n; i++)
		pending += plans[i].status == PV_BLKIF_PENDING && pin(mapper, &plans[i], pool);
	end(mapper, pool);
	return pending;
}

/* What one request asks, all but its pages. Whether it may. */
static int check(struct pv_mapper *mapper, const struct pv_blkif_limits *limits, const struct pv_blkif_request *request,
		 struct pv_blkif_plan *plan, struct pv_blkif_pool *pool)
{
	struct asked asked;

	memset(plan, 0, sizeof(*plan));
	plan->status = PV_BLKIF_PENDING;
	plan->first = pool->used;
	plan->operation = request->operation;
	if (request->operation == PV_BLKIF_OP_INDIRECT && limits->max_indirect_segments) {
		/* The second byte is nr_segments, flag or indirect_op. */
		plan->operation = request->nr_segments;
		if (plan->operation != PV_BLKIF_OP_READ && plan->operation != PV_BLKIF_OP_WRITE)
			return refuse(plan, PV_BLKIF_RSP_ERROR, PV_BLKIF_REFUSED_INDIRECT);
	} else if (request->operation == PV_BLKIF_OP_DISCARD) {
		plan->secure = request->nr_segments & PV_BLKIF_DISCARD_SECURE;
	}
	if (!check_operation(limits, plan))
		return 0;
	/* A flush carries no data; segments of one are ignored as Linux and QEMU do. */
	if (plan->operation == PV_BLKIF_OP_FLUSH_DISKCACHE)
		return 1;
	if (plan->operation == PV_BLKIF_OP_DISCARD) {
		struct pv_blkif_discard discard;

		memcpy(&discard, request, sizeof(discard));
		if (discard.nr_sectors == 0)
			return refuse(plan, PV_BLKIF_RSP_ERROR, PV_BLKIF_REFUSED_RANGE);
		return check_place(limits, discard.sector, discard.nr_sectors, plan);
	}
	if (!take_segments(mapper, limits, request, plan, pool, &asked))
		return 0;
	/* An empty barrier is nowhere on the disk. */
	if (asked.n == 0)
		return 1;
	if (!check_segments(limits, &asked, plan) || !check_place(limits, request->sector, asked.sectors, plan))
		return 0;
	plan->n_segments = asked.n;
	pool->used += asked.n;
	return 1;
}

uint32_t pv_blkif_prepare(struct pv_mapper *mapper, const struct pv_blkif_limits *limits,
			  const struct pv_blkif_request *requests, uint32_t n, struct pv_blkif_plan *plans,
			  struct pv_blkif_pool *pool)
{
	pool->used = 0;
	if (pool->grants)
		pv_blkif_grants_tick(pool->grants);
	for (uint32_t i = 0; i < n; i++)
		check(mapper, limits, &requests[i], &plans[i], pool);
	return pin_all(mapper, plans, n, pool);
}

void pv_blkif_count(struct pv_blkif_counters *counters, const struct pv_blkif_counters *more)
{
	const uint64_t *from = (const void *)more;
	uint64_t *to = (void *)counters;

	for (uint32_t i = 0; i < sizeof(*more) / sizeof(*from); i++)
		pv_store_relaxed(&to[i], to[i] + from[i]);
}

static void count(struct pv_blkif_counters *counters, const struct pv_blkif_plan *plan)
{
	int okay = plan->status == PV_BLKIF_RSP_OKAY;

	if (plan->reason != PV_BLKIF_REFUSED_NOTHING) {
		counters->refused++;
		counters->no_memory += plan->reason == PV_BLKIF_REFUSED_MEMORY;
		return;
	}
	counters->errors += !okay;
	switch (plan->operation) {
	case PV_BLKIF_OP_READ:
		counters->reads++;
		counters->read_bytes += okay ? plan->length : 0;
		break;
	case PV_BLKIF_OP_WRITE_BARRIER:
		counters->barriers++;
		/* fallthrough */
	case PV_BLKIF_OP_WRITE:
		counters->writes++;
		counters->written_bytes += okay ? plan->length : 0;
		break;
	case PV_BLKIF_OP_DISCARD:
		counters->discards++;
		counters->discarded_bytes += okay ? plan->length : 0;
		break;
	default:
		counters->flushes++;
	}
}

void pv_blkif_finish(struct pv_mapper *mapper, const struct pv_blkif_request *requests, struct pv_blkif_plan *plans,
		     uint32_t n, const struct pv_blkif_pool *pool, struct pv_blkif_response *responses,
		     struct pv_blkif_counters *counters)
{
	struct pv_blkif_counters done = { 0 };

	begin(mapper, pool);
	for (uint32_t i = 0; i < n; i++)
		unpin(mapper, pool, &plans[i]);
	end(mapper, pool);
	for (uint32_t i = 0; i < n; i++) {
		if (plans[i].status == PV_BLKIF_PENDING)
			plans[i].status = PV_BLKIF_RSP_ERROR;
		count(&done, &plans[i]);
		memset(&responses[i], 0, sizeof(responses[i]));
		responses[i].id = requests[i].id;
		/* Of an indirect request what it was underneath, as Linux' frontend wants it. */
		responses[i].operation = (uint8_t)plans[i].operation;
		responses[i].status = plans[i].status;
	}
	pv_blkif_count(counters, &done);
}
