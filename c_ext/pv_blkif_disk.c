/* SPDX-License-Identifier: MIT */
/* What validated requests do to a disk that is memory, a file, a block device or nothing. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "pv_blkif.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "pv_atomic.h"

#define PIECES 64            /* of one system call; the kernel takes 1024 */
#define PAGE_BYTES 4096ull

/* Memory. */

static void copy(const struct pv_blkif_batch *batch, const struct pv_blkif_plan *plan)
{
	const struct pv_blkif_extent *extents = batch->pool.extents + plan->first;
	uint8_t *at = batch->disk + plan->offset;

	for (uint32_t e = 0; e < plan->n_extents; e++) {
		uint8_t *guest = batch->mapper->data + extents[e].offset;

		if (plan->operation == PV_BLKIF_OP_READ)
			memcpy(guest, at, extents[e].length);
		else
			memcpy(at, guest, extents[e].length);
		at += extents[e].length;
	}
}

/* Whole pages are given back to the system, which makes zeroes of them; the rest is written. */
static int zero_memory(uint8_t *from, uint64_t length)
{
	uint8_t *end = from + length;
	uint8_t *first = from + (-(uintptr_t)from & (PAGE_BYTES - 1)), *last = end - ((uintptr_t)end & (PAGE_BYTES - 1));

	if (first >= last) {
		memset(from, 0, length);
		return 0;
	}
	if (madvise(first, (size_t)(last - first), MADV_DONTNEED))
		memset(first, 0, (size_t)(last - first));
	memset(from, 0, (size_t)(first - from));
	memset(last, 0, (size_t)(end - last));
	return 0;
}

static int do_in_memory(const struct pv_blkif_batch *batch, const struct pv_blkif_plan *plan)
{
	/* Nothing is more stable than this. */
	if (plan->operation == PV_BLKIF_OP_FLUSH_DISKCACHE)
		return 0;
	if (plan->offset > batch->disk_bytes || plan->length > batch->disk_bytes - plan->offset)
		return EIO;
	if (plan->operation == PV_BLKIF_OP_DISCARD)
		return zero_memory(batch->disk + plan->offset, plan->length);
	copy(batch, plan);
	return 0;
}

/* Nothing. */

static int do_nothing(const struct pv_blkif_batch *batch, const struct pv_blkif_plan *plan)
{
	const struct pv_blkif_extent *extents = batch->pool.extents + plan->first;

	if (batch->kind == PV_BLKIF_DISK_ZERO && plan->operation == PV_BLKIF_OP_READ)
		for (uint32_t e = 0; e < plan->n_extents; e++)
			memset(batch->mapper->data + extents[e].offset, 0, extents[e].length);
	return 0;
}

/* Files and devices. */

/* As preadv and pwritev, without being a point where a thread can be cancelled: libc pays two locked operations for
 * that in a process with threads, which is a twentieth of the call when the file is in memory.
 */
static ssize_t transfer_once(int fd, int write, const struct iovec *pieces, int n, off_t at)
{
#if __SIZEOF_LONG__ == 8
	if (n == 1)
		return syscall(write ? SYS_pwrite64 : SYS_pread64, fd, pieces->iov_base, pieces->iov_len, at);
	return syscall(write ? SYS_pwritev : SYS_preadv, fd, pieces, (long)n, at, 0l);
#else
	return write ? pwritev(fd, pieces, n, at) : preadv(fd, pieces, n, at);
#endif
}

/* All bytes of some pieces; 0 or a positive errno. */
static int transfer_pieces(int fd, int write, struct iovec *next, int left, off_t at)
{
	while (left > 0) {
		ssize_t done = transfer_once(fd, write, next, left, at);

		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return done < 0 ? errno : EIO;
		at += done;
		/* Rare: a signal or a limit cut the call short. */
		while (left > 0 && (size_t)done >= next->iov_len) {
			done -= (ssize_t)next->iov_len;
			next++;
			left--;
		}
		if (left > 0) {
			next->iov_base = (uint8_t *)next->iov_base + done;
			next->iov_len -= (size_t)done;
		}
	}
	return 0;
}

static int transfer(const struct pv_blkif_batch *batch, const struct pv_blkif_plan *plan)
{
	const struct pv_blkif_extent *extents = batch->pool.extents + plan->first;
	struct iovec pieces[PIECES];
	off_t at = (off_t)plan->offset;

	for (uint32_t e = 0; e < plan->n_extents;) {
		off_t start = at;
		int n = 0, error;

		for (; n < PIECES && e < plan->n_extents; n++, e++) {
			pieces[n].iov_base = batch->mapper->data + extents[e].offset;
			pieces[n].iov_len = extents[e].length;
			at += (off_t)extents[e].length;
		}
		error = transfer_pieces(batch->fd, plan->operation != PV_BLKIF_OP_READ, pieces, n, start);
		if (error)
			return error;
	}
	return 0;
}

int pv_blkif_flush_error(int error)
{
	return error == EINVAL || error == ENOSYS ? EOPNOTSUPP : error;
}

static int flush(const struct pv_blkif_batch *batch)
{
	return fdatasync(batch->fd) ? pv_blkif_flush_error(errno) : 0;
}

/* What was answered before is durable before it, and it is itself when it is answered. */
static int barrier(const struct pv_blkif_batch *batch, const struct pv_blkif_plan *plan)
{
	int error = flush(batch);

	if (error || plan->length == 0)
		return error;
	error = transfer(batch, plan);
	return error ? error : flush(batch);
}

static int discard(const struct pv_blkif_batch *batch, const struct pv_blkif_plan *plan)
{
	uint64_t range[2] = {plan->offset, plan->length};
	int error;

	if (batch->kind == PV_BLKIF_DISK_DEVICE)
		return ioctl(batch->fd, plan->secure ? BLKSECDISCARD : BLKDISCARD, range) ? errno : 0;
	if (plan->secure)
		return EOPNOTSUPP;
	do
		error = fallocate(batch->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)plan->offset,
				  (off_t)plan->length) ? errno : 0;
	while (error == EINTR);
	return error;
}

static int do_with_file(const struct pv_blkif_batch *batch, const struct pv_blkif_plan *plan)
{
	switch (plan->operation) {
	case PV_BLKIF_OP_FLUSH_DISKCACHE:
		return flush(batch);
	case PV_BLKIF_OP_WRITE_BARRIER:
		return barrier(batch, plan);
	case PV_BLKIF_OP_DISCARD:
		return discard(batch, plan);
	default:
		return transfer(batch, plan);
	}
}

/* All of them. */

int pv_blkif_do(const struct pv_blkif_batch *batch, const struct pv_blkif_plan *plan)
{
	switch (batch->kind) {
	case PV_BLKIF_DISK_MEMORY:
		return do_in_memory(batch, plan);
	case PV_BLKIF_DISK_NULL:
	case PV_BLKIF_DISK_ZERO:
		return do_nothing(batch, plan);
	default:
		return do_with_file(batch, plan);
	}
}

static int is_optional(const struct pv_blkif_plan *plan)
{
	return plan->operation != PV_BLKIF_OP_READ && plan->operation != PV_BLKIF_OP_WRITE;
}

void pv_blkif_settle(struct pv_blkif_batch *batch, struct pv_blkif_plan *plan, int error)
{
	plan->status = error ? PV_BLKIF_RSP_ERROR : PV_BLKIF_RSP_OKAY;
	if ((error == EOPNOTSUPP || error == ENOSYS) && is_optional(plan)) {
		plan->status = PV_BLKIF_RSP_EOPNOTSUPP;
		batch->unsupported |= 1u << plan->operation;
	} else if (!batch->error) {
		batch->error = error;
	}
}

void pv_blkif_do_all(struct pv_blkif_batch *batch, uint32_t n)
{
	uint64_t copied = 0;

	for (uint32_t i = 0; i < n; i++) {
		struct pv_blkif_plan *plan = &batch->plans[i];

		if (plan->status != PV_BLKIF_PENDING)
			continue;
		pv_blkif_settle(batch, plan, pv_blkif_do(batch, plan));
		copied += plan->status == PV_BLKIF_RSP_OKAY && plan->n_extents ? plan->length : 0;
	}
	if (batch->kind == PV_BLKIF_DISK_MEMORY)
		pv_store_relaxed(&batch->counters->copied_bytes, batch->counters->copied_bytes + copied);
}

static int has_discard(const struct pv_blkif_batch *batch, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		if (batch->plans[i].operation == PV_BLKIF_OP_DISCARD && batch->plans[i].status == PV_BLKIF_PENDING)
			return 1;
	return 0;
}

int64_t pv_blkif_serve(struct pv_blkif_batch *batch, struct pv_ring *ring, uint32_t n)
{
	batch->error = 0;
	batch->unsupported = 0;
	if (pv_blkif_prepare(batch->mapper, &batch->limits, batch->requests, n, batch->plans, &batch->pool)) {
		if (batch->limits.discard && has_discard(batch, n))
			return PV_BLKIF_UNSERVED;
		pv_blkif_do_all(batch, n);
	}
	pv_blkif_finish(batch->mapper, batch->requests, batch->plans, n, &batch->pool, batch->responses,
			batch->counters);
	return pv_ring_push(ring, batch->responses, n);
}
