/* SPDX-License-Identifier: MIT */
/* One connection: bytes in, and what it holds. Who moves the bytes is not its business. */
#include "xs_private.h"

/* -- input */

int xs_blocked(const struct pv_xs_conn *connection)
{
	return connection->parked || connection->n_out > XS_HIGH_WATER || !xs_may_be_handled(connection->domain);
}

int pv_xs_wants_input(const struct pv_xs_conn *connection)
{
	if (connection->broken || connection->closed || connection->parked || connection->n_waiting ||
	    connection->n_out > XS_HIGH_WATER)
		return 0;
	if (xs_may_be_read(connection->domain))
		return 1;
	xs_stall(connection->hub, connection->domain);
	return 0;
}

static int handle_one(struct pv_xs_conn *connection, const struct xs_header *header, const uint8_t *payload)
{
	struct pv_xs *hub = connection->hub;
	struct xs_cause *cause = xs_privileged(connection->domain) ? NULL : xs_cause_new(connection->domain);
	int result;

	hub->cause = cause;
	result = xs_handle(connection, header, payload);
	hub->cause = NULL; /* the first event of a watch counts for nobody */
	if (connection->first_event) {
		struct xs_watch *watch = connection->first_event;

		connection->first_event = NULL;
		xs_fire_watch(watch, watch->place->path, watch->place->n_path);
	}
	if (cause) {
		xs_cause_drop(cause);
		xs_note_memory(hub, connection->domain);
	}
	return result;
}

/* Whether it is others' turn. One request of a guest may take long: Dom0 must not wait for all it may have outstanding. */
static int turn_is_over(const struct pv_xs_conn *connection, uint32_t n_handled, int64_t started_ns)
{
	if (!n_handled || !(connection->owned || connection->page))
		return 0;
	return n_handled == XS_REQUESTS_PER_TURN || (started_ns && pv_now_ns() - started_ns > XS_TURN_NS);
}

/* Handle requests in `data` as far as they are whole and may be handled now: how many bytes they had. */
static uint32_t handle_all(struct pv_xs_conn *connection, const uint8_t *data, uint32_t n)
{
	struct pv_xs *hub = connection->hub;
	uint32_t at = 0, n_handled = 0;
	int64_t started_ns = xs_privileged(connection->domain) ? 0 : pv_now_ns();

	while (n - at >= XS_HEADER_BYTES && !connection->broken && !hub->parked) {
		struct xs_header header;
		int result;

		memcpy(&header, data + at, sizeof header);
		if (header.n > PV_XS_PAYLOAD_MAX) {
			pv_xs_give_up(connection, "a payload of more than 4096 bytes");
			return n;
		}
		if (n - at - XS_HEADER_BYTES < header.n)
			break;
		if (xs_blocked(connection)) {
			if (!xs_may_be_handled(connection->domain))
				xs_stall(hub, connection->domain);
			break;
		}
		if (turn_is_over(connection, n_handled++, started_ns)) {
			xs_take_turn_later(connection);
			break;
		}
		result = handle_one(connection, &header, data + at + XS_HEADER_BYTES);
		if (result) {
			connection->parked = 1;
			hub->parked = connection;
			break;
		}
		at += XS_HEADER_BYTES + header.n;
	}
	return at;
}

/* Whole requests that wait count in their domain's memory. */
static void count_waiting(struct pv_xs_conn *connection)
{
	uint32_t n = 0;

	while (connection->n_in - n >= XS_HEADER_BYTES) {
		struct xs_header header;

		memcpy(&header, connection->in + n, sizeof header);
		if (header.n > PV_XS_PAYLOAD_MAX || connection->n_in - n - XS_HEADER_BYTES < header.n)
			break;
		n += XS_HEADER_BYTES + header.n;
	}
	xs_account(connection->hub, connection->domain, (int64_t)n - connection->n_waiting);
	connection->n_waiting = n;
}

void xs_keep_input(struct pv_xs_conn *connection, const uint8_t *data, uint32_t n)
{
	if (!n)
		return;
	if (connection->n_in + n > connection->in_room) {
		connection->in_room = (connection->n_in + n) * 2;
		connection->in = xs_resize(connection->in, connection->in_room);
	}
	memcpy(connection->in + connection->n_in, data, n);
	connection->n_in += n;
	count_waiting(connection);
}

void xs_consume_input(struct pv_xs_conn *connection, uint32_t n)
{
	connection->n_in -= n;
	if (connection->n_in) {
		memmove(connection->in, connection->in + n, connection->n_in);
	} else if (connection->in_room > XS_HEADER_BYTES + PV_XS_PAYLOAD_MAX) {
		free(connection->in);   /* most clients send whole requests: nothing is kept for them */
		connection->in = NULL;
		connection->in_room = 0;
	}
	count_waiting(connection);
}

int xs_handle_waiting(struct pv_xs_conn *connection)
{
	if (connection->n_in) {
		uint32_t n = handle_all(connection, connection->in, connection->n_in);

		xs_consume_input(connection, connection->broken ? connection->n_in : n);
	}
	return connection->parked ? PV_XS_PARKED : PV_XS_DONE;
}

int pv_xs_feed(struct pv_xs_conn *connection, const uint8_t *data, uint32_t n)
{
	if (connection->closed || connection->broken)
		return PV_XS_DONE;
	if (connection->n_in) {
		xs_keep_input(connection, data, n);
		xs_handle_waiting(connection);
	} else {
		uint32_t done = handle_all(connection, data, n);

		if (!connection->broken)
			xs_keep_input(connection, data + done, n - done);
	}
	xs_settle(connection->hub);
	return connection->parked ? PV_XS_PARKED : PV_XS_DONE;
}

/* -- state */

void pv_xs_give_up(struct pv_xs_conn *connection, const char *why)
{
	connection->broken = why;
	xs_mark_dirty(connection);
}

void xs_drop_state(struct pv_xs_conn *connection)
{
	while (connection->watches)
		xs_watch_remove(connection->watches);
	while (connection->transactions) {
		struct xs_transaction *transaction = connection->transactions;

		connection->transactions = transaction->next;
		xs_transaction_close(transaction);
		xs_transaction_free(transaction);
	}
	connection->n_transactions = 0;
}

void pv_xs_reset(struct pv_xs_conn *connection)
{
	xs_drop_state(connection);
	while (connection->out)
		xs_pop_output(connection);
	pv_xs_sent(connection, 0);
	if (connection->n_in)
		xs_consume_input(connection, connection->n_in);
	if (connection->hub->parked == connection)
		xs_drop_parked(connection->hub);
	connection->parked = 0;
	connection->broken = NULL;
	xs_settle(connection->hub);
}

struct pv_xs_conn *pv_xs_connect(struct pv_xs *hub, uint32_t domid)
{
	struct pv_xs_conn *connection = xs_alloc(sizeof *connection);
	struct xs_domain *domain = xs_domain(hub, domid);

	xs_join_rate(hub, domain);
	xs_make_known(hub, domain);
	domain->public.n_connections++;
	connection->hub = hub;
	connection->domain = domain;
	connection->number = ++hub->connection_number;
	connection->next_transaction = 1;
	connection->fd = -1;
	connection->next_of_domain = domain->first;
	if (domain->first)
		domain->first->previous_of_domain = connection;
	domain->first = connection;
	connection->next = hub->connections;
	if (hub->connections)
		hub->connections->previous = connection;
	hub->connections = connection;
	hub->n_connections++;
	return connection;
}

static void unlink_connection(struct pv_xs_conn *connection)
{
	struct pv_xs *hub = connection->hub;

	if (connection->previous_of_domain)
		connection->previous_of_domain->next_of_domain = connection->next_of_domain;
	else
		connection->domain->first = connection->next_of_domain;
	if (connection->next_of_domain)
		connection->next_of_domain->previous_of_domain = connection->previous_of_domain;
	if (connection->previous)
		connection->previous->next = connection->next;
	else
		hub->connections = connection->next;
	if (connection->next)
		connection->next->previous = connection->previous;
	for (struct pv_xs_conn **at = &hub->dirty; *at; at = &(*at)->next_dirty) {
		if (*at == connection) {
			*at = connection->next_dirty;
			break;
		}
	}
}

void pv_xs_disconnect(struct pv_xs_conn *connection)
{
	if (connection->closed)
		return;
	pv_xs_reset(connection);
	connection->closed = 1;
	connection->domain->public.n_connections--;
	connection->hub->n_connections--;
	if (connection->domain->ring == connection)
		connection->domain->ring = NULL;
	unlink_connection(connection);
	xs_loop_forget(connection);
	free(connection->events);
	connection->events = NULL;
	connection->events_room = 0;
}

void pv_xs_conn_free(struct pv_xs_conn *connection)
{
	pv_xs_disconnect(connection);
	free(connection->in);
	free(connection);
}

int pv_xs_closed(const struct pv_xs_conn *connection)
{
	return connection->closed;
}

const char *pv_xs_broken(const struct pv_xs_conn *connection)
{
	return connection->broken;
}

uint64_t pv_xs_n_dropped_events(const struct pv_xs_conn *connection)
{
	return connection->n_dropped_events;
}

uint32_t pv_xs_domid(const struct pv_xs_conn *connection)
{
	return connection->domain->public.domid;
}

uint32_t pv_xs_number(const struct pv_xs_conn *connection)
{
	return connection->number;
}
