/* SPDX-License-Identifier: MIT */
/* What a connection has to send: replies and events, and whose requests they come of. */
#include "xs_private.h"

/* -- causes: which guest's request a packet comes of */

struct xs_cause *xs_cause_new(struct xs_domain *domain)
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
void xs_cause_drop(struct xs_cause *cause)
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
	struct xs_out *out = xs_alloc_unset(sizeof *out + n);

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

/* Eight bytes at a time: a guest's events may have 4096, and 126 of them for one write. */
static uint32_t hash_of_event(const struct pv_xs *hub, const uint8_t *payload, uint32_t n)
{
	uint64_t hash = hub->seed ^ n, word = 0;

	for (; n >= 8; n -= 8, payload += 8) {
		memcpy(&word, payload, 8);
		hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
		hash ^= hash >> 29;
	}
	word = 0;
	memcpy(&word, payload, n);
	return xs_mix((hash ^ word) * 0x9E3779B97F4A7C15u);
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

	if (n > sizeof payload)
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
		xs_cause_drop(out->cause);
	xs_account(hub, connection->domain, -(int64_t)out->n);
	free(out);
}

void xs_pop_output(struct pv_xs_conn *connection)
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
		xs_pop_output(connection);
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

	if (connection->out_sent) {
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

struct pv_xs_conn *pv_xs_next_dirty(struct pv_xs *hub)
{
	struct pv_xs_conn *connection = hub->dirty;

	if (connection) {
		hub->dirty = connection->next_dirty;
		connection->dirty = 0;
	}
	return connection;
}
