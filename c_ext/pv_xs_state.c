/* SPDX-License-Identifier: MIT */
/*
 * What a live update hands over beside the tree: the connections. All numbers are little-endian.
 *
 *   header      8 bytes "PVXSSTAT", u32 version, u32 number of the last connection
 *   connection  u32 domid, i32 socket (-1: the domain's ring; -2: one that an error has ended), u32 number,
 *               u32 next transaction,
 *               u32 n_in, u32 n_out, u32 n_watches, u32 n_transactions,
 *               n_in bytes that were not handled, n_out bytes that were not sent,
 *               watches: u16 n_path, u16 n_token, u16 n_prefix, u16 0, i32 depth, path, token,
 *               transactions: u32 number
 *
 * Watches are in the order they were set. An open transaction is not handed over: its number is, and it will not commit.
 */
#include <errno.h>

#include "xs_private.h"

#define VERSION 1
#define RING (-1)
#define ENDED_RING (-2)

static const char magic[8] = { 'P', 'V', 'X', 'S', 'S', 'T', 'A', 'T' };

struct head {
	uint32_t domid;
	int32_t fd;
	uint32_t number;
	uint32_t next_transaction;
	uint32_t n_in;
	uint32_t n_out;
	uint32_t n_watches;
	uint32_t n_transactions;
};

struct watch_head {
	uint16_t n_path;
	uint16_t n_token;
	uint16_t n_prefix;
	uint16_t pad;
	int32_t depth;
};

static void put(struct xs_bytes *bytes, const void *data, uint64_t n)
{
	if (n)
		memcpy(xs_bytes_add(bytes, n), data, n);
}

static void save_watch(struct xs_bytes *bytes, const struct xs_watch *watch)
{
	struct watch_head head = { (uint16_t)watch->place->n_path, watch->n_token, watch->n_prefix, 0, watch->depth };

	put(bytes, &head, sizeof head);
	put(bytes, watch->place->path, watch->place->n_path);
	put(bytes, watch->token, watch->n_token);
}

static void save_connection(struct xs_bytes *bytes, const struct pv_xs_conn *connection)
{
	struct head head = {
		.domid = connection->domain->public.domid, .number = connection->number,
		.fd = connection->fd >= 0 ? connection->fd : connection->served ? RING : ENDED_RING,
		.next_transaction = connection->next_transaction, .n_in = connection->n_in,
		.n_out = (uint32_t)connection->n_out, .n_transactions = connection->n_transactions,
	};

	for (const struct xs_watch *watch = connection->watches; watch; watch = watch->next_of_connection)
		head.n_watches++;
	put(bytes, &head, sizeof head);
	put(bytes, connection->in, connection->n_in);
	pv_xs_output(connection, xs_bytes_add(bytes, head.n_out), head.n_out);
	for (const struct xs_watch *watch = connection->watches; watch; watch = watch->next_of_connection)
		save_watch(bytes, watch);
	for (const struct xs_transaction *transaction = connection->transactions; transaction; transaction = transaction->next)
		put(bytes, &transaction->number, 4);
}

int64_t pv_xs_state_save(struct pv_xs *hub, uint8_t **state)
{
	uint32_t words[2] = { VERSION, hub->connection_number };
	const struct pv_xs_conn *connection = hub->connections;
	struct xs_bytes bytes = { 0 };

	put(&bytes, magic, sizeof magic);
	put(&bytes, words, sizeof words);
	while (connection && connection->next)
		connection = connection->next;
	for (; connection; connection = connection->previous) { /* oldest first */
		if ((connection->fd >= 0 && !connection->broken) || connection->page)
			save_connection(&bytes, connection);
	}
	*state = bytes.data;
	return (int64_t)bytes.n;
}

void pv_xs_state_free(uint8_t *state)
{
	free(state);
}

struct reader {
	const uint8_t *at;
	uint64_t left;
};

/* The next n bytes, or NULL when there are not so many. */
static const uint8_t *take(struct reader *reader, uint64_t n)
{
	const uint8_t *at = reader->at;

	if (n > reader->left)
		return NULL;
	reader->at += n;
	reader->left -= n;
	return at;
}

static int load_watch(struct pv_xs_conn *connection, struct reader *reader)
{
	const uint8_t *from = take(reader, sizeof(struct watch_head)), *path, *token;
	struct watch_head head;

	if (!from)
		return -EPROTO;
	memcpy(&head, from, sizeof head);
	path = take(reader, head.n_path);
	token = take(reader, head.n_token);
	if (!path || !token || !head.n_path || head.n_path > XS_PATH_MAX || head.n_prefix > head.n_path ||
	    !xs_is_well_formed(connection->hub, (const char *)path, head.n_path))
		return -EPROTO;
	xs_watch_add(connection, (const char *)path, head.n_path, (const char *)token, head.n_token, head.n_prefix,
		     head.depth);
	return 0;
}

static int load_holdings(struct pv_xs_conn *connection, const struct head *head, struct reader *reader)
{
	const uint8_t *in = take(reader, head->n_in), *out = in ? take(reader, head->n_out) : NULL;
	int error = 0;

	if (!out)
		return -EPROTO;
	xs_keep_input(connection, in, head->n_in);
	if (head->n_out)
		memcpy(xs_put_raw(connection, head->n_out), out, head->n_out);
	for (uint32_t i = 0; i < head->n_watches && !error; i++)
		error = load_watch(connection, reader);
	for (uint32_t i = 0; i < head->n_transactions && !error; i++) {
		const uint8_t *number = take(reader, 4);

		if (!number)
			return -EPROTO;
		memcpy(&connection->next_transaction, number, 4);
		xs_transaction_new(connection)->outdated = 1;
	}
	connection->next_transaction = head->next_transaction;
	return error;
}

static int load_connection(struct pv_xs *hub, struct reader *reader)
{
	const uint8_t *from = take(reader, sizeof(struct head));
	struct pv_xs_conn *connection;
	struct head head;
	int error;

	if (!from)
		return -EPROTO;
	memcpy(&head, from, sizeof head);
	if (head.domid > XS_DOMID_MAX || (head.fd < 0 && pv_xs_ring_of(hub, head.domid)))
		return -EPROTO;
	connection = pv_xs_connect(hub, head.domid);
	connection->number = head.number;
	error = load_holdings(connection, &head, reader);
	if (error) {
		pv_xs_conn_free(connection);
		return error;
	}
	if (head.fd >= 0)
		return pv_xs_serve_socket(connection, head.fd);
	connection->domain->ring = connection; /* its page and port are the caller's to find */
	connection->served = head.fd == RING;
	return 0;
}

int pv_xs_state_load(struct pv_xs *hub, const uint8_t *state, uint64_t n)
{
	struct reader reader = { state, n };
	const uint8_t *header = take(&reader, sizeof magic + 8);
	uint32_t words[2];
	int error = 0;

	if (!header || memcmp(header, magic, sizeof magic))
		return -EPROTO;
	memcpy(words, header + sizeof magic, sizeof words);
	if (words[0] != VERSION)
		return -EPROTO;
	while (reader.left && !error)
		error = load_connection(hub, &reader);
	hub->connection_number = words[1];
	return error;
}
