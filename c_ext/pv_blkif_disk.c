/* SPDX-License-Identifier: MIT */
/* What a batch of validated requests does to a disk that is memory or a file. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "pv_blkif.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define PIECES 64            /* of one system call; the kernel takes 1024 */

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

void pv_blkif_copy(struct pv_blkif_batch *batch, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		struct pv_blkif_plan *plan = &batch->plans[i];

		if (plan->status != PV_BLKIF_PENDING || plan->operation == PV_BLKIF_OP_DISCARD)
			continue;
		if (plan->offset > batch->disk_bytes || plan->length > batch->disk_bytes - plan->offset) {
			plan->status = PV_BLKIF_RSP_ERROR;
			plan->reason = PV_BLKIF_REFUSED_RANGE;
			continue;
		}
		copy(batch, plan);
		plan->status = PV_BLKIF_RSP_OKAY;
	}
}

/* All bytes of some pieces; 0 or a positive errno. */
static int transfer_pieces(int fd, int write, struct iovec *next, int left, off_t at)
{
	while (left > 0) {
		ssize_t done = write ? pwritev(fd, next, left, at) : preadv(fd, next, left, at);

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

static int flush(const struct pv_blkif_batch *batch)
{
	int error = fdatasync(batch->fd) ? errno : 0;

	/* Files that cannot be flushed say it in several ways. */
	return error == EINVAL || error == ENOSYS ? EOPNOTSUPP : error;
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

static int do_one(const struct pv_blkif_batch *batch, const struct pv_blkif_plan *plan)
{
	switch (plan->operation) {
	case PV_BLKIF_OP_FLUSH_DISKCACHE:
		return flush(batch);
	case PV_BLKIF_OP_WRITE_BARRIER:
		return barrier(batch, plan);
	default:
		return transfer(batch, plan);
	}
}

void pv_blkif_transfer(struct pv_blkif_batch *batch, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		struct pv_blkif_plan *plan = &batch->plans[i];
		int error;

		if (plan->status != PV_BLKIF_PENDING || plan->operation == PV_BLKIF_OP_DISCARD)
			continue;
		error = do_one(batch, plan);
		plan->status = error ? PV_BLKIF_RSP_ERROR : PV_BLKIF_RSP_OKAY;
		if (error == EOPNOTSUPP) {
			plan->status = PV_BLKIF_RSP_EOPNOTSUPP;
			batch->unsupported |= 1u << plan->operation;
		} else if (!batch->error) {
			batch->error = error;
		}
	}
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
		if (batch->disk)
			pv_blkif_copy(batch, n);
		else
			pv_blkif_transfer(batch, n);
	}
	pv_blkif_finish(batch->mapper, batch->requests, batch->plans, n, &batch->pool, batch->responses,
			&batch->counters);
	return pv_ring_push(ring, batch->responses, n);
}
