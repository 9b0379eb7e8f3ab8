/* SPDX-License-Identifier: MIT */
/*
 * A connection over a domain's xenstore page (docs/misc/xenstore-ring.txt): two byte streams, and fields by which the two
 * ends tell each other what they can do and that a connection starts anew. The guest may write the page at any time: a
 * field is read once and is only a hint of what it wants; the streams check their indexes (pv_stream.c).
 */
#include "pv_atomic.h"
#include "xs_private.h"

#define FEATURES_AT 2064
#define CONNECTION_AT 2068
#define ERROR_AT 2072
#define INDEXES_AT 2048

#define CONNECTED 0
#define RECONNECT 1

#define ERROR_NONE 0
#define ERROR_COMM 1
#define ERROR_RINGIDX 2
#define ERROR_PROTO 3

#define ROUNDS_PER_TURN 16

static const struct pv_stream_layout layout = {
	.out = 1024, .out_size = 1024, .out_cons = 2056, .out_prod = 2060,
	.in = 0, .in_size = 1024, .in_cons = 2048, .in_prod = 2052,
};

static uint32_t *field(const struct pv_xs_conn *connection, uint32_t offset)
{
	return (uint32_t *)(connection->page + offset);
}

static void notify(struct pv_xs_conn *connection)
{
	if (pv_notify(connection->port) == PV_NOTIFY_STALE)
		connection->stale = connection->hub->loop.any_stale = 1;
}

/* moved: what pv_stream_read or pv_stream_write returned. */
static void note_moved(struct pv_xs_conn *connection, int64_t moved)
{
	struct xs_loop *loop = &connection->hub->loop;

	if (moved >> 32)
		connection->stale = loop->any_stale = 1;
	loop->ring_active_ns = pv_now_ns();
}

/* Both streams begin at index 0, empty; the guest waits for that. */
static void start_anew(struct pv_xs_conn *connection)
{
	for (uint32_t i = 0; i < 4; i++)
		pv_store_relaxed(field(connection, INDEXES_AT + 4 * i), 0);
	pv_store_relaxed(field(connection, FEATURES_AT), connection->domain->public.features);
	pv_store_relaxed(field(connection, ERROR_AT), ERROR_NONE);
	connection->served =
		pv_stream_attach(&connection->stream, connection->page, PV_PAGE_BYTES, &layout, connection->port) == 0;
	/* Release: the empty streams, before the guest sees that it may use them. */
	pv_store_release(field(connection, CONNECTION_AT), CONNECTED);
	notify(connection);
}

void pv_xs_serve_ring(struct pv_xs_conn *connection, void *page, struct pv_port *port, int how)
{
	int goes_on = connection->served; /* as the former program has said */

	if (connection->page)
		pv_xs_stop_ring(connection);
	connection->served = 0;
	connection->page = page;
	connection->port = port;
	connection->domain->ring = connection;
	connection->hub->loop.n_rings++;
	if (how == PV_XS_RING_FRESH) {
		start_anew(connection);
	} else if (how == PV_XS_RING_BROKEN) {
		pv_store_relaxed(field(connection, FEATURES_AT), connection->domain->public.features);
		xs_ring_give_up(connection, ERROR_COMM);
	} else if (!goes_on) {
		notify(connection); /* the error that has ended it stands in the page */
	} else if (pv_stream_attach(&connection->stream, page, PV_PAGE_BYTES, &layout, port) == 0) {
		connection->served = 1;
		notify(connection);
	} else {
		xs_ring_give_up(connection, ERROR_RINGIDX);
	}
	xs_mark_dirty(connection);
	xs_take_turn_later(connection);
}

void pv_xs_stop_ring(struct pv_xs_conn *connection)
{
	if (!connection->page)
		return;
	connection->hub->loop.n_rings--;
	connection->page = NULL;
	connection->port = NULL;
	connection->served = connection->stale = 0;
}

/* Ignore this guest, and tell it why, until it asks for a reconnection or is introduced again. */
void xs_ring_give_up(struct pv_xs_conn *connection, uint32_t why)
{
	connection->served = 0;
	pv_xs_reset(connection);
	if (connection->domain->public.features & 2)
		pv_store_release(field(connection, ERROR_AT), why);
	notify(connection);
}

struct pv_xs_conn *pv_xs_ring_of(struct pv_xs *hub, uint32_t domid)
{
	struct xs_domain *domain = xs_domain_find(hub, domid);

	return domain ? domain->ring : NULL;
}

void pv_xs_ring_bound(struct pv_xs_conn *connection)
{
	connection->stale = 0;
	if (connection->port)
		notify(connection);
	xs_take_turn_later(connection);
}

void pv_xs_ring_look(struct pv_xs_conn *connection)
{
	xs_take_turn_later(connection);
}

static int wants_reconnection(struct pv_xs_conn *connection)
{
	return connection->domain->public.features & 1 &&
	       pv_load_acquire(field(connection, CONNECTION_AT)) == RECONNECT;
}

int xs_ring_read(struct pv_xs_conn *connection)
{
	struct pv_xs *hub = connection->hub;
	int moved = 0;

	if (wants_reconnection(connection)) {
		pv_xs_reset(connection);
		start_anew(connection);
		note_moved(connection, 0);
	}
	if (connection->served && connection->broken) /* by a request that had waited */
		xs_ring_give_up(connection, ERROR_PROTO);
	/* Indexes of replies that cannot be are seen here too: there may be nothing to write for long. */
	if (connection->served && pv_stream_writable(&connection->stream) < 0)
		xs_ring_give_up(connection, ERROR_RINGIDX);
	for (int i = 0; connection->served && pv_xs_wants_input(connection); i++) {
		int64_t n = pv_stream_read(&connection->stream, hub->loop.scratch, XS_SCRATCH_BYTES);

		if (n < 0) {
			xs_ring_give_up(connection, ERROR_RINGIDX);
			break;
		}
		if (!n)
			break;
		moved = 1;
		note_moved(connection, n);
		pv_xs_feed(connection, hub->loop.scratch, (uint32_t)n);
		if (connection->broken) {
			xs_ring_give_up(connection, ERROR_PROTO);
			break;
		}
		if (i == ROUNDS_PER_TURN) {
			xs_take_turn_later(connection);
			break;
		}
	}
	return moved;
}

int xs_ring_write(struct pv_xs_conn *connection)
{
	uint8_t chunk[1024];
	int moved = 0;

	while (connection->served && connection->n_out) {
		uint32_t n = pv_xs_output(connection, chunk, sizeof chunk);
		int64_t written = pv_stream_write(&connection->stream, chunk, n);

		if (written < 0) {
			xs_ring_give_up(connection, ERROR_RINGIDX);
			break;
		}
		if (!written)
			break;
		moved = 1;
		note_moved(connection, written);
		pv_xs_sent(connection, (uint32_t)written);
	}
	return moved;
}
