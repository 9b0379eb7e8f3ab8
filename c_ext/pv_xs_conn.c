/* SPDX-License-Identifier: MIT */
/* One connection: bytes in, bytes out, and what it holds in between. Who moves the bytes is not its business. */
#include <stdio.h>

#include "xs_private.h"

/* -- causes: which guest's request a packet comes of */

static struct xs_cause *cause_new(struct xs_domain *domain)
{
	struct xs_cause *cause = xs_alloc(sizeof *cause);

	cause->domain = domain;
	cause->epoch = domain->epoch;
	cause->refs = 1;
	domain->public.n_outstanding++;
	xs_note(domain, PV_XS_QUOTA_OUTSTANDING, domain->public.n_outstanding);
	return cause;
}

/* One of the packets that belong to a request is out of the way; after the last one it is no longer outstanding. */
static void cause_drop(struct xs_cause *cause)
{
	if (--cause->refs)
		return;
	if (cause->epoch == cause->domain->epoch)
		cause->domain->public.n_outstanding--;
	free(cause);
}

/* -- output */

void xs_mark_dirty(struct pv_xs_conn *connection)
{
	if (!connection->dirty && !connection->closed) {
		connection->dirty = 1;
		connection->next_dirty = connection->hub->dirty;
		connection->hub->dirty = connection;
	}
}

static struct xs_out *append(struct pv_xs_conn *connection, uint32_t n)
{
	struct pv_xs *hub = connection->hub;
	struct xs_out *out = malloc(sizeof *out + n);

	if (!out)
		out = xs_alloc(sizeof *out + n);
	*out = (struct xs_out){ .n = n, .queued_ms = hub->now_ms, .cause = hub->cause };
	if (out->cause)
		out->cause->refs++;
	if (connection->last_out)
		connection->last_out->next = out;
	else
		connection->out = out;
	connection->last_out = out;
	connection->n_out += n;
	xs_account(hub, connection->domain, n);
	xs_mark_dirty(connection);
	return out;
}

uint8_t *xs_put_reply(struct pv_xs_conn *connection, uint32_t op, uint32_t request_id, uint32_t transaction_id, uint32_t n)
{
	struct xs_out *out = append(connection, XS_HEADER_BYTES + n);
	struct xs_header header = { op, request_id, transaction_id, n };

	memcpy(out->data, &header, sizeof header);
	return out->data + XS_HEADER_BYTES;
}

uint8_t *xs_put_raw(struct pv_xs_conn *connection, uint32_t n)
{
	return append(connection, n)->data;
}

static uint32_t hash_of_event(const struct pv_xs *hub, const uint8_t *payload, uint32_t n)
{
	return xs_mix(xs_hash_bytes(hub->seed, payload, n));
}

static void enter_event(struct pv_xs_conn *connection, struct xs_out *event)
{
	if (connection->n_events >= connection->events_room) {
		uint32_t room = connection->events_room ? connection->events_room * 2 : 16;
		struct xs_out **table = xs_alloc(room * sizeof *table);

		for (uint32_t i = 0; i < connection->events_room; i++) {
			for (struct xs_out *at = connection->events[i], *next; at; at = next) {
				next = at->chain;
				at->chain = table[at->hash & (room - 1)];
				table[at->hash & (room - 1)] = at;
			}
		}
		free(connection->events);
		connection->events = table;
		connection->events_room = room;
	}
	event->chain = connection->events[event->hash & (connection->events_room - 1)];
	connection->events[event->hash & (connection->events_room - 1)] = event;
	connection->n_events++;
}

static void forget_event(struct pv_xs_conn *connection, struct xs_out *event)
{
	struct xs_out **at = &connection->events[event->hash & (connection->events_room - 1)];

	while (*at != event)
		at = &(*at)->chain;
	*at = event->chain;
	connection->n_events--;
}

/* An equal event that is not fully sent. */
static struct xs_out *find_event(const struct pv_xs_conn *connection, const uint8_t *payload, uint32_t n, uint32_t hash)
{
	struct xs_out *at = connection->events_room ? connection->events[hash & (connection->events_room - 1)] : NULL;

	while (at && !(at->hash == hash && at->n == n + XS_HEADER_BYTES && !memcmp(at->data + XS_HEADER_BYTES, payload, n)))
		at = at->chain;
	return at;
}

static void note_timed(struct pv_xs_conn *connection)
{
	if (!connection->timed && !xs_privileged(connection->domain) && connection->hub->limits.event_timeout_ms) {
		connection->timed = 1;
		connection->hub->n_timed++;
	}
}

static void note_untimed(struct pv_xs_conn *connection)
{
	connection->hub->n_timed -= connection->timed;
	connection->timed = 0;
}

static int has_no_room(struct pv_xs_conn *connection, uint32_t n)
{
	struct pv_xs *hub = connection->hub;

	if (xs_privileged(connection->domain)) {
		if (connection->n_out + n <= hub->limits.privileged_output_bytes)
			return 0;
		pv_xs_give_up(connection, "does not read its events");
		return 1;
	}
	if (!xs_over_memory(connection->domain, n))
		return 0;
	connection->n_dropped_events++;
	hub->statistics.events_dropped++;
	return 1;
}

void xs_put_event(struct pv_xs_conn *connection, const char *path, uint32_t n_path, const char *token, uint32_t n_token)
{
	struct pv_xs *hub = connection->hub;
	uint32_t n = n_path + n_token + 2, hash;
	uint8_t payload[PV_XS_PAYLOAD_MAX];
	struct xs_header header = { XS_WATCH_EVENT, 0, 0, n };
	struct xs_out *event;

	if (n > sizeof payload || connection->closed)
		return;
	memcpy(payload, path, n_path);
	payload[n_path] = 0;
	memcpy(payload + n_path + 1, token, n_token);
	payload[n - 1] = 0;
	hash = hash_of_event(hub, payload, n);
	if (path[0] != '@' && find_event(connection, payload, n, hash)) {
		hub->statistics.events_merged++;
		return;
	}
	if (has_no_room(connection, n + XS_HEADER_BYTES))
		return;
	event = append(connection, n + XS_HEADER_BYTES);
	memcpy(event->data, &header, sizeof header);
	memcpy(event->data + XS_HEADER_BYTES, payload, n);
	event->is_event = 1;
	event->hash = hash;
	enter_event(connection, event);
	note_timed(connection);
	hub->statistics.events++;
}

uint64_t pv_xs_n_output(const struct pv_xs_conn *connection)
{
	return connection->n_out;
}

uint32_t pv_xs_output(const struct pv_xs_conn *connection, uint8_t *buffer, uint32_t max)
{
	uint32_t n = 0, skip = connection->out_sent;

	for (const struct xs_out *out = connection->out; out && n < max; out = out->next) {
		uint32_t part = out->n - skip;

		if (part > max - n)
			part = max - n;
		memcpy(buffer + n, out->data + skip, part);
		n += part;
		skip = 0;
	}
	return n;
}

/* A packet is delivered, or never will be. It is not in the list of output any more. */
static void packet_done(struct pv_xs_conn *connection, struct xs_out *out)
{
	struct pv_xs *hub = connection->hub;

	if (out->is_event)
		forget_event(connection, out);
	if (out->cause)
		cause_drop(out->cause);
	xs_account(hub, connection->domain, -(int64_t)out->n);
	free(out);
}

static void pop_output(struct pv_xs_conn *connection)
{
	struct xs_out *out = connection->out;

	connection->out = out->next;
	if (!connection->out)
		connection->last_out = NULL;
	connection->n_out -= out->n - connection->out_sent;
	connection->out_sent = 0;
	packet_done(connection, out);
}

void pv_xs_sent(struct pv_xs_conn *connection, uint32_t n)
{
	while (connection->out && n >= connection->out->n - connection->out_sent) {
		n -= connection->out->n - connection->out_sent;
		pop_output(connection);
	}
	if (connection->out) {
		connection->out_sent += n;
		connection->n_out -= n;
	} else {
		note_untimed(connection);
	}
	xs_settle(connection->hub);
}

int64_t xs_next_expiry(const struct pv_xs_conn *connection)
{
	for (const struct xs_out *out = connection->out; out; out = out->next) {
		if (out->is_event && !(out == connection->out && connection->out_sent))
			return out->queued_ms + connection->hub->limits.event_timeout_ms;
	}
	return INT64_MAX;
}

void xs_drop_old_events(struct pv_xs_conn *connection)
{
	struct pv_xs *hub = connection->hub;
	int64_t newest = hub->now_ms - hub->limits.event_timeout_ms;
	struct xs_out **at = &connection->out, *before = NULL;

	if (connection->out && connection->out_sent) {
		before = connection->out;
		at = &before->next;
	}
	while (*at) {
		struct xs_out *out = *at;

		if (!out->is_event || out->queued_ms > newest) {
			before = out;
			at = &out->next;
			continue;
		}
		*at = out->next;
		if (connection->last_out == out)
			connection->last_out = before;
		connection->n_out -= out->n;
		packet_done(connection, out);
		connection->n_dropped_events++;
		hub->statistics.events_dropped++;
	}
	if (xs_next_expiry(connection) == INT64_MAX)
		note_untimed(connection);
}

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
	struct xs_cause *cause = xs_privileged(connection->domain) ? NULL : cause_new(connection->domain);
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
		cause_drop(cause);
		xs_note_memory(hub, connection->domain);
	}
	return result;
}

/* Handle requests in `data` as far as they are whole and may be handled now: how many bytes they had. */
static uint32_t handle_all(struct pv_xs_conn *connection, const uint8_t *data, uint32_t n)
{
	struct pv_xs *hub = connection->hub;
	uint32_t at = 0, n_handled = 0;

	while (n - at >= XS_HEADER_BYTES && !connection->closed && !connection->broken && !hub->parked) {
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
		if (connection->owned && n_handled++ == XS_REQUESTS_PER_TURN) {
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

		if (connection->n_in)   /* else it was closed meanwhile */
			xs_consume_input(connection, n);
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

		if (!connection->closed && !connection->broken)
			xs_keep_input(connection, data + done, n - done);
	}
	xs_settle(connection->hub);
	return connection->parked ? PV_XS_PARKED : PV_XS_DONE;
}

struct pv_xs_conn *pv_xs_next_dirty(struct pv_xs *hub)
{
	struct pv_xs_conn *connection = hub->dirty;

	if (connection) {
		hub->dirty = connection->next_dirty;
		connection->dirty = 0;
	}
	return connection;
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
		pop_output(connection);
	pv_xs_sent(connection, 0);
	if (connection->n_in)
		xs_consume_input(connection, connection->n_in);
	if (connection->hub->parked == connection)
		connection->hub->parked = NULL;
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
