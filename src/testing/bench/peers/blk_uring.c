/* SPDX-License-Identifier: MIT */
/* No split either: io_uring on a file, with a registered file. */
#include "blk.h"
#include <liburing.h>

static struct io_uring ring;

static uint8_t *disk_open(size_t buffer_bytes)
{
	void *buffers = mmap(NULL, buffer_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	int file = open(job.target, job.read_per_mille == 1000 && !job.verify ? O_RDONLY : O_RDWR), error;

	if (file < 0 || buffers == MAP_FAILED)
		not_here("%s: %s", job.target, strerror(errno));
	error = io_uring_queue_init(job.depth, &ring, 0);
	if (!error)
		error = io_uring_register_files(&ring, &file, 1);
	if (error)
		not_here("io_uring is refused: %s", strerror(-error));
	return buffers;
}

static void disk_send(const struct op *ops, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		struct io_uring_sqe *entry = io_uring_get_sqe(&ring);

		if (ops[i].is_write)
			io_uring_prep_write(entry, 0, ops[i].buffer, job.block_bytes, ops[i].offset);
		else
			io_uring_prep_read(entry, 0, ops[i].buffer, job.block_bytes, ops[i].offset);
		entry->flags |= IOSQE_FIXED_FILE;
		io_uring_sqe_set_data64(entry, ops[i].tag);
	}
	io_uring_submit(&ring);
}

static uint32_t disk_take(uint32_t *tags)
{
	struct io_uring_cqe *entry;
	uint32_t n = 0, head;

	io_uring_for_each_cqe(&ring, head, entry) {
		if (entry->res != (int)job.block_bytes)
			not_here("%s: %s", job.target, entry->res < 0 ? strerror(-entry->res) : "it is too short");
		tags[n++] = (uint32_t)io_uring_cqe_get_data64(entry);
	}
	io_uring_cq_advance(&ring, n);
	return n;
}

static void disk_wait(void)
{
	struct io_uring_cqe *entry;

	io_uring_wait_cqe(&ring, &entry);
}

static double disk_back_cpu_s(void)
{
	return 0;
}
