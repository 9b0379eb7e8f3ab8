/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "xenstore_client.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define IN_BYTES (256 << 10)
#define FIRST_SLOTS 64

void fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fputs("xenstore_load: ", stderr);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	va_end(arguments);
	exit(EXIT_BROKEN);
}

static int64_t read_clock(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int64_t now_ns(void)
{
	return read_clock(CLOCK_MONOTONIC);
}

/* xorshift64; the seed must not be 0. */
uint64_t random_next(uint64_t *seed)
{
	*seed ^= *seed << 13;
	*seed ^= *seed >> 7;
	*seed ^= *seed << 17;
	return *seed;
}

static void *grown(void *memory, size_t n_bytes)
{
	memory = realloc(memory, n_bytes);
	if (!memory)
		fail("no memory");
	return memory;
}

/* Links. */

void link_adopt(struct link *link, uint32_t number, int fd)
{
	*link = (struct link){.fd = fd, .number = number, .n_slots = FIRST_SLOTS, .in_size = IN_BYTES};
	link->questions = grown(NULL, link->n_slots * sizeof *link->questions);
	link->in = grown(NULL, link->in_size);
	if (fcntl(fd, F_SETFL, O_NONBLOCK) < 0)
		fail("descriptor %d: %s", fd, strerror(errno));
}

void link_connect(struct link *link, uint32_t number, const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (strlen(path) >= sizeof address.sun_path)
		fail("the path %s is too long for a socket", path);
	memcpy(address.sun_path, path, strlen(path));
	if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
		fail("%s: %s", path, strerror(errno));
	link_adopt(link, number, fd);
}

void link_close(struct link *link)
{
	close(link->fd);
	free(link->questions);
	free(link->out);
	free(link->in);
}

uint32_t link_outstanding(const struct link *link)
{
	return link->asked - link->answered;
}

static void make_room(struct link *link, size_t n_bytes)
{
	if (link->out_from == link->out_to)
		link->out_from = link->out_to = 0;
	if (link->out_to + n_bytes <= link->out_size)
		return;
	link->out_size = 2 * (link->out_to + n_bytes);
	link->out = grown(link->out, link->out_size);
}

static void note_question(struct link *link, struct question question)
{
	if (link_outstanding(link) == link->n_slots) {
		struct question *wider = grown(NULL, 2 * link->n_slots * sizeof *wider);

		for (uint32_t i = link->answered; i != link->asked; i++)
			wider[i & (2 * link->n_slots - 1)] = link->questions[i & (link->n_slots - 1)];
		free(link->questions);
		link->questions = wider;
		link->n_slots *= 2;
	}
	link->questions[link->asked++ & (link->n_slots - 1)] = question;
}

static void put(struct link *link, const void *bytes, size_t n_bytes)
{
	memcpy(link->out + link->out_to, bytes, n_bytes);
	link->out_to += n_bytes;
}

static void put_header(struct link *link, enum op type, uint32_t transaction, size_t n_bytes, uint32_t kind, uint32_t tag)
{
	struct header header = {type, ++link->last_id, transaction, (uint32_t)n_bytes};

	make_room(link, sizeof header + n_bytes);
	put(link, &header, sizeof header);
	note_question(link, (struct question){type, header.id, kind, tag, now_ns()});
}

void link_ask(struct link *link, enum op type, uint32_t transaction, const void *body, size_t n_bytes, uint32_t kind,
	      uint32_t tag)
{
	put_header(link, type, transaction, n_bytes, kind, tag);
	put(link, body, n_bytes);
}

void link_write(struct link *link, uint32_t transaction, const char *path, const char *value, uint32_t kind, uint32_t tag)
{
	size_t path_bytes = strlen(path) + 1, value_bytes = strlen(value);

	put_header(link, OP_WRITE, transaction, path_bytes + value_bytes, kind, tag);
	put(link, path, path_bytes);
	put(link, value, value_bytes);
}

void link_name(struct link *link, enum op type, uint32_t transaction, const char *path, uint32_t kind, uint32_t tag)
{
	link_ask(link, type, transaction, path, strlen(path) + 1, kind, tag);
}

void link_raw(struct link *link, const void *bytes, size_t n_bytes)
{
	make_room(link, n_bytes);
	put(link, bytes, n_bytes);
}

static void lose(struct link *link, const char *why)
{
	if (!link->may_lose)
		fail("connection %u: %s", link->number, why);
	link->lost = true;
}

bool link_flush(struct link *link)
{
	while (!link->lost && link->out_from < link->out_to) {
		ssize_t n = send(link->fd, link->out + link->out_from, link->out_to - link->out_from, MSG_NOSIGNAL);

		if (n >= 0) {
			link->out_from += (size_t)n;
			link->sent_bytes += (size_t)n;
		} else if (errno == EAGAIN) {
			return false;
		} else if (errno != EINTR) {
			lose(link, strerror(errno));
		}
	}
	return true;
}

bool link_receive(struct link *link)
{
	ssize_t n;

	if (link->in_from) {
		memmove(link->in, link->in + link->in_from, link->in_to - link->in_from);
		link->in_to -= link->in_from;
		link->in_from = 0;
	}
	n = recv(link->fd, link->in + link->in_to, link->in_size - link->in_to, 0);
	if (n > 0)
		link->in_to += (size_t)n;
	else if (n == 0)
		lose(link, "the daemon hung up");
	else if (errno != EAGAIN && errno != EINTR)
		lose(link, strerror(errno));
	return n > 0;
}

bool link_next(struct link *link, struct message *message)
{
	size_t available = link->in_to - link->in_from;
	struct header *header = &message->header;

	if (available < sizeof *header)
		return false;
	memcpy(header, link->in + link->in_from, sizeof *header);
	if (header->n_bytes > 2 * PAYLOAD_MAX)
		fail("connection %u: an answer of %u bytes", link->number, header->n_bytes);
	if (available < sizeof *header + header->n_bytes)
		return false;
	message->body = link->in + link->in_from + sizeof *header;
	link->in_from += sizeof *header + header->n_bytes;
	message->question = (struct question){0};
	if (header->type == OP_WATCH_EVENT)
		return true;
	if (!link_outstanding(link)) {
		if (!link->may_lose)
			fail("connection %u: an answer that nobody asked for", link->number);
		return true;
	}
	message->question = link->questions[link->answered++ & (link->n_slots - 1)];
	if (!link->may_lose && (header->id != message->question.id ||
				(header->type != OP_ERROR && header->type != message->question.type)))
		fail("connection %u: asked %u as %u, got %u as %u", link->number, message->question.type,
		     message->question.id, header->type, header->id);
	return true;
}

bool message_is_error(const struct message *message, const char *name)
{
	return message->header.type == OP_ERROR && message->header.n_bytes == strlen(name) + 1 &&
	       memcmp(message->body, name, strlen(name) + 1) == 0;
}

/* Poller. */

static void poll_for(struct poller *poller, struct link *link, int how, bool room)
{
	struct epoll_event event = {.events = EPOLLIN | (room ? EPOLLOUT : 0), .data.ptr = link};

	link->polled_for_room = room;
	if (epoll_ctl(poller->fd, how, link->fd, &event) < 0)
		fail("epoll: %s", strerror(errno));
}

void poller_open(struct poller *poller)
{
	poller->fd = epoll_create1(EPOLL_CLOEXEC);
	if (poller->fd < 0)
		fail("epoll: %s", strerror(errno));
}

void poller_add(struct poller *poller, struct link *link)
{
	poll_for(poller, link, EPOLL_CTL_ADD, false);
}

void poller_flush(struct poller *poller, struct link *link)
{
	bool room = !link_flush(link);

	if (link->lost)
		epoll_ctl(poller->fd, EPOLL_CTL_DEL, link->fd, NULL);
	else if (room != link->polled_for_room)
		poll_for(poller, link, EPOLL_CTL_MOD, room);
}

int poller_wait(struct poller *poller, struct link **links, int max, int timeout_ms)
{
	struct epoll_event events[64];
	int n = epoll_wait(poller->fd, events, max < 64 ? max : 64, timeout_ms);

	for (int i = 0; i < n; i++)
		links[i] = events[i].data.ptr;
	return n < 0 ? 0 : n;
}

/* Latencies: 2^SUB_BITS buckets for each power of two. */

void histogram_add(struct histogram *histogram, int64_t ns)
{
	uint64_t value = ns > 0 ? (uint64_t)ns : 0;
	uint32_t shift = value >> SUB_BITS ? (uint32_t)(63 - __builtin_clzll(value)) - SUB_BITS : 0;
	uint32_t bucket = (shift << SUB_BITS) + (uint32_t)(value >> shift);

	histogram->counts[bucket]++;
	histogram->n++;
	if (ns > histogram->max_ns)
		histogram->max_ns = ns;
}

int64_t histogram_share(const struct histogram *histogram, double share)
{
	uint64_t wanted = (uint64_t)((double)histogram->n * share), seen = 0;

	for (uint32_t bucket = 0; bucket < 64 << SUB_BITS; bucket++) {
		seen += histogram->counts[bucket];
		if (seen > wanted || (seen && seen == histogram->n)) {
			uint32_t shift = bucket >> SUB_BITS ? (bucket >> SUB_BITS) - 1 : 0;

			return (int64_t)((uint64_t)(bucket - (shift << SUB_BITS)) << shift);
		}
	}
	return 0;
}

/* CPU time. */

int64_t own_cpu_ns(void)
{
	return read_clock(CLOCK_PROCESS_CPUTIME_ID);
}

int64_t process_cpu_ns(int pid)
{
	char path[300];
	struct dirent *entry;
	int64_t total = 0;
	DIR *tasks;

	if (!pid)
		return 0;
	snprintf(path, sizeof path, "/proc/%d/task", pid);
	tasks = opendir(path);
	if (!tasks)
		fail("there is no process %d", pid);
	while ((entry = readdir(tasks))) {
		long long ns = 0;
		FILE *file;

		if (entry->d_name[0] == '.')
			continue;
		snprintf(path, sizeof path, "/proc/%d/task/%s/schedstat", pid, entry->d_name);
		file = fopen(path, "r");
		if (file && fscanf(file, "%lld", &ns) == 1)
			total += ns;
		if (file)
			fclose(file);
	}
	closedir(tasks);
	return total;
}
