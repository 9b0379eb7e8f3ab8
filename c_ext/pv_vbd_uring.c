/* SPDX-License-Identifier: MIT */
/*
 * An engine whose disk is asked through io_uring: many requests are in flight, and are answered as they are done. A request
 * keeps its pages until the kernel is done with them.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdlib.h>

#include "vbd_flight.h"

#ifdef PV_LIBURING

#include <fcntl.h>
#include <poll.h>
#include <time.h>

#include "pv_atomic.h"

#define PAGE_BYTES 4096ull
#define PIECES_AT_ONCE 1024         /* of one request to the kernel (IOV_MAX) */
#define CANCEL_AFTER_NS 200000000
#define CANCEL_AGAIN_NS 50000000
#define THROTTLED_NS 1000000        /* while something is in flight: how often the throttle is asked for room */
#define BUSY_PAUSE_NS 100000        /* the kernel takes no more for the moment */

const char *pv_vbd_liburing(void)
{
	return PV_LIBURING;
}

static int knows_all(struct io_uring *ring)
{
	struct io_uring_probe *probe = io_uring_get_probe_ring(ring);
	int known = probe && io_uring_opcode_supported(probe, IORING_OP_READV) &&
		    io_uring_opcode_supported(probe, IORING_OP_WRITEV) &&
		    io_uring_opcode_supported(probe, IORING_OP_FSYNC) &&
		    io_uring_opcode_supported(probe, IORING_OP_FALLOCATE) &&
		    io_uring_opcode_supported(probe, IORING_OP_ASYNC_CANCEL);

	if (probe)
		io_uring_free_probe(probe);
	return known;
}

int vbd_uring_new(struct pv_vbd_engine *engine, int direct, struct vbd_uring **made)
{
	struct vbd_uring *uring = calloc(1, sizeof(*uring));
	uint32_t n = engine->ring->size;
	struct iovec pages = {engine->batch.mapper->data, engine->batch.mapper->n_pages * PAGE_BYTES};
	int error;

	if (!uring)
		return -ENOMEM;
	uring->engine = engine;
	uring->n_max = n;
	uring->ios = calloc(n, sizeof(*uring->ios));
	uring->responses = calloc(n, sizeof(*uring->responses));
	error = uring->ios && uring->responses && vbd_flight_room(uring, 1) ? io_uring_queue_init(n, &uring->ring, 0) : -ENOMEM;
	if (error) {
		uring->ring.ring_fd = -1;
		vbd_uring_free(uring);
		return error;
	}
	io_uring_ring_dontfork(&uring->ring);
	if (!knows_all(&uring->ring)) {
		vbd_uring_free(uring);
		return -EOPNOTSUPP;
	}
	/* Only where they pay: a copy from the page cache needs no pages pinned. Refused beyond the limit of locked memory. */
	uring->fixed = direct && io_uring_register_buffers(&uring->ring, &pages, 1) == 0;
	*made = uring;
	return 0;
}

void vbd_uring_free(struct vbd_uring *uring)
{
	if (!uring)
		return;
	if (uring->ring.ring_fd >= 0)
		io_uring_queue_exit(&uring->ring);
	vbd_flight_free(uring);
	free(uring);
}

/* The kernel. */

/* The next piece of a transfer: as many extents as one call takes, from byte `done` of the request on. How many. */
static uint32_t next_pieces(const struct pv_vbd_engine *engine, struct vbd_io *io)
{
	const struct pv_blkif_extent *extents = io->pool.extents + io->plan.first;
	uint64_t skip = io->done;
	uint32_t e = 0, n = 0;

	for (; skip >= extents[e].length; e++)
		skip -= extents[e].length;
	for (; e < io->plan.n_extents && n < io->n_room; e++, n++) {
		io->pieces[n].iov_base = engine->batch.mapper->data + extents[e].offset + skip;
		io->pieces[n].iov_len = extents[e].length - skip;
		skip = 0;
	}
	return n;
}

/* 0 or a positive errno. */
static int reserve_pieces(struct vbd_io *io)
{
	uint32_t wanted = io->plan.n_extents < PIECES_AT_ONCE ? io->plan.n_extents : PIECES_AT_ONCE;
	struct iovec *pieces;

	if (wanted <= io->n_room)
		return 0;
	pieces = realloc(io->pieces, wanted * sizeof(*pieces));
	if (!pieces)
		return ENOMEM;
	io->pieces = pieces;
	io->n_room = wanted;
	return 0;
}

static void ask_transfer(struct vbd_uring *uring, struct vbd_io *io, struct io_uring_sqe *sqe)
{
	int fd = uring->engine->batch.fd, write = io->plan.operation != PV_BLKIF_OP_READ;
	uint64_t at = io->plan.offset + io->done;
	uint32_t n = next_pieces(uring->engine, io);
	const struct iovec *first = &io->pieces[0];

	if (uring->fixed && n == 1 && write)
		io_uring_prep_write_fixed(sqe, fd, first->iov_base, (unsigned)first->iov_len, at, 0);
	else if (uring->fixed && n == 1)
		io_uring_prep_read_fixed(sqe, fd, first->iov_base, (unsigned)first->iov_len, at, 0);
	else if (write)
		io_uring_prep_writev(sqe, fd, io->pieces, n, at);
	else
		io_uring_prep_readv(sqe, fd, io->pieces, n, at);
}

/* Have the kernel do the next step of a request. 0; or a positive errno, and it is not asked. */
static int ask(struct vbd_uring *uring, struct vbd_io *io)
{
	struct io_uring_sqe *sqe;
	int error = io->plan.n_extents ? reserve_pieces(io) : 0;

	if (error)
		return error;
	sqe = io_uring_get_sqe(&uring->ring);
	if (!sqe)
		return EBUSY;
	if (io->plan.operation == PV_BLKIF_OP_DISCARD)
		io_uring_prep_fallocate(sqe, uring->engine->batch.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
					(off_t)io->plan.offset, (off_t)io->plan.length);
	else if (io->plan.operation == PV_BLKIF_OP_FLUSH_DISKCACHE ||
		 (io->plan.operation == PV_BLKIF_OP_WRITE_BARRIER && io->step != VBD_WRITE))
		io_uring_prep_fsync(sqe, uring->engine->batch.fd, IORING_FSYNC_DATASYNC);
	else
		ask_transfer(uring, io, sqe);
	io_uring_sqe_set_data(sqe, io);
	return 0;
}

/* What only a blocking call does, or what the kernel would not do in the other way. A positive errno or 0. */
static int do_now(const struct vbd_uring *uring, const struct vbd_io *io)
{
	struct pv_blkif_batch batch = uring->engine->batch;

	batch.pool = io->pool;
	return pv_blkif_do(&batch, &io->plan);
}

/* It is over, with a positive errno or 0; what follows from that is done by settle_ended. */
static void end(struct vbd_uring *uring, struct vbd_io *io, int error)
{
	io->error = error;
	io->next_ended = uring->ended;
	uring->ended = io;
}

static int is_done_now(const struct vbd_uring *uring, const struct vbd_io *io)
{
	return io->plan.operation == PV_BLKIF_OP_DISCARD &&
	       (io->plan.secure || uring->engine->batch.kind != PV_BLKIF_DISK_FILE);
}

static void start(struct vbd_uring *uring, struct vbd_io *io)
{
	int error;

	io->state = VBD_GOING;
	if (is_done_now(uring, io)) {
		end(uring, io, do_now(uring, io));
		return;
	}
	error = ask(uring, io);
	if (error)
		end(uring, io, error);
	else
		uring->n_going++;
}

/* Answer what is over, and start what waited for it alone. */
static void settle_ended(struct vbd_uring *uring)
{
	struct vbd_io *io;

	while ((io = uring->ended)) {
		uring->ended = io->next_ended;
		vbd_flight_take_out(uring, io);
		for (struct vbd_io *after = io->next; after && uring->n_blocked; after = after->next) {
			if (after->state != VBD_BLOCKED || !vbd_conflict(io, after) || --after->blocked_by)
				continue;
			uring->n_blocked--;
			start(uring, after);
		}
		if (!io->abandoned)
			pv_blkif_settle(&uring->engine->batch, &io->plan, io->error);
		vbd_flight_answer(uring, io);
	}
}

/* What the kernel says of a step. */
static void step(struct vbd_uring *uring, struct vbd_io *io, int32_t result)
{
	int barrier = io->plan.operation == PV_BLKIF_OP_WRITE_BARRIER, error = result < 0 ? -result : 0;
	int moving = io->plan.n_extents && !(barrier && io->step != VBD_WRITE);

	uring->n_going--;
	if (pv_load_relaxed(&uring->engine->stopping) && (error == ECANCELED || error == EINTR || error == EAGAIN)) {
		io->abandoned = 1;
		end(uring, io, error);
		return;
	}
	if (error == EAGAIN || error == ECANCELED) {
		end(uring, io, do_now(uring, io));
		return;
	}
	if (!error && moving) {
		io->done += (uint64_t)result;
		error = result ? 0 : EIO;
	} else if (error && !moving && error != EINTR && io->plan.operation != PV_BLKIF_OP_DISCARD) {
		error = pv_blkif_flush_error(error);
	}
	if (error && error != EINTR) {
		end(uring, io, error);
		return;
	}
	if (!error && (!moving || io->done == io->plan.length)) {
		if (!barrier || io->step == VBD_FLUSH_AFTER || !io->plan.length) {
			end(uring, io, 0);
			return;
		}
		io->step++;
	}
	error = ask(uring, io);
	if (error)
		end(uring, io, error);
	else
		uring->n_going++;
}

/* The engine's calls. */

static int64_t push(struct vbd_uring *uring)
{
	struct pv_vbd_engine *engine = uring->engine;
	uint32_t n = uring->n_done;
	int64_t pushed;

	if (n == 0)
		return 0;
	uring->n_done = 0;
	pushed = vbd_push(engine, uring->responses, n);
	return pushed < 0 ? pushed : n;
}

/* n requests were taken: each gets its own memory, and starts unless it has to wait for others. */
static void admit(struct vbd_uring *uring, uint32_t n)
{
	struct pv_vbd_engine *engine = uring->engine;

	for (uint32_t i = 0; i < n; i++) {
		struct vbd_io *io = uring->free;

		uring->free = io->next;
		io->request = engine->requests[i];
		io->done = 0;
		io->step = VBD_FLUSH_BEFORE;
		io->abandoned = 0;
		io->pool.grants = engine->batch.pool.grants;
		if (!pv_blkif_prepare(engine->batch.mapper, &engine->batch.limits, &io->request, 1, &io->plan, &io->pool)) {
			vbd_note_refusal(engine, &io->plan);
			vbd_flight_answer(uring, io);
			continue;
		}
		vbd_charge(engine, &io->plan, 1);
		vbd_flight_add(uring, io);
		if (io->blocked_by) {
			io->state = VBD_BLOCKED;
			uring->n_blocked++;
		} else {
			start(uring, io);
		}
	}
}

/* Give the kernel what it is asked, and take what it has done. */
static void turn(struct vbd_uring *uring)
{
	struct io_uring_cqe *cqe;
	unsigned head, n;

	do {
		settle_ended(uring);
		/* What it does not take now it is given again in the next turn. */
		if (io_uring_sq_ready(&uring->ring))
			io_uring_submit(&uring->ring);
		n = 0;
		io_uring_for_each_cqe(&uring->ring, head, cqe) {
			struct vbd_io *io = io_uring_cqe_get_data(cqe);

			n++;
			if (io)
				step(uring, io, cqe->res);
		}
		io_uring_cq_advance(&uring->ring, n);
	} while (n || uring->ended);
}

int64_t vbd_uring_serve(struct vbd_uring *uring, int64_t spin_ns)
{
	struct pv_vbd_engine *engine = uring->engine;
	uint32_t room = vbd_flight_room(uring, engine->capacity), refused = uring->n_refused;
	int64_t n = 0, pushed;

	if (room)
		n = vbd_take(engine, room, uring->n_going ? 0 : spin_ns);
	if (n < 0)
		return n;
	engine->batch.error = 0;
	engine->batch.unsupported = 0;
	admit(uring, (uint32_t)n);
	turn(uring);
	pushed = push(uring);
	vbd_tell_of_disk(engine);
	if (pushed >= 0 && uring->n_refused != refused)
		vbd_pause_after_refusals();
	return pushed < 0 ? pushed : n + pushed;
}

static int64_t sleep_for_both(struct vbd_uring *uring)
{
	struct pv_vbd_engine *engine = uring->engine;
	struct pollfd fds[] = {{engine->waiter->epoll_fd, POLLIN, 0}, {uring->ring.ring_fd, POLLIN, 0}};
	int result = pv_ring_arm(engine->ring);

	if (result == PV_WAIT_TIMEOUT)
		poll(fds, 2, -1);
	return result < 0 ? result : pv_ring_disarm(engine->ring, fds[0].revents != 0);
}

int64_t vbd_uring_rest(struct vbd_uring *uring)
{
	if (io_uring_sq_ready(&uring->ring)) {
		struct timespec pause = {.tv_nsec = BUSY_PAUSE_NS};

		nanosleep(&pause, NULL);
		return 0;
	}
	if (!uring->n_going)
		return vbd_rest(uring->engine);
	if (uring->engine->wait_spin_ns) {
		pv_pause();
		return 0;
	}
	return sleep_for_both(uring);
}

void vbd_uring_rest_throttled(struct vbd_uring *uring)
{
	struct __kernel_timespec patience = {.tv_nsec = THROTTLED_NS};
	struct io_uring_cqe *cqe;

	if (uring->n_going)
		io_uring_wait_cqe_timeout(&uring->ring, &cqe, &patience);
	else
		pv_vbd_throttle_rest(uring->engine->throttle, &uring->engine->stopping);
}

/* Have the kernel give up what it has not begun, or can leave. */
static void cancel(struct vbd_uring *uring)
{
	for (struct vbd_io *io = uring->first; io; io = io->next) {
		struct io_uring_sqe *sqe = io->state == VBD_GOING ? io_uring_get_sqe(&uring->ring) : NULL;

		if (!sqe)
			continue;
		io_uring_prep_cancel(sqe, io, 0);
		io_uring_sqe_set_data(sqe, NULL);
	}
	io_uring_submit(&uring->ring);
}

void vbd_uring_drain(struct vbd_uring *uring)
{
	int64_t cancel_at_ns = pv_now_ns() + CANCEL_AFTER_NS;

	/* What has not begun is not answered: the frontend sends it again to the next backend. */
	for (struct vbd_io *io = uring->first; io; io = io->next)
		if (io->state == VBD_BLOCKED) {
			io->state = VBD_GOING;
			io->abandoned = 1;
			uring->n_blocked--;
			end(uring, io, 0);
		}
	for (turn(uring); uring->n_going; turn(uring)) {
		struct __kernel_timespec patience = {.tv_nsec = CANCEL_AGAIN_NS};
		struct io_uring_cqe *cqe;

		push(uring);
		io_uring_wait_cqe_timeout(&uring->ring, &cqe, &patience);
		if (pv_now_ns() >= cancel_at_ns)
			cancel(uring);
	}
	push(uring);
	vbd_tell_of_disk(uring->engine);
}

#else

const char *pv_vbd_liburing(void)
{
	return "";
}

int vbd_uring_new(struct pv_vbd_engine *engine, int direct, struct vbd_uring **made)
{
	return -EOPNOTSUPP;
}

void vbd_uring_free(struct vbd_uring *uring)
{
}

int64_t vbd_uring_serve(struct vbd_uring *uring, int64_t spin_ns)
{
	return -EOPNOTSUPP;
}

int64_t vbd_uring_rest(struct vbd_uring *uring)
{
	return -EOPNOTSUPP;
}

void vbd_uring_rest_throttled(struct vbd_uring *uring)
{
}

void vbd_uring_drain(struct vbd_uring *uring)
{
}

#endif
