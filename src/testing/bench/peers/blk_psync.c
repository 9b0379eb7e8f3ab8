/* SPDX-License-Identifier: MIT */
/* No split at all: pread and pwrite of a file, one after the other. */
#include "blk.h"

static int file;
static uint32_t *finished, n_finished;

static uint8_t *disk_open(size_t buffer_bytes)
{
	void *buffers = mmap(NULL, buffer_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	file = open(job.target, job.read_per_mille == 1000 && !job.verify ? O_RDONLY : O_RDWR);
	finished = calloc(job.depth, sizeof *finished);
	if (file < 0 || buffers == MAP_FAILED || !finished)
		not_here("%s: %s", job.target, strerror(errno));
	return buffers;
}

static void disk_send(const struct op *ops, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		ssize_t moved = ops[i].is_write ? pwrite(file, ops[i].buffer, job.block_bytes, (off_t)ops[i].offset) :
						  pread(file, ops[i].buffer, job.block_bytes, (off_t)ops[i].offset);

		if (moved != (ssize_t)job.block_bytes)
			not_here("%s: %s", job.target, moved < 0 ? strerror(errno) : "it is too short");
		finished[n_finished++] = ops[i].tag;
	}
}

static uint32_t disk_take(uint32_t *tags)
{
	uint32_t n = n_finished;

	memcpy(tags, finished, n * sizeof *tags);
	n_finished = 0;
	return n;
}

static void disk_wait(void)
{
}

static double disk_back_cpu_s(void)
{
	return 0;
}
