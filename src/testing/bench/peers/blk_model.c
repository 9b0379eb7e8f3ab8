/* SPDX-License-Identifier: MIT */
/*
 * The least a split driver can be: a ring between two pinned processes that spin, and a memcpy between a buffer and a
 * disk in memory. The messages are blkif's; there are no grants, and nothing is checked. TARGET "null": no copy.
 */
#include "blk.h"

#include "pv_atomic.h"
#include "pv_ring.h"

#define SLOTS 128
#define RING_BYTES (4 * 4096)
#define MOST 32         /* moved in one call, as the backend's engine does */

struct request {
	uint8_t is_write;
	uint8_t pad[7];
	uint64_t tag;
	uint64_t offset;
	uint64_t rest[11];
};

struct response {
	uint64_t tag;
	uint64_t rest;
};

static struct control {
	uint32_t attached;
} *control;
static struct pv_ring ring;
static uint8_t *buffers;
static pid_t back;
static clockid_t back_clock;

static void *share(size_t n_bytes)
{
	void *memory = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (memory == MAP_FAILED)
		not_here("no memory: %s", strerror(errno));
	return memory;
}

__attribute__((noreturn)) static void serve(void *memory)
{
	static struct request requests[SLOTS];
	static struct response responses[SLOTS];
	uint8_t *disk = NULL;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	pin(job.back_cpu);
	if (strcmp(job.target, "null")) {
		disk = mmap(NULL, job.n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (disk == MAP_FAILED)
			_exit(3);
		memset(disk, 1, job.n_bytes);
	}
	pv_ring_attach(&ring, memory, RING_BYTES, sizeof *requests, sizeof *requests, sizeof *responses, NULL, 0);
	pv_ring_set_fence(&ring, PV_FENCE_HOST);
	pv_store_release(&control->attached, 1);
	for (;;) {
		int64_t n = pv_ring_take(&ring, requests, MOST);

		for (int64_t i = 0; i < n; i++) {
			uint8_t *buffer = buffers + requests[i].tag * job.block_bytes;

			if (disk && requests[i].is_write)
				memcpy(disk + requests[i].offset, buffer, job.block_bytes);
			else if (disk)
				memcpy(buffer, disk + requests[i].offset, job.block_bytes);
			responses[i].tag = requests[i].tag;
		}
		if (n > 0)
			pv_ring_push(&ring, responses, (uint32_t)n);
		else
			relax();
	}
}

/* Waited for, so that its CPU time counts as this run's. */
static void end_back(void)
{
	kill(back, SIGKILL);
	waitpid(back, NULL, 0);
}

static uint8_t *disk_open(size_t buffer_bytes)
{
	void *memory = share(RING_BYTES);

	if (job.depth > SLOTS)
		not_here("%u requests do not fit the model's ring of %u", job.depth, SLOTS);
	control = share(sizeof *control);
	buffers = share(buffer_bytes);
	pv_ring_create(&ring, memory, RING_BYTES, sizeof(struct request), sizeof(struct request), sizeof(struct response),
		       NULL, 0);
	if (pv_fence_register(PV_FENCE_HOST) || pv_ring_set_fence(&ring, PV_FENCE_HOST))
		not_here("membarrier is refused");
	back = fork();
	if (back == 0)
		serve(memory);
	if (back < 0 || clock_getcpuclockid(back, &back_clock))
		not_here("no process: %s", strerror(errno));
	while (!pv_load_acquire(&control->attached))
		if (waitpid(back, NULL, WNOHANG))
			not_here("no memory for the disk");
	atexit(end_back);
	return buffers;
}

static void disk_send(const struct op *ops, uint32_t n)
{
	static struct request requests[SLOTS];

	for (uint32_t i = 0; i < n; i++) {
		requests[i].is_write = (uint8_t)ops[i].is_write;
		requests[i].tag = ops[i].tag;
		requests[i].offset = ops[i].offset;
	}
	pv_ring_push(&ring, requests, n);
}

static uint32_t disk_take(uint32_t *tags)
{
	static struct response responses[SLOTS];
	int64_t n = pv_ring_take(&ring, responses, job.depth);

	for (int64_t i = 0; i < n; i++)
		tags[i] = (uint32_t)responses[i].tag;
	return n > 0 ? (uint32_t)n : 0;
}

static void disk_wait(void)
{
	relax();
}

static double disk_back_cpu_s(void)
{
	struct timespec used;

	clock_gettime(back_clock, &used);
	return (double)used.tv_sec + (double)used.tv_nsec / 1e9;
}
