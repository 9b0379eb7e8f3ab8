/* SPDX-License-Identifier: MIT */
/*
 * Hostile clients of a xenstore daemon. Each does one bad thing as fast as it can; what it gets for it (errors, a closed
 * connection) is its own business. All paths are below "data" of the client's home, which a domain owns.
 *
 *   unread         pipelines requests with big answers and never reads
 *   writes         writes small values, nothing worse
 *   junk           well-framed requests of random types, lengths and contents, and at the end bytes that are no frame
 *   watches        opens all the watches it may, then makes them fire
 *   transactions   opens all the transactions it may, fills and ends them, in turn
 *   deep           makes the longest path and removes it
 *   wide           makes the widest directory, lists it, removes it
 *
 * Says "flooding" on a line of its own once it is at it; --seconds count from then on.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "xenstore_load.h"

#define WINDOW 32
#define WATCHES 1000
#define TRANSACTIONS 64
#define TRANSACTION_STEPS 40
#define CHILDREN 1100
#define PLACES 100
#define LISTINGS 64
#define DEEP_BYTES 1900
#define VALUE_BYTES 1900
#define PATIENCE_S 10

struct client {
	struct link *link;
	uint64_t step;
	uint32_t ids[TRANSACTIONS];
	uint32_t n_ids;
};

static char value[VALUE_BYTES + 1];
static char deep_path[DEEP_BYTES + 8];
static uint64_t seed = 2463534242u;

static void step_unread(struct client *client)
{
	if (client->step == 0)
		link_write(client->link, 0, "data/big", value, 0, 0);
	link_name(client->link, OP_READ, 0, "data/big", 0, 0);
}

static void step_writes(struct client *client)
{
	char path[32];

	snprintf(path, sizeof path, "data/n%llu", (unsigned long long)client->step % PLACES);
	link_write(client->link, 0, path, "12345678", 0, 0);
}

static void step_junk(struct client *client)
{
	uint64_t words[PAYLOAD_MAX / 8];
	uint64_t choice = random_next(&seed);
	size_t n_bytes = choice % 8 ? choice / 8 % 64 : choice / 8 % (PAYLOAD_MAX + 1);
	enum op type = (enum op)(choice >> 32) % OP_COUNT;

	for (size_t i = 0; i <= n_bytes / 8 && i < PAYLOAD_MAX / 8; i++)
		words[i] = random_next(&seed);
	link_ask(client->link, type, choice % 5 ? 0 : (uint32_t)(choice >> 40) % 16, words, n_bytes, 0, 0);
}

static void step_watches(struct client *client)
{
	char request[64] = "data";

	if (client->step < WATCHES) {
		int n = snprintf(request + 5, sizeof request - 5, "%llu", (unsigned long long)client->step);

		link_ask(client->link, OP_WATCH, 0, request, 5 + (size_t)n + 1, 0, 0);
	} else {
		link_write(client->link, 0, client->step % 2 ? "data/a" : "data/b", "x", 0, 0);
	}
}

/* Some steps in each of the open transactions, then the commit of one and the start of another. */
static void step_transactions(struct client *client)
{
	char path[32];

	if (client->step < TRANSACTIONS || !client->n_ids) {
		link_name(client->link, OP_TRANSACTION_START, 0, "", 0, 0);
	} else if (client->step % TRANSACTION_STEPS) {
		snprintf(path, sizeof path, "data/t/%llu", (unsigned long long)random_next(&seed) % 100);
		link_write(client->link, client->ids[client->step % client->n_ids], path, "x", 0, 0);
	} else {
		link_name(client->link, OP_TRANSACTION_END, client->ids[--client->n_ids], client->step % 3 ? "T" : "F", 0, 0);
		link_name(client->link, OP_TRANSACTION_START, 0, "", 0, 0);
	}
}

static void step_deep(struct client *client)
{
	if (client->step % 2)
		link_name(client->link, OP_RM, 0, "data/d", 0, 0);
	else
		link_name(client->link, OP_MKDIR, 0, deep_path, 0, 0);
}

static void step_wide(struct client *client)
{
	uint64_t phase = client->step % (CHILDREN + LISTINGS + 1);
	char path[32];

	snprintf(path, sizeof path, "data/w/%llu", (unsigned long long)phase);
	if (phase < CHILDREN)
		link_write(client->link, 0, path, "x", 0, 0);
	else
		link_name(client->link, phase < CHILDREN + LISTINGS ? OP_DIRECTORY : OP_RM, 0, "data/w", 0, 0);
}

static const struct flood {
	const char *name;
	void (*step)(struct client *client);
	bool reads;
	uint32_t first_steps;   /* before it is at its worst */
} floods[] = {
	{"unread", step_unread, false, 0}, {"writes", step_writes, true, 0}, {"junk", step_junk, true, 0},
	{"watches", step_watches, true, WATCHES}, {"transactions", step_transactions, true, TRANSACTIONS},
	{"deep", step_deep, true, 0}, {"wide", step_wide, true, CHILDREN},
};

static const struct flood *find_flood(void)
{
	for (size_t i = 0; i < sizeof floods / sizeof *floods; i++)
		if (options.kind && !strcmp(floods[i].name, options.kind))
			return &floods[i];
	fputs("xenstore_load: --kind is unread, writes, junk, watches, transactions, deep or wide\n", stderr);
	exit(EXIT_USAGE);
}

/* Ask as long as few are outstanding; without end if nothing is ever read, until the socket is full. */
static void press(struct poller *poller, const struct flood *flood, struct client *client)
{
	struct link *link = client->link;

	while (!link->lost && link->out_from == link->out_to && (!flood->reads || link_outstanding(link) < WINDOW)) {
		for (int i = 0; i < WINDOW / 2; i++, client->step++)
			flood->step(client);
		if (!flood->reads)
			link->answered = link->asked;
		poller_flush(poller, link);
	}
}

static void take(struct client *client)
{
	struct message message;

	link_receive(client->link);
	while (link_next(client->link, &message)) {
		result.operations += message.header.type != OP_WATCH_EVENT;
		result.events += message.header.type == OP_WATCH_EVENT;
		if (message.header.type == OP_ERROR)
			note_error(&message);
		else if (message.header.type == OP_TRANSACTION_START && client->n_ids < TRANSACTIONS)
			client->ids[client->n_ids++] = (uint32_t)strtoul(message.body, NULL, 10);
	}
}

static void take_ready(struct poller *poller, const struct flood *flood, struct client *clients)
{
	struct link *ready[64];
	int n = poller_wait(poller, ready, 64, 10);

	for (int i = 0; i < n && flood->reads; i++) {
		take(&clients[ready[i]->number]);
		poller_flush(poller, ready[i]);
	}
	if (!flood->reads)
		usleep(1000);
}

static bool any_outstanding(const struct client *clients, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		if (!clients[i].link->lost && link_outstanding(clients[i].link))
			return true;
	return false;
}

static struct client *make_clients(struct poller *poller, uint32_t *n)
{
	struct link *links = open_links(poller, n);
	struct client *clients = calloc(*n, sizeof *clients);

	if (!clients)
		fail("no memory");
	for (uint32_t i = 0; i < *n; i++) {
		clients[i].link = &links[i];
		links[i].may_lose = true;
	}
	memset(value, 'x', VALUE_BYTES);
	strcpy(deep_path, "data/d");
	while (strlen(deep_path) < DEEP_BYTES)
		strcat(deep_path, "/d");
	return clients;
}

static bool is_at_it(const struct flood *flood, const struct client *clients, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		if (clients[i].step <= flood->first_steps && !clients[i].link->lost)
			return false;
	return true;
}

/* No frame: a length that cannot be. */
static void insult(struct client *clients, uint32_t n)
{
	static const unsigned char bytes[64] = {255, 255, 255, 255, 1, 2, 3, 4, 5, 6, 7, 8, 255, 255, 255, 255};

	for (uint32_t i = 0; i < n; i++) {
		link_raw(clients[i].link, bytes, sizeof bytes);
		link_flush(clients[i].link);
	}
}

void run_flood(void)
{
	const struct flood *flood = find_flood();
	struct poller poller;
	uint32_t n;
	struct client *clients = make_clients(&poller, &n);
	bool announced = false;
	int64_t end;

	measure_start();
	end = result.start_ns + (int64_t)PATIENCE_S * 1000000000;
	while (now_ns() < end) {
		for (uint32_t i = 0; i < n; i++)
			press(&poller, flood, &clients[i]);
		if (!announced && is_at_it(flood, clients, n)) {
			announced = true;
			end = now_ns() + (int64_t)(options.seconds * 1e9);
			puts("flooding");
			fflush(stdout);
		}
		take_ready(&poller, flood, clients);
	}
	if (!announced)
		fail("the flood did not begin in %d s", PATIENCE_S);
	while (flood->reads && any_outstanding(clients, n) && now_ns() < end + (int64_t)PATIENCE_S * 1000000000)
		take_ready(&poller, flood, clients);
	if (flood->step == step_junk)
		insult(clients, n);
	measure_end();
	for (uint32_t i = 0; i < n; i++) {
		result.lost += clients[i].link->lost;
		link_close(clients[i].link);
	}
	free(clients[0].link);
	free(clients);
}
