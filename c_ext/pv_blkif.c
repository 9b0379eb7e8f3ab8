/* SPDX-License-Identifier: MIT */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "pv_blkif.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define SECTOR_SHIFT 9
#define PAGE_SECTORS 8

static void refuse(struct pv_blkif_plan *plan, int16_t status, uint16_t reason)
{
	plan->status = status;
	plan->reason = reason;
	plan->n_extents = 0;
}

/* Everything about a request that can be decided without looking at a grant. 1 when it may go on. */
static int check(const struct pv_blkif_limits *limits, const struct pv_blkif_request *request, struct pv_blkif_plan *plan)
{
	uint64_t sectors = 0;
	uint32_t unit = limits->sector_size >> SECTOR_SHIFT;

	memset(plan, 0, sizeof(*plan));
	plan->operation = request->operation;
	plan->status = PV_BLKIF_PENDING;
	switch (request->operation) {
	case PV_BLKIF_OP_FLUSH_DISKCACHE:
		if (!limits->flush) {
			refuse(plan, PV_BLKIF_RSP_EOPNOTSUPP, PV_BLKIF_REFUSED_OPERATION);
			return 0;
		}
		/* A flush carries no data; segments of one are ignored as Linux and QEMU do. */
		return 1;
	case PV_BLKIF_OP_READ:
		break;
	case PV_BLKIF_OP_WRITE:
		if (limits->read_only) {
			refuse(plan, PV_BLKIF_RSP_ERROR, PV_BLKIF_REFUSED_READ_ONLY);
			return 0;
		}
		break;
	default:
		refuse(plan, PV_BLKIF_RSP_EOPNOTSUPP, PV_BLKIF_REFUSED_OPERATION);
		return 0;
	}
	if (request->nr_segments == 0 || request->nr_segments > PV_BLKIF_MAX_SEGMENTS) {
		refuse(plan, PV_BLKIF_RSP_ERROR, PV_BLKIF_REFUSED_SEGMENTS);
		return 0;
	}
	for (uint32_t i = 0; i < request->nr_segments; i++) {
		const struct pv_blkif_segment *segment = &request->seg[i];

		if (segment->first_sect > segment->last_sect || segment->last_sect >= PAGE_SECTORS) {
			refuse(plan, PV_BLKIF_RSP_ERROR, PV_BLKIF_REFUSED_BOUNDS);
			return 0;
		}
		sectors += segment->last_sect - segment->first_sect + 1;
	}
	/* Not `sector + sectors > limit`: that sum can wrap. */
	if (request->sector > limits->sectors || sectors > limits->sectors - request->sector) {
		refuse(plan, PV_BLKIF_RSP_ERROR, PV_BLKIF_REFUSED_RANGE);
		return 0;
	}
	if (request->sector % unit || sectors % unit) {
		refuse(plan, PV_BLKIF_RSP_ERROR, PV_BLKIF_REFUSED_ALIGNMENT);
		return 0;
	}
	plan->offset = request->sector << SECTOR_SHIFT;
	plan->length = sectors << SECTOR_SHIFT;
	return 1;
}

/* The backend writes the pages of a read and reads those of a write. */
static int maps_read_only(const struct pv_blkif_request *request)
{
	return request->operation == PV_BLKIF_OP_WRITE;
}

static void unpin(struct pv_mapper *mapper, const struct pv_blkif_request *request, struct pv_blkif_plan *plan)
{
	for (uint32_t i = 0; i < plan->pinned; i++)
		pv_grant_unmap(mapper, request->seg[i].gref, maps_read_only(request));
	plan->pinned = 0;
}

static int pin(struct pv_mapper *mapper, const struct pv_blkif_request *request, struct pv_blkif_plan *plan)
{
	for (uint32_t i = 0; i < request->nr_segments; i++) {
		const struct pv_blkif_segment *segment = &request->seg[i];
		struct pv_blkif_extent *last = plan->n_extents ? &plan->extents[plan->n_extents - 1] : NULL;
		uint64_t length = (uint64_t)(segment->last_sect - segment->first_sect + 1) << SECTOR_SHIFT;
		uint64_t offset;

		if (pv_grant_map(mapper, segment->gref, maps_read_only(request), &offset) != PV_GNTST_OKAY) {
			unpin(mapper, request, plan);
			refuse(plan, PV_BLKIF_RSP_ERROR, PV_BLKIF_REFUSED_GRANT);
			return 0;
		}
		plan->pinned++;
		offset += (uint64_t)segment->first_sect << SECTOR_SHIFT;
		if (last && last->offset + last->length == offset) {
			last->length += length;
			continue;
		}
		plan->extents[plan->n_extents].offset = offset;
		plan->extents[plan->n_extents].length = length;
		plan->n_extents++;
	}
	return 1;
}

uint32_t pv_blkif_prepare(struct pv_mapper *mapper, const struct pv_blkif_limits *limits,
			  const struct pv_blkif_request *requests, uint32_t n, struct pv_blkif_plan *plans)
{
	uint32_t pending = 0;

	for (uint32_t i = 0; i < n; i++) {
		if (!check(limits, &requests[i], &plans[i]))
			continue;
		if (requests[i].operation == PV_BLKIF_OP_FLUSH_DISKCACHE || pin(mapper, &requests[i], &plans[i]))
			pending++;
	}
	return pending;
}

void pv_blkif_copy(struct pv_mapper *mapper, struct pv_blkif_plan *plans, uint32_t n, uint8_t *disk, uint64_t disk_bytes)
{
	for (uint32_t i = 0; i < n; i++) {
		struct pv_blkif_plan *plan = &plans[i];
		uint64_t at = plan->offset;

		if (plan->status != PV_BLKIF_PENDING)
			continue;
		plan->status = PV_BLKIF_RSP_OKAY;
		if (at > disk_bytes || plan->length > disk_bytes - at) {
			refuse(plan, PV_BLKIF_RSP_ERROR, PV_BLKIF_REFUSED_RANGE);
			continue;
		}
		for (uint32_t e = 0; e < plan->n_extents; e++) {
			uint8_t *guest = mapper->data + plan->extents[e].offset;

			if (plan->operation == PV_BLKIF_OP_WRITE)
				memcpy(disk + at, guest, plan->extents[e].length);
			else
				memcpy(guest, disk + at, plan->extents[e].length);
			at += plan->extents[e].length;
		}
	}
}

/* All bytes of a plan; 0 or a positive errno. */
static int transfer(struct pv_mapper *mapper, const struct pv_blkif_plan *plan, int fd)
{
	struct iovec pieces[PV_BLKIF_MAX_SEGMENTS], *next = pieces;
	int left = plan->n_extents;
	off_t at = (off_t)plan->offset;

	for (int i = 0; i < left; i++) {
		pieces[i].iov_base = mapper->data + plan->extents[i].offset;
		pieces[i].iov_len = plan->extents[i].length;
	}
	while (left > 0) {
		ssize_t done = plan->operation == PV_BLKIF_OP_WRITE ? pwritev(fd, next, left, at) : preadv(fd, next, left, at);

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

int pv_blkif_transfer(struct pv_mapper *mapper, struct pv_blkif_plan *plans, uint32_t n, int fd)
{
	int first = 0;

	for (uint32_t i = 0; i < n; i++) {
		struct pv_blkif_plan *plan = &plans[i];
		int error;

		if (plan->status != PV_BLKIF_PENDING)
			continue;
		if (plan->operation == PV_BLKIF_OP_FLUSH_DISKCACHE)
			error = fdatasync(fd) ? errno : 0;
		else
			error = transfer(mapper, plan, fd);
		plan->status = error ? PV_BLKIF_RSP_ERROR : PV_BLKIF_RSP_OKAY;
		if (!first)
			first = error;
	}
	return first;
}

static void count(struct pv_blkif_counters *counters, const struct pv_blkif_plan *plan)
{
	int okay = plan->status == PV_BLKIF_RSP_OKAY;

	if (plan->reason != PV_BLKIF_REFUSED_NOTHING) {
		counters->refused++;
		return;
	}
	counters->errors += !okay;
	switch (plan->operation) {
	case PV_BLKIF_OP_READ:
		counters->reads++;
		counters->read_bytes += okay ? plan->length : 0;
		break;
	case PV_BLKIF_OP_WRITE:
		counters->writes++;
		counters->written_bytes += okay ? plan->length : 0;
		break;
	default:
		counters->flushes++;
	}
}

void pv_blkif_finish(struct pv_mapper *mapper, const struct pv_blkif_request *requests, struct pv_blkif_plan *plans,
		     uint32_t n, struct pv_blkif_response *responses, struct pv_blkif_counters *counters)
{
	for (uint32_t i = 0; i < n; i++) {
		unpin(mapper, &requests[i], &plans[i]);
		if (plans[i].status == PV_BLKIF_PENDING)
			plans[i].status = PV_BLKIF_RSP_ERROR;
		count(counters, &plans[i]);
		memset(&responses[i], 0, sizeof(responses[i]));
		responses[i].id = requests[i].id;
		responses[i].operation = requests[i].operation;
		responses[i].status = plans[i].status;
	}
}

int64_t pv_blkif_serve(struct pv_blkif_batch *batch, struct pv_ring *ring, uint32_t n)
{
	batch->error = 0;
	if (pv_blkif_prepare(batch->mapper, &batch->limits, batch->requests, n, batch->plans)) {
		if (batch->disk)
			pv_blkif_copy(batch->mapper, batch->plans, n, batch->disk, batch->disk_bytes);
		else
			batch->error = pv_blkif_transfer(batch->mapper, batch->plans, n, batch->fd);
	}
	pv_blkif_finish(batch->mapper, batch->requests, batch->plans, n, batch->responses, &batch->counters);
	return pv_ring_push(ring, batch->responses, n);
}
