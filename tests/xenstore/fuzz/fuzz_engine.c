/* SPDX-License-Identifier: MIT */
/*
 * Fuzz target: the store's engine under several clients, of Dom0 and of guests, and everything its caller may do meanwhile.
 *
 * The input is a list of steps (enum step). What must hold: every byte that comes out is a packet of the protocol, replies
 * come in the order of the requests and name them; the engine's own books are right; what the journal has makes the same
 * tree again; when everybody is gone nothing is held for guests.
 */
#define _GNU_SOURCE
#include <sys/mman.h>
#include <unistd.h>

#include "fuzz.h"
#include "pv_xs.h"

#define N_CLIENTS 7
#define N_GUESTS 9             /* domids that may be known at the end */
#define N_STEPS 200
#define QUEUE 4096             /* requests that wait for their reply; more are not asked */

enum step {
	REQUEST, REQUEST2, REQUEST3, REQUEST4, RAW, SEND_SOME, SEND_ALL, SEND_ALL2, TIME, HOLD, ANSWER, RESET, LEAVE, FORGET,
	QUOTA, LIMIT, DOMAIN, SPECIAL, JOURNAL, SNAPSHOT, STEP, ADOPT, RELOAD, TRACE, RING, CUT, N_KINDS,
};

static const uint32_t domids[N_CLIENTS] = { 0, 0, 1, 1, 2, 2, 3 };

static const char *const words[] = {
	"/", "/a", "/a/b", "/a/b/c", "/a/d", "/e", "a", "b/c", "/local/domain/1", "/local/domain/1/x", "/local/domain/2",
	"/local/domain/3/y", "/tool/xenstored", "@releaseDomain", "@introduceDomain", "@other", "n0", "n1", "r0", "b1", "w2",
	"r3", "b32757", "n9", "r8", "1", "2", "3", "0", "-1", "T", "F", "token", "", "//", "/a/", "9", "32752", "99999",
	"/a/b/c/d/e/f", "memory", "nodes", "/local/domain", "@releaseDomain/1", "x", "b", "c",
};

/* A request that was sent whole, to which a reply has to come. */
struct asked {
	uint32_t op, request_id, transaction_id;
};

struct client {
	struct pv_xs_conn *connection;
	struct asked asked[QUEUE];
	uint32_t n_asked;
	uint8_t in[16];             /* header of the request that is being sent */
	uint32_t n_in;
	uint32_t left;              /* bytes of its payload that are to come */
	uint8_t out[16 + PV_XS_PAYLOAD_MAX];
	uint32_t n_out;
	uint8_t too_long;           /* it sent an impossible length */
};

static struct world {
	struct pv_xs *hub;
	struct client clients[N_CLIENTS];
	struct input input;
	int64_t now_ms;
	uint32_t request_id;
	uint32_t hold;              /* steps for which parked requests stay parked */
	uint32_t n_reloads;
	uint8_t journal, snapshot;  /* open */
} world;

static int files[2] = { -1, -1 };   /* the journal, the new file */
static uint8_t page[4][4096] __attribute__((aligned(4096)));
static struct pv_port port;
static uint8_t buffer[1 << 16];

/* -- what comes out */

static int is_error_name(const char *name, uint32_t n)
{
	static const char *const names[] = { "EINVAL", "EACCES", "EEXIST", "EISDIR", "ENOENT", "ENOMEM", "ENOSPC", "EIO",
		"ENOTEMPTY", "ENOSYS", "EROFS", "EBUSY", "EAGAIN", "EISCONN", "E2BIG", "EPERM" };

	for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
		if (n == strlen(names[i]) + 1 && !memcmp(names[i], name, n))
			return 1;
	}
	return 0;
}

static void check_packet(struct client *client, const uint32_t *header, const uint8_t *payload)
{
	const struct asked *asked = &client->asked[0];

	if (header[0] == 15) {
		const uint8_t *token = memchr(payload, 0, header[3]);

		must(!header[1] && !header[2] && token && token > payload);
		must(memchr(token + 1, 0, header[3] - (size_t)(token + 1 - payload)) == payload + header[3] - 1);
		return;
	}
	must(client->n_asked);
	must(header[1] == asked->request_id && header[2] == asked->transaction_id);
	must(header[0] == 16 || header[0] == asked->op);
	must(header[0] != 16 || is_error_name((const char *)payload, header[3]));
	memmove(client->asked, client->asked + 1, --client->n_asked * sizeof *asked);
}

static void check_output(struct client *client, const uint8_t *data, uint32_t n)
{
	while (n) {
		uint32_t want = 16, part, header[4];

		if (client->n_out >= 16) {
			memcpy(header, client->out, 16);
			must(header[3] <= PV_XS_PAYLOAD_MAX);
			want += header[3];
		}
		part = want - client->n_out < n ? want - client->n_out : n;
		memcpy(client->out + client->n_out, data, part);
		client->n_out += part;
		data += part;
		n -= part;
		if (client->n_out < 16)
			continue;
		memcpy(header, client->out, 16);
		if (client->n_out == 16 + header[3]) {
			check_packet(client, header, client->out + 16);
			client->n_out = 0;
		}
	}
}

static void send_output(struct client *client, uint32_t max)
{
	uint32_t n = pv_xs_output(client->connection, buffer, max);

	must(n <= max && n <= pv_xs_n_output(client->connection));
	check_output(client, buffer, n);
	pv_xs_sent(client->connection, n);
}

/* -- what goes in */

static void note_input(struct client *client, const uint8_t *data, uint32_t n)
{
	while (n && !client->too_long) {
		uint32_t part = client->n_in < 16 ? 16 - client->n_in : client->left, header[4];

		part = part < n ? part : n;
		if (client->n_in < 16) {
			memcpy(client->in + client->n_in, data, part);
			client->n_in += part;
			memcpy(header, client->in, 16);
			client->left = client->n_in == 16 ? header[3] : 1;
			client->too_long = client->n_in == 16 && header[3] > PV_XS_PAYLOAD_MAX;
		} else {
			client->left -= part;
		}
		data += part;
		n -= part;
		if (client->n_in == 16 && !client->left) {
			memcpy(header, client->in, 16);
			client->asked[client->n_asked++] = (struct asked){ header[0], header[1], header[2] };
			client->n_in = 0;
		}
	}
}

static void feed(struct client *client, const uint8_t *data, uint32_t n)
{
	if (client->n_asked + n / 16 + 1 >= QUEUE || pv_xs_broken(client->connection))
		return;
	note_input(client, data, n);
	pv_xs_feed(client->connection, data, n);
	must(!pv_xs_broken(client->connection) || client->too_long || !pv_xs_domid(client->connection));
}

static struct client *take_client(void)
{
	uint32_t number = take(&world.input, 1) % N_CLIENTS;
	struct client *client = &world.clients[number];

	if (!client->connection)
		client->connection = pv_xs_connect(world.hub, domids[number]);
	return client;
}

/* A word of the table, or one that is as long as the input says. */
static uint32_t take_word(uint8_t *at)
{
	uint32_t which = take(&world.input, 1), n = 0;

	if (which < 240) {
		const char *word = words[which % (sizeof words / sizeof *words)];

		n = (uint32_t)strlen(word);
		memcpy(at, word, n);
	} else if (which < 248) {
		for (uint32_t levels = take(&world.input, 1); levels--; n += 2)
			memcpy(at + n, "/a", 2);
	} else {
		n = take(&world.input, 2) % 1200;
		memset(at, 'z', n);
	}
	return n;
}

/*
 * An operation with words: operation, transaction, shape, words. Bits of the shape: 0 and 1 how many words (beside those
 * that the operation needs), 2 no last NUL, 3 to 6 all set: it is longer than a payload may be.
 */
static uint32_t take_request(uint8_t *packet)
{
	static const uint8_t usual[] = { 1, 2, 3, 4, 4, 5, 6, 6, 7, 11, 11, 11, 12, 12, 13, 13, 14, 14, 22, 21 };
	uint32_t op = take(&world.input, 1), transaction = take(&world.input, 1), shape = take(&world.input, 1), n = 0;
	uint32_t header[4];

	op = op < 200 ? usual[op % sizeof usual] : op - 200 < 28 ? op - 200 : take(&world.input, 4);
	for (uint32_t i = 0; i < (shape & 3) + (op == 4 || op == 11 || op == 14); i++) {
		n += take_word(packet + 16 + n);
		packet[16 + n++] = 0;
	}
	if (shape & 4 && n)
		n--;
	if (op == 6 && shape < 128) {
		n = 1;
		packet[16] = transaction = 0;
	}
	header[0] = op;
	header[1] = ++world.request_id;
	header[2] = transaction < 128 ? 0 : transaction & 7;
	if (n > PV_XS_PAYLOAD_MAX)
		n = PV_XS_PAYLOAD_MAX;
	if ((shape & 0x78) == 0x78)
		n = PV_XS_PAYLOAD_MAX + 1 + transaction;
	header[3] = n;
	memcpy(packet, header, sizeof header);
	return 16 + n;
}

/* -- what the caller does */

static void answer(uint32_t how)
{
	struct pv_xs_request request;
	uint32_t domid;

	if (pv_xs_unresolved(world.hub, &domid)) {
		must(domid < 0x7FF0);
		pv_xs_resolve(world.hub, domid <= N_GUESTS && how & 1);
	} else if (pv_xs_parked(world.hub, &request)) {
		must(request.domid == 0 && request.n_payload <= PV_XS_PAYLOAD_MAX);
		memset(buffer, 'p', sizeof buffer);
		if (how & 1)
			pv_xs_answer(world.hub, 1, (const uint8_t *)"ENOENT", 7);
		else
			pv_xs_answer(world.hub, 0, buffer, how & 2 ? 5000 : how & 4 ? 4096 : 3);
	}
}

static int is_parked(void)
{
	struct pv_xs_request request;
	uint32_t domid;

	return pv_xs_parked(world.hub, &request) || pv_xs_unresolved(world.hub, &domid);
}

/* As whoever moves bytes does: who may go on goes on. */
static void let_go_on(void)
{
	struct pv_xs_conn *connection;

	for (int i = 0; (connection = pv_xs_next_dirty(world.hub)); i++) {
		must(i < 100000);
		pv_xs_feed(connection, (const uint8_t *)"", 0);
	}
}

/* Answers are given, and those who waited behind a parked request go on. */
static void answer_all(void)
{
	for (int i = 0; i < 100000 && is_parked(); i++) {
		answer(0);
		for (int k = 0; k < N_CLIENTS; k++) {
			if (world.clients[k].connection)
				pv_xs_feed(world.clients[k].connection, (const uint8_t *)"", 0);
		}
		let_go_on();
	}
	must(!is_parked());
}

static void clear(struct client *client)
{
	client->n_asked = client->n_in = client->n_out = client->left = client->too_long = 0;
}

static void leave(struct client *client)
{
	pv_xs_conn_free(client->connection);
	client->connection = NULL;
	clear(client);
}

/* Domains end; those of their connections that the engine has closed are freed. */
static void forget(uint32_t mask)
{
	uint32_t gone[N_GUESTS], n = 0;

	for (uint32_t domid = 1; domid <= N_GUESTS; domid++) {
		if (mask >> domid & 1)
			gone[n++] = domid;
	}
	pv_xs_forget(world.hub, gone, n);
	for (int i = 0; i < N_CLIENTS; i++) {
		if (world.clients[i].connection && pv_xs_closed(world.clients[i].connection))
			leave(&world.clients[i]);
	}
}

static void set_domain(uint32_t domid, uint32_t bits)
{
	struct pv_xs_domain domain = { .domid = domid };

	pv_xs_get_domain(world.hub, domid, &domain);
	domain.introduced = bits & 1;
	domain.shut_down = bits >> 1 & 1;
	domain.has_target = bits >> 2 & 1;
	domain.target = 1 + (bits >> 3 & 3);
	domain.features = bits >> 4;
	pv_xs_set_domain(world.hub, &domain);
}

/* -- the journal */

static int is_open(int number)
{
	if (files[number] < 0)
		files[number] = memfd_create("fuzz", MFD_CLOEXEC);
	must(files[number] >= 0 && !ftruncate(files[number], 0) && !lseek(files[number], 0, SEEK_SET));
	return 1;
}

static void start_snapshot(void)
{
	if (world.snapshot)
		pv_xs_snapshot_abort(world.hub);
	world.snapshot = (uint8_t)is_open(1);
	pv_xs_snapshot_start(world.hub, files[1]);
}

static int step_snapshot(uint32_t n_nodes)
{
	int done = world.snapshot ? pv_xs_snapshot_step(world.hub, n_nodes) : 0;

	must(done >= 0);
	return done;
}

static void adopt(void)
{
	int former = files[0];

	if (step_snapshot(1) != 1)
		return;
	pv_xs_snapshot_adopt(world.hub);
	files[0] = files[1];
	files[1] = former;
	world.journal = 1;
	world.snapshot = 0;
}

static uint32_t ask(struct pv_xs_conn *connection, uint32_t op, const char *path, uint8_t *reply)
{
	uint32_t n = (uint32_t)strlen(path) + 1, header[4] = { op, 1, 0, n };
	uint8_t packet[16 + PV_XS_PAYLOAD_MAX];

	memcpy(packet, header, sizeof header);
	memcpy(packet + sizeof header, path, n);
	pv_xs_feed(connection, packet, 16 + n);
	n = pv_xs_output(connection, reply, 16 + PV_XS_PAYLOAD_MAX);
	pv_xs_sent(connection, n);
	must(n > 16 || (n == 16 && op != 3));
	return n;
}

/* Both stores have the same nodes, in the same order, with the same values and permissions. */
static void compare_trees(struct pv_xs *hub, struct pv_xs *other)
{
	static const uint32_t looks[] = { 1, 2, 3 };
	struct pv_xs_conn *left = pv_xs_connect(hub, 0), *right = pv_xs_connect(other, 0);
	static uint8_t replies[2][16 + PV_XS_PAYLOAD_MAX];
	char **stack = malloc(sizeof *stack);
	uint32_t n_stack = 1;

	stack[0] = strdup("/");
	while (n_stack) {
		char *path = stack[--n_stack];

		for (uint32_t i = 3; i-- > 0;) {
			uint32_t n = ask(left, looks[i], path, replies[0]);

			must(n == ask(right, looks[i], path, replies[1]));
			must(!memcmp(replies[0], replies[1], n));
			replies[0][n - (n == 16 + PV_XS_PAYLOAD_MAX)] = 0;
			for (uint32_t at = 16; i == 0 && replies[0][0] == 1 && at < n;) {
				char *name = (char *)replies[0] + at;

				stack = realloc(stack, (n_stack + 1) * sizeof *stack);
				must(asprintf(&stack[n_stack++], "%s/%s", path[1] ? path : "", name) > 0);
				at += (uint32_t)strlen(name) + 1;
			}
		}
		free(path);
	}
	for (uint32_t i = 0; i < 2; i++) {
		const char *name = i ? "@releaseDomain" : "@introduceDomain";

		must(ask(left, 3, name, replies[0]) == ask(right, 3, name, replies[1]));
		must(!strcmp((char *)replies[0] + 16, (char *)replies[1] + 16));
	}
	free(stack);
	pv_xs_conn_free(left);
	pv_xs_conn_free(right);
}

static void compare_domains(struct pv_xs *hub, struct pv_xs *other)
{
	struct pv_xs_domain left, right;

	for (uint32_t domid = 0; domid <= N_GUESTS; domid++) {
		if (!pv_xs_get_domain(hub, domid, &left) || !left.introduced)
			continue;
		must(pv_xs_get_domain(other, domid, &right));
		must(right.known && left.n_nodes == right.n_nodes && left.features == right.features);
		must(left.introduced == right.introduced && left.shut_down == right.shut_down);
		must(left.has_target == right.has_target && (!left.has_target || left.target == right.target));
		must(!memcmp(left.quotas, right.quotas, sizeof left.quotas));
	}
}

/* Hand a live update's state to another store, and have that save it in its turn: how many bytes. */
static int64_t hand_over(struct pv_xs *other, uint8_t **state, int64_t n)
{
	int result = pv_xs_state_load(other, *state, (uint64_t)n);

	must(!result && !pv_xs_check(other));
	pv_xs_state_free(*state);
	for (uint32_t domid = 1; domid <= N_GUESTS; domid++) {
		if (pv_xs_ring_of(other, domid))
			pv_xs_serve_ring(pv_xs_ring_of(other, domid), page[3], &port, PV_XS_RING_FRESH);
	}
	n = pv_xs_state_save(other, state);
	for (uint32_t domid = 1; domid <= N_GUESTS; domid++) {
		if (pv_xs_ring_of(other, domid))
			pv_xs_conn_free(pv_xs_ring_of(other, domid));
	}
	return n;
}

/* Ring connections have what they had after two live updates (each turns the order of open transactions round). */
static void compare_state(struct pv_xs *hub, struct pv_xs *other)
{
	uint8_t *state, *again;
	int64_t n = pv_xs_state_save(hub, &state);

	must(pv_xs_state_save(hub, &again) == n);
	must(hand_over(other, &again, n) == n);
	must(hand_over(other, &again, n) == n && !memcmp(state, again, (size_t)n));
	pv_xs_state_free(state);
	pv_xs_state_free(again);
}

/* Make a second store of what is in the journal. */
static void reload(void)
{
	struct pv_xs *other;
	uint64_t n_good, n;
	uint8_t *data;

	if (!world.journal || is_parked())
		return;
	must(!pv_xs_journal_flush(world.hub));
	n = (uint64_t)lseek(files[0], 0, SEEK_END);
	data = malloc(n);
	must(pread(files[0], data, n, 0) == (ssize_t)n);
	other = pv_xs_new(2);
	must(!pv_xs_journal_load(other, data, n, &n_good) && n_good == n);
	free(data);
	must(!pv_xs_check(other));
	compare_trees(world.hub, other);
	compare_domains(world.hub, other);
	compare_state(world.hub, other);
	pv_xs_free(other);
}

static void journal(void)
{
	world.journal = (uint8_t)is_open(0);
	if (world.snapshot)
		pv_xs_snapshot_abort(world.hub);
	world.snapshot = 0;
	start_snapshot();
	while (!step_snapshot(64))
		;
	adopt();
}

static void serve_ring(struct client *client)
{
	uint32_t domid = pv_xs_domid(client->connection);

	if (domid && (!pv_xs_ring_of(world.hub, domid) || pv_xs_ring_of(world.hub, domid) == client->connection))
		pv_xs_serve_ring(client->connection, page[domid % 3], &port, PV_XS_RING_FRESH);
}

static void trace(uint32_t how)
{
	uint64_t first = how & 7, lost;

	if (how & 8)
		pv_xs_trace_until(world.hub, world.now_ms + 1000);
	must(pv_xs_trace_read(world.hub, &first, &lost, buffer, how & 16 ? 4096 : how) <= 4096);
}

static void request(struct client *client)
{
	static uint8_t packet[16 + 8192];
	uint32_t n = take_request(packet);

	feed(client, packet, n);
}

/* The same in two parts, with something between them. */
static void cut_request(struct client *client)
{
	static uint8_t packet[16 + 8192];
	uint32_t cut = take(&world.input, 1), n = take_request(packet);

	cut %= n;
	feed(client, packet, cut);
	let_go_on();
	feed(client, packet + cut, n - cut);
}

static void step(void)
{
	struct input *input = &world.input;
	enum step kind = take(input, 1) % N_KINDS;
	size_t n;

	switch (kind) {
	case REQUEST: case REQUEST2: case REQUEST3: case REQUEST4: request(take_client()); break;
	case CUT: cut_request(take_client()); break;
	case RAW: {
		struct client *client = take_client();
		const uint8_t *data;

		n = take(input, 1) | (size_t)(take(input, 1) % 17) << 8;
		data = take_bytes(input, &n);
		feed(client, data, (uint32_t)n);
		break;
	}
	case SEND_SOME: {
		struct client *client = take_client();

		send_output(client, take(input, 1));
		break;
	}
	case SEND_ALL: case SEND_ALL2: send_output(take_client(), sizeof buffer); break;
	case TIME:
		pv_xs_set_now(world.hub, world.now_ms += take(input, 2));
		pv_xs_on_time(world.hub);
		must(pv_xs_next_timeout(world.hub) >= -1);
		break;
	case HOLD: world.hold = 1 + take(input, 1) % 8; break;
	case ANSWER: answer(take(input, 1)); break;
	case RESET: {
		struct client *client = take_client();

		pv_xs_reset(client->connection);
		clear(client);
		break;
	}
	case LEAVE: leave(take_client()); break;
	case FORGET: forget(take(input, 1) & 0x1E); break;
	case QUOTA: {
		uint32_t domid = take(input, 1) & 7, quota = take(input, 1) % PV_XS_N_QUOTAS;

		pv_xs_set_quota(world.hub, domid == 7 ? PV_XS_GLOBAL : domid, quota, take(input, 1) * (quota == 3 ? 16 : 1));
		break;
	}
	case LIMIT:
		pv_xs_limits_of(world.hub)->privileged_output_bytes = 100 + take(input, 2);
		pv_xs_limits_of(world.hub)->event_timeout_ms = take(input, 1);
		break;
	case DOMAIN: n = 1 + take(input, 1) % 3; set_domain((uint32_t)n, take(input, 1)); break;
	case SPECIAL: n = take(input, 1); pv_xs_fire_special(world.hub, n & 1, n >> 1 & 3); break;
	case JOURNAL: journal(); break;
	case SNAPSHOT: if (world.journal) start_snapshot(); break;
	case STEP: step_snapshot(take(input, 1) % 8); break;
	case ADOPT: adopt(); break;
	case RELOAD: if (world.n_reloads++ < 2) reload(); break;
	case TRACE: trace(take(input, 1)); break;
	case RING: serve_ring(take_client()); break;
	default: break;
	}
	let_go_on();
	if (world.hold)
		world.hold--;
	else
		answer_all();
}

/* Everybody leaves: nothing is held for guests any more. */
static void end_all(void)
{
	struct pv_xs_statistics statistics;
	struct pv_xs_domain domain;

	for (int i = 0; i < N_CLIENTS; i++) {
		if (world.clients[i].connection)
			leave(&world.clients[i]);
	}
	forget(0x3FE);
	must(!pv_xs_check(world.hub));
	for (uint32_t domid = 1; domid <= N_GUESTS; domid++) {
		if (!pv_xs_get_domain(world.hub, domid, &domain))
			continue;
		must(!domain.known && !domain.memory_bytes && !domain.n_nodes && !domain.n_watches && !domain.n_transactions);
		must(!domain.n_outstanding && !domain.n_connections);
	}
	pv_xs_get_statistics(world.hub, &statistics);
	must(!statistics.watches && !statistics.connections && !statistics.transactions);
	must(pv_xs_get_domain(world.hub, 0, &domain) && (int64_t)statistics.memory_bytes == domain.memory_bytes);
	must(pv_xs_next_timeout(world.hub) == -1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	world.hub = pv_xs_new(1);
	world.input = (struct input){ data, n };
	world.now_ms = world.request_id = world.hold = world.n_reloads = world.journal = world.snapshot = 0;
	for (int i = 0; i < N_STEPS && world.input.left; i++)
		step();
	answer_all();
	must(!pv_xs_check(world.hub));
	if (n & 1) /* one of the two is enough for each input */
		reload();
	end_all();
	if (!(n & 1))
		reload();
	pv_xs_free(world.hub);
	return 0;
}
