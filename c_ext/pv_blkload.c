/* SPDX-License-Identifier: MIT */
#include "pv_blkload.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#define SECTOR_BYTES PV_PATTERN_SECTOR_BYTES
#define IN_FLIGHT 0x80000000u   /* in a block's generation */
#define GENERATION 0x7FFFFFFFu

/* Choosing requests. */

/* xorshift64*: fast, and good enough for places on a disk. */
static uint64_t next_random(struct pv_blkload *load)
{
	load->random ^= load->random >> 12;
	load->random ^= load->random << 25;
	load->random ^= load->random >> 27;
	return load->random * 0x2545F4914F6CDD1Du;
}

/* 0 to n - 1, without a division. */
static uint64_t below(uint64_t random, uint64_t n)
{
	return (uint64_t)((unsigned __int128)random * n >> 64);
}

static uint64_t next_block(struct pv_blkload *load)
{
	uint64_t block;

	if (load->is_random)
		return below(next_random(load), load->n_blocks);
	block = load->position++;
	if (load->position == load->n_blocks)
		load->position = 0;
	return block;
}

/* With `verify`: one that is not in flight, of which there is one, because there are as many as requests at least. */
static uint64_t next_quiet_block(struct pv_blkload *load)
{
	uint64_t block = next_block(load);

	while (load->generations[block] & IN_FLIGHT)
		block = block + 1 == load->n_blocks ? 0 : block + 1;
	return block;
}

/* What it is to be, as its `in_slots` will have it when its slot is known. */
static struct pv_blkload_slot choose(struct pv_blkload *load, uint32_t i)
{
	uint32_t share = load->read_per_mille;
	int is_write = share < 1000 && (share == 0 || below(next_random(load), 1000) >= share);
	struct pv_blkload_slot chosen = { .is_write = (uint32_t)is_write };
	struct pv_blkfront_ask *ask = &load->asks[i];
	uint8_t *data = load->data;

	chosen.block = load->verify ? next_quiet_block(load) : next_block(load);
	ask->offset = load->start + chosen.block * load->block_bytes;
	ask->length = load->block_bytes;
	ask->operation = is_write ? PV_BLKIF_OP_WRITE : PV_BLKIF_OP_READ;
	ask->flag = 0;
	if (load->verify) {
		chosen.generation = load->generations[chosen.block];
		if (is_write) {
			chosen.generation = chosen.generation == GENERATION ? 1 : chosen.generation + 1;
			data += (uint64_t)i * load->block_bytes;
			pv_pattern_fill(data, load->block_bytes, ask->offset, chosen.generation, load->seed);
		}
		load->generations[chosen.block] |= IN_FLIGHT;
	}
	ask->data = is_write ? (uint64_t)(uintptr_t)data : 0;
	return chosen;
}

/* Sending. */

static uint32_t least(uint64_t a, uint64_t b)
{
	return (uint32_t)(a < b ? a : b);
}

/* How many are to be sent now. */
static uint32_t wanted(struct pv_blkload *load, struct pv_blkfront *front, const struct pv_ring *ring, int64_t now_ns)
{
	uint32_t n = load->depth - load->in_flight, each = pv_blkfront_slots_of(load->block_bytes);

	if (load->length_ns && now_ns - load->start_ns >= load->length_ns)
		load->stopping = 1;
	if (load->max_requests && load->issued == load->max_requests)
		load->stopping = 1;
	if (load->stopping || (load->in_flight && n < load->refill))
		return 0;
	if (load->max_requests)
		n = least(n, load->max_requests - load->issued);
	if (front->n_free < n * each && front->n_held)
		pv_blkfront_reclaim(front);
	return least(n, least(pv_ring_room(ring), front->n_free / each));
}

/* As pv_blkfront_issue; 0 when nothing was to be sent. */
static int64_t send(struct pv_blkload *load, struct pv_blkfront *front, struct pv_ring *ring, int64_t now_ns)
{
	uint32_t n = wanted(load, front, ring, now_ns);
	int64_t pushed;

	if (!n)
		return load->in_flight || load->stopping ? 0 : -EBUSY;
	for (uint32_t i = 0; i < n; i++)
		load->in_asks[i] = choose(load, i);
	pushed = pv_blkfront_issue(front, ring, load->asks, n, load->chosen);
	for (uint32_t i = 0; i < n; i++) {
		struct pv_blkload_slot *sent = &load->in_asks[i];

		if (pushed < 0) {
			if (load->verify)
				load->generations[sent->block] &= GENERATION;
			continue;
		}
		sent->issued_ns = now_ns;
		load->in_slots[load->chosen[i]] = *sent;
	}
	if (pushed < 0)
		return pushed;
	load->in_flight += n;
	load->issued += n;
	load->batches++;
	return pushed;
}

/* Answers. */

static void verify(struct pv_blkload *load, const struct pv_blkfront *front, uint32_t slot, int is_well)
{
	const struct pv_blkload_slot *done = &load->in_slots[slot];
	uint64_t offset = load->start + done->block * load->block_bytes;
	struct pv_pattern_mismatch mismatch;
	uint32_t wrong;

	/* A write that failed may have been done in part. */
	load->generations[done->block] = done->is_write && !is_well ? 0 : done->generation;
	if (done->is_write || !is_well)
		return;
	if (!done->generation) {
		load->unknown++;
		return;
	}
	pv_blkfront_gather(front, slot, load->read, load->block_bytes);
	wrong = pv_pattern_check(load->read, load->block_bytes, offset, done->generation, load->seed, &mismatch);
	load->verified += !wrong;
	if (wrong && !load->wrong)
		load->first_wrong = mismatch;
	load->wrong += wrong;
}

/* 1, or 0 when an answer matches no request. */
static int finish(struct pv_blkload *load, struct pv_blkfront *front, uint32_t n, int64_t now_ns)
{
	uint32_t right = pv_blkfront_complete(front, load->responses, n, load->answers);

	for (uint32_t i = 0; i < right; i++) {
		const struct pv_blkload_slot *done = &load->in_slots[load->answers[i].slot];
		int is_well = load->answers[i].status == PV_BLKIF_RSP_OKAY;

		pv_histogram_add(done->is_write ? load->write_latency : load->read_latency, now_ns - done->issued_ns);
		load->reads += is_well && !done->is_write;
		load->writes += is_well && done->is_write;
		load->errors += !is_well;
		if (load->verify)
			verify(load, front, load->answers[i].slot, is_well);
	}
	load->in_flight -= right;
	load->answered_ns = now_ns;
	return right == n;
}

int pv_blkload_begin(struct pv_blkload *load, const struct pv_blkfront *front)
{
	uint32_t block = load->block_bytes;

	if (!load->depth || load->refill < 1 || load->refill > load->depth || !load->seed || load->read_per_mille > 1000)
		return -EINVAL;
	if (!block || block % SECTOR_BYTES || load->start % SECTOR_BYTES ||
	    block > PV_BLKIF_MAX_INDIRECT_SEGMENTS * PV_PAGE_BYTES || pv_blkfront_slots_of(block) > front->n_slots)
		return -EINVAL;
	if (!load->n_blocks || (load->verify && load->n_blocks < load->depth) ||
	    (!load->max_requests && !load->length_ns) || load->length_ns < 0)
		return -EINVAL;
	load->random = load->seed;
	load->position = 0;
	load->in_flight = load->stopping = 0;
	load->start_ns = load->answered_ns = 0;
	load->issued = load->reads = load->writes = load->errors = load->batches = 0;
	load->verified = load->unknown = load->wrong = load->cpu_ns = 0;
	memset(&load->first_wrong, 0, sizeof(load->first_wrong));
	if (!load->verify)
		pv_pattern_fill(load->data, block, load->start, 1, load->seed);
	/* What a load before had in flight when it gave up may have been done or not. */
	for (uint64_t i = 0; load->verify && i < load->n_blocks; i++)
		if (load->generations[i] & IN_FLIGHT)
			load->generations[i] = 0;
	pv_histogram_clear(load->read_latency);
	pv_histogram_clear(load->write_latency);
	return 0;
}

static int64_t run(struct pv_blkload *load, struct pv_blkfront *front, struct pv_ring *ring, int64_t now_ns)
{
	int64_t until_ns = now_ns + load->slice_ns;

	for (int answered = 0;; answered = 1) {
		int64_t n = send(load, front, ring, now_ns);

		if (n < 0)
			return n;
		if (n >> 32)
			return n >> 32 << 32 | PV_BLKLOAD_PAUSED;
		if (!load->in_flight)
			return PV_BLKLOAD_DONE;
		if (answered && now_ns >= until_ns)
			return PV_BLKLOAD_PAUSED;
		n = pv_ring_take_spin(ring, load->responses, load->depth, load->spin_ns);
		if (n < 0)
			return n;
		if (!n) {
			int result = pv_ring_wait(ring, load->wait_spin_ns, load->slice_ns);

			now_ns = pv_now_ns();
			if (result < 0)
				return result;
			if (now_ns - load->answered_ns > load->timeout_ns)
				return -ETIMEDOUT;
			if (result != PV_WAIT_EVENT)
				return PV_BLKLOAD_PAUSED;
			continue;
		}
		now_ns = pv_now_ns();
		if (!finish(load, front, (uint32_t)n, now_ns))
			return PV_BLKLOAD_WRONG;
	}
}

static int64_t thread_cpu_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
	return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

int64_t pv_blkload_run(struct pv_blkload *load, struct pv_blkfront *front, struct pv_ring *ring)
{
	int64_t before_ns = thread_cpu_ns(), now_ns = pv_now_ns(), result;

	if (!load->start_ns)
		load->start_ns = load->answered_ns = now_ns;
	result = run(load, front, ring, now_ns);
	load->cpu_ns += (uint64_t)(thread_cpu_ns() - before_ns);
	return result;
}
