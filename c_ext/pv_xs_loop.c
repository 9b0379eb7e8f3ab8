/* SPDX-License-Identifier: MIT */
/*
 * The loop: one thread, one epoll set. A wake-up reads once from each client that has sent something, handles its
 * requests, writes the journal once, and then writes once to each client that has output. Nothing blocks: what a client
 * does not read stays in its own bounded queue, and its requests wait meanwhile.
 */
#include <errno.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "xs_private.h"

#define EPOLL_BATCH 128
#define SNAPSHOT_NODES_PER_TURN 512
#define FLUSH_ROUNDS 64
#define TURNS_NS 100000        /* of all whose turn it is, before descriptors are looked at again */

void xs_tell(struct pv_xs *hub, uint32_t kind, int fd, uint32_t mask, uint32_t domid, const char *reason)
{
	struct xs_loop *loop = &hub->loop;

	if (loop->n_events < loop->max_events)
		loop->events[loop->n_events++] =
			(struct pv_xs_event){ .kind = kind, .fd = fd, .mask = mask, .domid = domid, .reason = reason };
}

void xs_loop_init(struct pv_xs *hub)
{
	hub->loop.epoll_fd = -1;
	hub->loop.due_ms = -1;
	hub->loop.scratch = xs_alloc(XS_SCRATCH_BYTES);
}

int pv_xs_loop_open(struct pv_xs *hub)
{
	hub->loop.epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	return hub->loop.epoll_fd < 0 ? -errno : 0;
}

static void free_dead(struct pv_xs *hub)
{
	while (hub->loop.dead) {
		struct pv_xs_conn *connection = hub->loop.dead;

		hub->loop.dead = connection->next_turn;
		pv_xs_conn_free(connection);
	}
}

void xs_loop_close(struct pv_xs *hub)
{
	free_dead(hub);
	if (hub->loop.epoll_fd >= 0)
		close(hub->loop.epoll_fd);
	free(hub->loop.scratch);
	free(hub->loop.batch);
}

/* A connection is an even number (a pointer), a descriptor of the caller's an odd one. */
int pv_xs_loop_add(struct pv_xs *hub, int fd, uint32_t mask)
{
	struct epoll_event event = { .events = mask, .data.u64 = (uint64_t)fd << 1 | 1 };

	return epoll_ctl(hub->loop.epoll_fd, EPOLL_CTL_ADD, fd, &event) ? -errno : 0;
}

int pv_xs_loop_remove(struct pv_xs *hub, int fd)
{
	return epoll_ctl(hub->loop.epoll_fd, EPOLL_CTL_DEL, fd, NULL) ? -errno : 0;
}

int pv_xs_loop_waiter(struct pv_xs *hub, struct pv_waiter *waiter, int64_t spin_ns)
{
	int error = 0;

	hub->loop.spin_ns = spin_ns;
	if (hub->loop.waiter && hub->loop.epoll_fd >= 0)
		pv_xs_loop_remove(hub, hub->loop.waiter->epoll_fd);
	hub->loop.waiter = waiter;
	if (waiter)
		error = pv_xs_loop_add(hub, waiter->epoll_fd, EPOLLIN);
	return error;
}

/* -- connections */

static uint32_t wanted(const struct pv_xs_conn *connection)
{
	/* While the journal cannot be written nothing is sent, so room for it is of no interest. */
	int sends = connection->n_out && !connection->hub->journal.error;

	return (pv_xs_wants_input(connection) ? EPOLLIN : 0) | (sends ? EPOLLOUT : 0);
}

int pv_xs_serve_socket(struct pv_xs_conn *connection, int fd)
{
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = connection };

	connection->owned = 1;
	if (epoll_ctl(connection->hub->loop.epoll_fd, EPOLL_CTL_ADD, fd, &event)) {
		int error = -errno;

		close(fd);
		pv_xs_disconnect(connection);
		return error;
	}
	connection->fd = fd;
	connection->epoll_mask = EPOLLIN;
	if (wanted(connection) != EPOLLIN || connection->n_in)
		xs_mark_dirty(connection);
	return 0;
}

uint32_t pv_xs_sockets(struct pv_xs *hub, int32_t *fds, uint32_t max)
{
	uint32_t n = 0;

	for (const struct pv_xs_conn *connection = hub->connections; connection; connection = connection->next) {
		if (connection->fd < 0 || connection->broken)
			continue;
		if (n < max)
			fds[n] = connection->fd;
		n++;
	}
	return n;
}

static void leave_turns(struct pv_xs_conn *connection)
{
	struct xs_loop *loop = &connection->hub->loop;
	struct pv_xs_conn *before = NULL;

	if (!connection->again)
		return;
	for (struct pv_xs_conn *at = loop->turns; at != connection; at = at->next_turn)
		before = at;
	if (before)
		before->next_turn = connection->next_turn;
	else
		loop->turns = connection->next_turn;
	if (loop->last_turn == connection)
		loop->last_turn = before;
	connection->again = 0;
}

void xs_loop_forget(struct pv_xs_conn *connection)
{
	struct xs_loop *loop = &connection->hub->loop;

	leave_turns(connection);
	pv_xs_stop_ring(connection);
	if (connection->fd >= 0) {
		/* A process that is being forked may hold it for a while: the set would go on naming this connection. */
		pv_xs_loop_remove(connection->hub, connection->fd);
		close(connection->fd);
	}
	connection->fd = -1;
	if (connection->owned) {
		connection->next_turn = loop->dead;
		loop->dead = connection;
	}
}

void xs_take_turn_later(struct pv_xs_conn *connection)
{
	struct xs_loop *loop = &connection->hub->loop;

	if (connection->again || connection->closed)
		return;
	connection->again = 1;
	connection->next_turn = NULL;
	if (loop->last_turn)
		loop->last_turn->next_turn = connection;
	else
		loop->turns = connection;
	loop->last_turn = connection;
}

static void end(struct pv_xs_conn *connection)
{
	xs_tell(connection->hub, PV_XS_EVENT_CLOSED, -1, 0, connection->domain->public.domid, connection->broken);
	pv_xs_disconnect(connection);
}

static void read_socket(struct pv_xs_conn *connection)
{
	uint8_t *scratch = connection->hub->loop.scratch;
	ssize_t n = recv(connection->fd, scratch, XS_SCRATCH_BYTES, MSG_DONTWAIT);

	if (n > 0)
		pv_xs_feed(connection, scratch, (uint32_t)n);
	else if (n == 0 || (errno != EAGAIN && errno != EINTR))
		end(connection);
	if (!connection->closed)
		xs_mark_dirty(connection);
}

/* Offer what there is to send; a client that is gone or given up is closed. */
static void write_socket(struct pv_xs_conn *connection)
{
	uint8_t *scratch = connection->hub->loop.scratch;

	while (connection->n_out) {
		const uint8_t *data = connection->out->data + connection->out_sent;
		uint32_t n = connection->out->n - connection->out_sent;
		ssize_t sent;

		if (connection->out->next) {
			data = scratch;
			n = pv_xs_output(connection, scratch, XS_SCRATCH_BYTES);
		}
		sent = send(connection->fd, data, n, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (sent < 0 && errno != EAGAIN && errno != EINTR) {
			end(connection);
			return;
		}
		pv_xs_sent(connection, sent > 0 ? (uint32_t)sent : 0);
		if (sent != (ssize_t)n)
			break;
	}
	if (connection->broken)
		end(connection);
}

static void update_interest(struct pv_xs_conn *connection)
{
	uint32_t mask = wanted(connection);
	struct epoll_event event = { .events = mask, .data.ptr = connection };

	if (mask == connection->epoll_mask)
		return;
	connection->epoll_mask = mask;
	epoll_ctl(connection->hub->loop.epoll_fd, EPOLL_CTL_MOD, connection->fd, &event);
}

static void go_on(struct pv_xs_conn *connection)
{
	if (connection->closed)
		return;
	if (connection->n_waiting && !connection->again)
		xs_handle_waiting(connection);
	if (connection->page) {
		if (connection->served && !connection->again)
			xs_ring_read(connection);
	} else if (connection->fd >= 0) {
		update_interest(connection);
	}
}

/*
 * Write what the requests have caused, first to the journal. Output that is delivered may let requests go on that waited,
 * and so on; what is left after some rounds is for the next wake-up.
 */
static uint32_t collect_dirty(struct pv_xs *hub)
{
	struct xs_loop *loop = &hub->loop;
	uint32_t n = 0;

	for (; hub->dirty; hub->dirty = hub->dirty->next_dirty) {
		if (n == loop->batch_room) {
			loop->batch_room = loop->batch_room ? loop->batch_room * 2 : 64;
			loop->batch = xs_resize(loop->batch, loop->batch_room * sizeof *loop->batch);
		}
		hub->dirty->dirty = 0;
		loop->batch[n++] = hub->dirty;
	}
	return n;
}

static void flush(struct pv_xs *hub)
{
	struct pv_xs_conn **batch;
	uint32_t n;

	if (!hub->dirty)
		pv_xs_journal_flush(hub); /* what nobody waits for */
	for (int round = 0; hub->dirty && round < FLUSH_ROUNDS && !hub->parked; round++) {
		if (pv_xs_journal_flush(hub))
			return;
		n = collect_dirty(hub);
		batch = hub->loop.batch;
		/* Two passes: nobody is sent what is not in the journal yet. */
		for (uint32_t i = 0; i < n; i++) {
			if (!batch[i]->closed && batch[i]->page)
				xs_ring_write(batch[i]);
			else if (!batch[i]->closed && batch[i]->fd >= 0)
				write_socket(batch[i]);
		}
		for (uint32_t i = 0; i < n; i++)
			go_on(batch[i]);
	}
}

/* Ask the caller to look at the bindings of ports whose peers could not be notified. */
static void tell_stale(struct pv_xs *hub)
{
	if (!hub->loop.any_stale)
		return;
	hub->loop.any_stale = 0;
	for (struct pv_xs_conn *connection = hub->connections; connection; connection = connection->next) {
		if (connection->stale)
			xs_tell(hub, PV_XS_EVENT_STALE, -1, 0, connection->domain->public.domid, NULL);
	}
}

/* -- rings */

/* Hear the ports of rings. What else is pending at the waiter is the caller's. */
static void hear_rings(struct pv_xs *hub)
{
	struct pv_waiter *waiter = hub->loop.waiter;
	int drained = pv_waiter_drain(waiter);

	for (struct pv_xs_conn *connection = hub->connections, *next; connection; connection = next) {
		next = connection->next;
		if (connection->port && (pv_port_take_pending(connection->port) || drained == PV_WAIT_STALE)) {
			xs_ring_read(connection);
			xs_mark_dirty(connection);
		}
	}
	for (uint32_t i = 0; i < waiter->n_doorbells; i++) {
		if (pv_inbox_has_event(waiter->doorbells[i]->inbox)) {
			xs_tell(hub, PV_XS_EVENT_FD, waiter->epoll_fd, EPOLLIN, 0, NULL);
			return;
		}
	}
	if (drained == PV_WAIT_STALE || drained == PV_WAIT_KICKED)
		xs_tell(hub, PV_XS_EVENT_FD, waiter->epoll_fd, EPOLLIN, 0, NULL);
}

/* -- one wake-up */

/* Those whose turn it is, one after the other, until others must not wait any longer. */
static void take_turns(struct pv_xs *hub)
{
	struct xs_loop *loop = &hub->loop;
	const struct pv_xs_conn *last = loop->last_turn, *connection = NULL;
	int64_t started_ns = loop->turns ? pv_now_ns() : 0;

	while (loop->turns && !hub->parked && connection != last && pv_now_ns() - started_ns < TURNS_NS) {
		struct pv_xs_conn *next = loop->turns;

		connection = next;
		loop->turns = next->next_turn;
		if (!loop->turns)
			loop->last_turn = NULL;
		next->again = 0;
		if (next->n_waiting)
			xs_handle_waiting(next);
		if (next->page)
			xs_ring_read(next);
		xs_mark_dirty(next);
	}
}

static void dispatch(struct pv_xs *hub, const struct epoll_event *event)
{
	struct pv_xs_conn *connection = event->data.ptr;
	int fd = (int)(event->data.u64 >> 1);

	if (event->data.u64 & 1) {
		if (hub->loop.waiter && fd == hub->loop.waiter->epoll_fd) {
			hear_rings(hub);
		} else {
			xs_tell(hub, PV_XS_EVENT_FD, fd, event->events, 0, NULL);
		}
		return;
	}
	if (connection->closed)
		return;
	if (event->events & EPOLLOUT)
		xs_mark_dirty(connection);
	if (event->events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
		if (pv_xs_wants_input(connection))
			read_socket(connection);
		else if (event->events & (EPOLLHUP | EPOLLERR))
			end(connection);
	}
	if (connection->hub->journal.error && !connection->closed)
		update_interest(connection); /* as long as nothing can be sent nobody else does it */
}

static void look_at_clock(struct pv_xs *hub)
{
	pv_xs_set_now(hub, pv_now_ns() / 1000000);
	if (hub->loop.due_ms >= 0 && hub->now_ms >= hub->loop.due_ms)
		pv_xs_on_time(hub);
}

static void step_snapshot(struct pv_xs *hub)
{
	int done;

	if (hub->journal.snapshot.fd < 0 || hub->journal.done || hub->loop.done_told)
		return;
	done = pv_xs_snapshot_step(hub, SNAPSHOT_NODES_PER_TURN);
	if (done) {
		hub->loop.done_told = 1;
		xs_tell(hub, PV_XS_EVENT_SNAPSHOT, -1, done < 0 ? (uint32_t)-done : 0, 0, NULL);
	}
}

static void look_at_journal(struct pv_xs *hub)
{
	struct xs_loop *loop = &hub->loop;

	if (!hub->journal.error != !loop->journal_told)
		xs_tell(hub, PV_XS_EVENT_JOURNAL, -1, (uint32_t)-hub->journal.error, 0, NULL);
	loop->journal_told = hub->journal.error != 0;
	if (!loop->full_told && xs_journal_needs_snapshot(hub)) {
		loop->full_told = 1;
		xs_tell(hub, PV_XS_EVENT_LONG, -1, 0, 0, NULL);
	}
}

/* How long to sleep, in ms. */
static int64_t how_long(struct pv_xs *hub, int64_t timeout_ms)
{
	int64_t due = pv_xs_next_timeout(hub);

	hub->loop.due_ms = due < 0 ? -1 : hub->now_ms + due;
	if (hub->loop.turns || (hub->dirty && !hub->journal.error))
		return 0;
	if (hub->journal.snapshot.fd >= 0 && !hub->journal.done && !hub->loop.done_told)
		return 0;
	if (hub->loop.n_rings && hub->loop.spin_ns && pv_now_ns() - hub->loop.ring_active_ns < hub->loop.spin_ns)
		return 0;
	if (hub->journal.error && (due < 0 || due > XS_RETRY_MS))
		due = XS_RETRY_MS;
	return timeout_ms < 0 || (due >= 0 && due < timeout_ms) ? due : timeout_ms;
}

int pv_xs_poll(struct pv_xs *hub, int64_t timeout_ms, struct pv_xs_event *events, uint32_t max)
{
	struct epoll_event ready[EPOLL_BATCH];
	struct xs_loop *loop = &hub->loop;
	int64_t until_ms, left;

	loop->events = events;
	loop->max_events = max;
	loop->n_events = 0;
	look_at_clock(hub);
	until_ms = hub->now_ms + timeout_ms;
	for (;;) {
		int n;

		flush(hub); /* who has been read from is answered first */
		take_turns(hub);
		flush(hub);
		tell_stale(hub);
		step_snapshot(hub);
		look_at_journal(hub);
		free_dead(hub);
		if (hub->parked)
			xs_tell(hub, PV_XS_EVENT_PARKED, -1, 0, 0, NULL);
		left = timeout_ms < 0 ? -1 : until_ms > hub->now_ms ? until_ms - hub->now_ms : 0;
		if (loop->n_events || left == 0)
			break;
		n = epoll_wait(loop->epoll_fd, ready, EPOLL_BATCH, (int)how_long(hub, left));
		hub->statistics.wake_ups++;
		if (n < 0)
			break; /* a signal: its handlers are the caller's */
		look_at_clock(hub);
		for (int i = 0; i < n; i++)
			dispatch(hub, &ready[i]);
	}
	loop->events = NULL;
	loop->max_events = 0;
	return (int)loop->n_events;
}
