/* SPDX-License-Identifier: MIT */
/*
 * What all programs share that measure a block device: how they are called, the loop that keeps requests in flight, what
 * they print. A source includes this first and defines the functions that are declared below.
 *
 *   PROGRAM TARGET RW READ_PER_MILLE BLOCK_BYTES DEPTH N_BYTES SECONDS FRONT_CPU BACK_CPU WAIT [verify]
 *
 * RW is "rand" or "seq"; WAIT is "spin" or "sleep", how it waits for answers. The same loop, random numbers and
 * histogram as this project's own load. With "verify" all blocks are written first, and each read is compared. Prints a
 * line of JSON. Exit code 3: it cannot run here; 4: what was read is not what was written.
 */
#ifndef BLK_H
#define BLK_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "pv_histogram.h"
#include "pv_pattern.h"

#define SEED 1
#define GENERATION 1

static struct job {
	const char *target;
	int is_random;
	uint32_t read_per_mille;
	uint32_t block_bytes;
	uint32_t depth;
	uint64_t n_bytes;
	double seconds;
	int front_cpu;
	int back_cpu;
	int sleeps;
	int verify;
} job;

/* A request: its tag, 0 to depth - 1, is it until it is taken, and has its buffer. */
struct op {
	uint32_t tag;
	uint32_t is_write;
	uint64_t offset;
	uint8_t *buffer;
};

/* What a source defines. */
static uint8_t *disk_open(size_t buffer_bytes);           /* connect; memory for the buffers of all tags, zeroed */
static void disk_send(const struct op *ops, uint32_t n);  /* at most as many as are free */
static uint32_t disk_take(uint32_t *tags);                /* tags of those that are done, 0 for none now */
static void disk_wait(void);                              /* nothing was there to take */
static double disk_back_cpu_s(void);                      /* of the other side, so far; negative: not known here */

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000ll + now.tv_nsec;
}

__attribute__((noreturn, format(printf, 1, 2))) static void not_here(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	exit(3);
}

static void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof set, &set))
		not_here("CPU %d is not for this process", cpu);
}

static inline void relax(void)
{
#if defined(__x86_64__)
	__builtin_ia32_pause();
#endif
}

static double cpu_s_of(int who)
{
	struct rusage usage;

	getrusage(who, &usage);
	return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
	       (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static uint64_t random_state = SEED;

static uint64_t below(uint64_t n)
{
	random_state ^= random_state >> 12;
	random_state ^= random_state << 25;
	random_state ^= random_state >> 27;
	return (uint64_t)((unsigned __int128)(random_state * 0x2545F4914F6CDD1Du) * n >> 64);
}

static struct pv_histogram latency;
static uint64_t done, written;

static uint64_t next_block(uint64_t n_blocks)
{
	static uint64_t position;

	if (job.is_random)
		return below(n_blocks);
	return position++ % n_blocks;
}

static void fill(const struct op *op)
{
	pv_pattern_fill(op->buffer, job.block_bytes, op->offset, GENERATION, SEED);
}

static void check(const struct op *op)
{
	struct pv_pattern_mismatch mismatch;

	if (!pv_pattern_check(op->buffer, job.block_bytes, op->offset, GENERATION, SEED, &mismatch))
		return;
	fprintf(stderr, "byte %llu is not as it was written: generation %u of byte %llu\n",
		(unsigned long long)mismatch.offset, mismatch.found_generation,
		(unsigned long long)mismatch.found_offset);
	exit(4);
}

/* Keep requests in flight until the time is over, or (limit) so many are done. */
static int64_t keep_busy(struct op *ops, uint8_t *buffers, uint64_t limit, int all_writes)
{
	uint64_t n_blocks = job.n_bytes / job.block_bytes, sent = 0;
	int64_t *sent_ns = calloc(job.depth, sizeof *sent_ns), start = now_ns(), now = start;
	uint32_t *tags = calloc(job.depth, sizeof *tags), *free_tags = calloc(job.depth, sizeof *free_tags);
	struct op *batch = calloc(job.depth, sizeof *batch);
	uint32_t n_free = 0, n;

	for (; n_free < job.depth; n_free++)
		free_tags[n_free] = job.depth - 1 - n_free;
	for (;;) {
		uint32_t in_flight = job.depth - n_free;

		for (n = 0; n_free && (limit ? sent < limit : (double)(now - start) < job.seconds * 1e9); n++, sent++) {
			struct op *op = &ops[free_tags[--n_free]];

			op->tag = (uint32_t)(op - ops);
			op->is_write = all_writes || job.read_per_mille == 0 ||
				       (job.read_per_mille < 1000 && below(1000) >= job.read_per_mille);
			op->offset = (all_writes ? sent : next_block(n_blocks)) * job.block_bytes;
			op->buffer = buffers + (size_t)op->tag * job.block_bytes;
			if (job.verify && op->is_write)
				fill(op);
			sent_ns[op->tag] = now;
			batch[n] = *op;
		}
		if (n)
			disk_send(batch, n);
		else if (!in_flight)
			break;
		n = disk_take(tags);
		if (!n)
			disk_wait();
		now = now_ns();
		for (uint32_t i = 0; i < n; i++) {
			struct op *op = &ops[tags[i]];

			free_tags[n_free++] = tags[i];
			if (all_writes)
				continue;
			pv_histogram_add(&latency, now - sent_ns[tags[i]]);
			done++;
			written += op->is_write;
			if (job.verify && !op->is_write)
				check(op);
		}
	}
	free(sent_ns);
	free(tags);
	free(free_tags);
	free(batch);
	return now - start;
}

static void report(int64_t took_ns, double front_cpu_s, double back_cpu_s)
{
	const char *between = "";

	printf("{\"seconds\": %.9f, \"reads\": %llu, \"writes\": %llu, \"front_cpu_s\": %.6f, ", (double)took_ns / 1e9,
	       (unsigned long long)(done - written), (unsigned long long)written, front_cpu_s);
	if (back_cpu_s < 0)
		printf("\"back_cpu_s\": null, ");
	else
		printf("\"back_cpu_s\": %.6f, ", back_cpu_s);
	printf("\"sum_ns\": %llu, \"buckets\": [", (unsigned long long)latency.sum_ns);
	for (uint32_t i = 0; i < PV_HISTOGRAM_BUCKETS; i++) {
		if (!latency.buckets[i])
			continue;
		printf("%s[%llu, %llu]", between, (unsigned long long)pv_histogram_bucket_ns(i),
		       (unsigned long long)latency.buckets[i]);
		between = ", ";
	}
	printf("]}\n");
}

int main(int argc, char **argv)
{
	struct op *ops;
	uint8_t *buffers;
	int64_t took_ns;
	double front_cpu_s, back_cpu_s;

	if (argc < 11 || argc > 12)
		return 2;
	job.target = argv[1];
	job.is_random = !strcmp(argv[2], "rand");
	job.read_per_mille = (uint32_t)atoi(argv[3]);
	job.block_bytes = (uint32_t)atoi(argv[4]);
	job.depth = (uint32_t)atoi(argv[5]);
	job.n_bytes = strtoull(argv[6], NULL, 10);
	job.seconds = atof(argv[7]);
	job.front_cpu = atoi(argv[8]);
	job.back_cpu = atoi(argv[9]);
	job.sleeps = !strcmp(argv[10], "sleep");
	job.verify = argc == 12 && !strcmp(argv[11], "verify");
	if (!job.depth || !job.block_bytes || job.block_bytes % PV_PATTERN_SECTOR_BYTES || job.n_bytes < job.block_bytes)
		return 2;
	pin(job.front_cpu);
	buffers = disk_open((size_t)job.depth * job.block_bytes);
	ops = calloc(job.depth, sizeof *ops);
	if (!ops)
		return 3;
	if (!job.verify)
		for (size_t i = 0; i < (size_t)job.depth * job.block_bytes; i++)
			buffers[i] = (uint8_t)(i * 31 >> 3);
	else
		keep_busy(ops, buffers, job.n_bytes / job.block_bytes, 1);
	front_cpu_s = cpu_s_of(RUSAGE_SELF);
	back_cpu_s = disk_back_cpu_s();
	took_ns = keep_busy(ops, buffers, 0, 0);
	front_cpu_s = cpu_s_of(RUSAGE_SELF) - front_cpu_s;
	if (back_cpu_s >= 0)
		back_cpu_s = disk_back_cpu_s() - back_cpu_s;
	report(took_ns, front_cpu_s, back_cpu_s);
	return 0;
}

#endif
