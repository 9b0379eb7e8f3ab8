/* SPDX-License-Identifier: MIT */
/*
 * A load on a xenstore daemon, from one thread over raw sockets. Prints one JSON object.
 *
 *   xenstore_load populate --socket PATH [--nodes N]       make the tree that the others use
 *   xenstore_load read|write|perms|miss|directory-100|directory-1000|directory-part ...
 *   xenstore_load transaction ...                          start; then three writes and the commit at once
 *   xenstore_load watch ...                                --connections watchers: from the write to each event
 *   xenstore_load domains --domains N ...                  N domains connect three devices each, all at once
 *   xenstore_load flood --kind KIND ...                    a hostile client
 *
 * Options: --socket PATH or --fd N (repeated), --connections, --depth, --seconds, --nodes, --per-directory, --pid (of
 * the daemon: also its CPU time), --cpu (to run on), --polite (give way to others), --verify (look at every answer).
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "xenstore_load.h"
#include "xenstore_tree.h"

#define WRITES_IN_TRANSACTION 3
#define TRANSACTION_PLACES 64
#define DRAIN_S 10

struct options options = {
	.cpu = -1, .connections = 1, .depth = 1, .nodes = 10000, .per_directory = 100, .domains = 500, .seconds = 1.0,
};
struct result result;

static const struct operation *operation;
static uint64_t seed = 88172645463325252u;

/* Links, and what is counted. */

struct link *open_links(struct poller *poller, uint32_t *count)
{
	struct link *links;

	*count = options.n_fds ? options.n_fds : options.connections;
	links = calloc(*count, sizeof *links);
	if (!links)
		fail("no memory");
	poller_open(poller);
	for (uint32_t i = 0; i < *count; i++) {
		if (options.n_fds)
			link_adopt(&links[i], i, options.fds[i]);
		else
			link_connect(&links[i], i, options.socket);
		poller_add(poller, &links[i]);
	}
	return links;
}

void note_error(const struct message *message)
{
	if (!result.errors++)
		snprintf(result.first_error, sizeof result.first_error, "%.*s",
			 (int)strnlen(message->body, message->header.n_bytes), message->body);
}

void measure_start(void)
{
	result.cpu_ns = process_cpu_ns(options.pid);
	result.own_cpu_ns = own_cpu_ns();
	result.start_ns = now_ns();
}

void measure_end(void)
{
	result.end_ns = now_ns();
	result.own_cpu_ns = own_cpu_ns() - result.own_cpu_ns;
	result.cpu_ns = process_cpu_ns(options.pid) - result.cpu_ns;
}

static void check(const struct message *message)
{
	if (message->header.type == OP_ERROR && !operation->expects_error)
		note_error(message);
	else if (options.verify && !operation->check(message, message->question.tag))
		result.mismatches++;
}

static void ask_operation(struct link *link)
{
	uint32_t node = (uint32_t)(random_next(&seed) % options.nodes);
	char body[PATH_BYTES + 16];
	size_t n_bytes;

	if (operation->place)
		strcpy(body, operation->place);
	else
		node_path(body, node);
	n_bytes = strlen(body) + 1;
	if (operation->argument) {
		strcpy(body + n_bytes, operation->argument);
		n_bytes += strlen(operation->argument) + 1;
	}
	if (operation->type == OP_WRITE) {
		node_value(body + n_bytes, node, &seed);
		n_bytes += 8;
	}
	link_ask(link, operation->type, 0, body, n_bytes, 0, node);
}

/* An answer: count it. */
static void count(const struct message *message, int64_t since_ns)
{
	check(message);
	histogram_add(&result.latencies, now_ns() - since_ns);
	result.operations++;
}

/*
 * Answers that come after the end are no operations, but their latencies count: a daemon that stands still until the end
 * must not look fast. And it has to be at rest when the next one is measured.
 */
static void drain(struct poller *poller, struct link *links, uint32_t n_links)
{
	int64_t deadline = now_ns() + (int64_t)DRAIN_S * 1000000000;
	struct link *ready[64];
	struct message message;

	for (uint32_t i = 0; i < n_links; i++)
		while (link_outstanding(&links[i])) {
			int n = poller_wait(poller, ready, 64, 100);

			for (int j = 0; j < n; j++) {
				link_receive(ready[j]);
				while (link_next(ready[j], &message))
					histogram_add(&result.latencies, now_ns() - message.question.sent_ns);
				poller_flush(poller, ready[j]);
			}
			if (now_ns() > deadline)
				fail("connection %u: no answer for %d s", i, DRAIN_S);
		}
	for (uint32_t i = 0; i < n_links; i++)
		link_close(&links[i]);
	free(links);
}

static void run_operation(void)
{
	struct poller poller;
	uint32_t n_links;
	struct link *links = open_links(&poller, &n_links), *ready[64];
	struct message message;
	int64_t end;

	measure_start();
	end = result.start_ns + (int64_t)(options.seconds * 1e9);
	for (uint32_t i = 0; i < n_links; i++) {
		for (uint32_t j = 0; j < options.depth; j++)
			ask_operation(&links[i]);
		poller_flush(&poller, &links[i]);
	}
	while (now_ns() < end) {
		int n = poller_wait(&poller, ready, 64, 100);

		for (int i = 0; i < n; i++) {
			link_receive(ready[i]);
			while (link_next(ready[i], &message)) {
				count(&message, message.question.sent_ns);
				ask_operation(ready[i]);
			}
			poller_flush(&poller, ready[i]);
		}
	}
	measure_end();
	drain(&poller, links, n_links);
}

/* Populate. */

static bool ask_next_node(struct link *link, uint32_t i)
{
	uint32_t small = i - options.nodes;
	char path[PATH_BYTES], value[16], name[4];

	if (i < options.nodes) {
		node_path(path, i);
		node_value(value, i, &seed);
	} else if (small < NARROW + WIDE) {
		child_name(name, small < NARROW ? small : small - NARROW);
		snprintf(path, sizeof path, TREE "/%s/%s", small < NARROW ? "w100" : "w1000", name);
		strcpy(value, "x");
	} else if (small < NARROW + WIDE + TRANSACTION_PLACES * WRITES_IN_TRANSACTION) {
		small -= NARROW + WIDE;
		snprintf(path, sizeof path, TREE "/t%u/k%u", small / WRITES_IN_TRANSACTION, small % WRITES_IN_TRANSACTION);
		strcpy(value, "00000000");
	} else {
		return false;
	}
	link_write(link, 0, path, value, 0, i);
	return true;
}

static void run_populate(void)
{
	struct poller poller;
	uint32_t n_links, next = 0;
	struct link *links, *ready[1];
	struct message message;
	bool more = true;

	operation = find_operation("write");
	options.connections = 1;
	links = open_links(&poller, &n_links);
	measure_start();
	while (more || link_outstanding(links)) {
		while (more && link_outstanding(links) < options.depth)
			more = ask_next_node(links, next++);
		poller_flush(&poller, links);
		if (poller_wait(&poller, ready, 1, 100))
			link_receive(links);
		while (link_next(links, &message))
			count(&message, message.question.sent_ns);
	}
	measure_end();
	link_close(links);
	free(links);
}

/* Transactions: one at a time on each connection, each in a directory of its own. */

enum { STARTED, WRITTEN, ENDED };

static int64_t *transaction_start_ns;

static void transaction_begin(struct link *link)
{
	transaction_start_ns[link->number] = now_ns();
	link_name(link, OP_TRANSACTION_START, 0, "", STARTED, 0);
}

static void transaction_body(struct link *link, uint32_t id)
{
	char path[PATH_BYTES], value[16];

	for (uint32_t i = 0; i < WRITES_IN_TRANSACTION; i++) {
		snprintf(path, sizeof path, TREE "/t%u/k%u", link->number % TRANSACTION_PLACES, i);
		snprintf(value, sizeof value, "%08u", (uint32_t)(random_next(&seed) % 100000000));
		link_write(link, id, path, value, WRITTEN, 0);
	}
	link_name(link, OP_TRANSACTION_END, id, "T", ENDED, 0);
}

static void transaction_answer(struct link *link, const struct message *message)
{
	if (message->question.kind == STARTED) {
		if (message->header.type == OP_ERROR)
			fail("no transaction: %s", message->body);
		transaction_body(link, (uint32_t)strtoul(message->body, NULL, 10));
	} else if (message->question.kind == WRITTEN) {
		check(message);
	} else {
		if (message_is_error(message, "EAGAIN"))
			result.eagain++;
		else
			count(message, transaction_start_ns[link->number]);
		transaction_begin(link);
	}
}

static void run_transactions(void)
{
	struct poller poller;
	uint32_t n_links;
	struct link *links = open_links(&poller, &n_links), *ready[64];
	struct message message;
	int64_t end;

	operation = find_operation("write");
	transaction_start_ns = calloc(n_links, sizeof *transaction_start_ns);
	if (!transaction_start_ns)
		fail("no memory");
	measure_start();
	end = result.start_ns + (int64_t)(options.seconds * 1e9);
	for (uint32_t i = 0; i < n_links; i++) {
		transaction_begin(&links[i]);
		poller_flush(&poller, &links[i]);
	}
	while (now_ns() < end) {
		int n = poller_wait(&poller, ready, 64, 100);

		for (int i = 0; i < n; i++) {
			link_receive(ready[i]);
			while (link_next(ready[i], &message))
				transaction_answer(ready[i], &message);
			poller_flush(&poller, ready[i]);
		}
	}
	measure_end();
	drain(&poller, links, n_links);
	free(transaction_start_ns);
}

/* Watches. */

static bool is_event(const struct message *message, const char *path)
{
	static const char token[] = "token";
	size_t path_bytes = strlen(path) + 1;

	return message->header.n_bytes == path_bytes + sizeof token && memcmp(message->body, path, path_bytes) == 0 &&
	       memcmp(message->body + path_bytes, token, sizeof token) == 0;
}

/* Take what the watchers and the writer get until so many answers and events came; events count for `path`. */
static void take_all(struct poller *poller, uint32_t answers, uint32_t events, const char *path, int64_t since_ns)
{
	struct link *ready[64];
	struct message message;

	while (answers || events) {
		int n = poller_wait(poller, ready, 64, DRAIN_S * 1000);

		if (!n)
			fail("%u answers and %u events are missing", answers, events);
		for (int i = 0; i < n; i++) {
			link_receive(ready[i]);
			while (link_next(ready[i], &message)) {
				if (message.header.type != OP_WATCH_EVENT) {
					check(&message);
					answers--;
					continue;
				}
				if (options.verify && !is_event(&message, path))
					result.mismatches++;
				if (since_ns)
					histogram_add(&result.latencies, now_ns() - since_ns);
				events--;
			}
		}
	}
}

static void run_watch(void)
{
	static const char watched[] = TREE "/watched", written[] = TREE "/watched/node", request[] = TREE "/watched\0token";
	uint32_t watchers = options.connections, n_links;
	struct poller poller;
	struct link *links, *writer;
	char value[16];
	int64_t end;

	operation = find_operation("write");
	options.connections++;
	links = open_links(&poller, &n_links);
	writer = &links[watchers];
	link_write(writer, 0, written, "0", 0, 0);
	poller_flush(&poller, writer);
	take_all(&poller, 1, 0, watched, 0);
	for (uint32_t i = 0; i < watchers; i++) {
		link_ask(&links[i], OP_WATCH, 0, request, sizeof request, 0, 0);
		poller_flush(&poller, &links[i]);
	}
	take_all(&poller, watchers, watchers, watched, 0);
	measure_start();
	end = result.start_ns + (int64_t)(options.seconds * 1e9);
	while (now_ns() < end) {
		int64_t sent_ns = now_ns();

		node_value(value, 0, &seed);
		link_write(writer, 0, written, value, 0, 0);
		poller_flush(&poller, writer);
		take_all(&poller, 1, watchers, written, sent_ns);
		result.operations++;
		result.events += watchers;
	}
	measure_end();
	drain(&poller, links, n_links);
}

/* Command line and result. */

static void print_result(void)
{
	double seconds = (double)(result.end_ns - result.start_ns) / 1e9;
	const struct histogram *latencies = &result.latencies;

	printf("{\"mode\": \"%s\", \"seconds\": %.6f, \"operations\": %" PRIu64 ", \"per_second\": %.1f", options.mode, seconds,
	       result.operations, (double)result.operations / seconds);
	printf(", \"events\": %" PRIu64 ", \"eagain\": %" PRIu64 ", \"errors\": %" PRIu64, result.events, result.eagain,
	       result.errors);
	printf(", \"first_error\": \"%s\", \"mismatches\": %" PRIu64 ", \"lost\": %" PRIu64 ", \"unfinished\": %" PRIu64,
	       result.first_error, result.mismatches, result.lost, result.unfinished);
	printf(", \"p50_us\": %.2f, \"p99_us\": %.2f, \"max_us\": %.2f", (double)histogram_share(latencies, 0.50) / 1e3,
	       (double)histogram_share(latencies, 0.99) / 1e3, (double)latencies->max_ns / 1e3);
	if (options.pid && result.operations)
		printf(", \"cpu_us\": %.3f", (double)result.cpu_ns / 1e3 / (double)result.operations);
	else
		printf(", \"cpu_us\": null");
	printf(", \"load_cpu_us\": %.3f}\n", (double)result.own_cpu_ns / 1e3 / (double)(result.operations ? result.operations : 1));
}

static const struct option long_options[] = {
	{"socket", required_argument, NULL, 's'}, {"fd", required_argument, NULL, 'f'},
	{"pid", required_argument, NULL, 'p'}, {"cpu", required_argument, NULL, 'C'},
	{"connections", required_argument, NULL, 'c'}, {"depth", required_argument, NULL, 'd'},
	{"seconds", required_argument, NULL, 't'}, {"nodes", required_argument, NULL, 'n'},
	{"per-directory", required_argument, NULL, 'D'}, {"domains", required_argument, NULL, 'N'},
	{"kind", required_argument, NULL, 'k'}, {"verify", no_argument, NULL, 'v'},
	{"polite", no_argument, NULL, 'l'}, {0},
};

static uint32_t number(const char *text)
{
	char *end;
	unsigned long value = strtoul(text, &end, 10);

	if (*end || end == text || value > INT32_MAX) {
		fprintf(stderr, "xenstore_load: %s is not a number\n", text);
		exit(EXIT_USAGE);
	}
	return (uint32_t)value;
}

static void parse(int argc, char **argv)
{
	int option;

	while ((option = getopt_long(argc, argv, "", long_options, NULL)) >= 0)
		switch (option) {
		case 's': options.socket = optarg; break;
		case 'p': options.pid = (int)number(optarg); break;
		case 'C': options.cpu = (int)number(optarg); break;
		case 'c': options.connections = number(optarg); break;
		case 'd': options.depth = number(optarg); break;
		case 't': options.seconds = atof(optarg); break;
		case 'n': options.nodes = number(optarg); break;
		case 'D': options.per_directory = number(optarg); break;
		case 'N': options.domains = number(optarg); break;
		case 'k': options.kind = optarg; break;
		case 'v': options.verify = true; break;
		case 'l': options.polite = true; break;
		case 'f':
			if (options.n_fds < MAX_LINKS)
				options.fds[options.n_fds++] = (int)number(optarg);
			break;
		default: exit(EXIT_USAGE);
		}
	if (optind != argc - 1 || (!options.socket && !options.n_fds) || !options.connections || !options.depth ||
	    options.connections >= MAX_LINKS || !options.nodes || !options.per_directory || !options.domains) {
		fputs("usage: xenstore_load MODE --socket PATH|--fd N [OPTION ...]; see the source\n", stderr);
		exit(EXIT_USAGE);
	}
	options.mode = argv[optind];
}

static void run(void)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} modes[] = {
		{"populate", run_populate}, {"transaction", run_transactions}, {"watch", run_watch},
		{"domains", run_domains}, {"flood", run_flood},
	};

	operation = find_operation(options.mode);
	if (operation) {
		run_operation();
		return;
	}
	for (size_t i = 0; i < sizeof modes / sizeof *modes; i++)
		if (!strcmp(modes[i].name, options.mode)) {
			modes[i].run();
			return;
		}
	fprintf(stderr, "xenstore_load: no mode %s\n", options.mode);
	exit(EXIT_USAGE);
}

static void settle(void)
{
	struct sched_param none = {0};
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(options.cpu < 0 ? 0 : options.cpu, &set);
	if (options.cpu >= 0 && sched_setaffinity(0, sizeof set, &set) < 0)
		fail("cannot run on CPU %d", options.cpu);
	if (options.polite && sched_setscheduler(0, SCHED_IDLE, &none) < 0)
		fail("cannot be polite");
}

int main(int argc, char **argv)
{
	parse(argc, argv);
	settle();
	run();
	print_result();
	return options.verify && (result.errors || result.mismatches || result.unfinished) ? 1 : 0;
}
