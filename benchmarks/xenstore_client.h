/* SPDX-License-Identifier: MIT */
/*
 * xenstore's wire as a load generator needs it: links that pipeline, one epoll set, latencies, the daemon's CPU time.
 *
 * Nothing here blocks but `poller_wait`, and nothing is sent before `link_flush`. Whatever breaks (a daemon that hangs
 * up, an answer that was not asked for) ends the program with a line on standard error: a benchmark must not go on.
 *
 * Source: Xen public/io/xs_wire.h.
 */
#ifndef XENSTORE_CLIENT_H
#define XENSTORE_CLIENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAYLOAD_MAX 4096
#define EXIT_USAGE 2
#define EXIT_BROKEN 4

enum op {
	OP_CONTROL = 0,
	OP_DIRECTORY = 1,
	OP_READ = 2,
	OP_GET_PERMS = 3,
	OP_WATCH = 4,
	OP_TRANSACTION_START = 6,
	OP_TRANSACTION_END = 7,
	OP_WRITE = 11,
	OP_MKDIR = 12,
	OP_RM = 13,
	OP_WATCH_EVENT = 15,
	OP_ERROR = 16,
	OP_DIRECTORY_PART = 22,
	OP_COUNT = 32,
};

struct header {
	uint32_t type;
	uint32_t id;
	uint32_t transaction;
	uint32_t n_bytes;
};

/* What was asked and is not answered yet. `kind` and `tag` are the asker's own. */
struct question {
	uint32_t type;
	uint32_t id;
	uint32_t kind;
	uint32_t tag;
	int64_t sent_ns;
};

struct message {
	struct header header;
	const char *body;          /* header.n_bytes, valid until the next link_receive */
	struct question question;  /* of an answer; all zero for a watch event */
};

/* One connection. */
struct link {
	int fd;
	uint32_t number;           /* which of its program's links */
	bool may_lose;             /* the daemon may hang up on it: `lost` is set instead of ending the program */
	bool lost;
	bool polled_for_room;
	uint32_t last_id;
	struct question *questions;
	uint32_t n_slots;          /* a power of two */
	uint32_t asked;
	uint32_t answered;         /* asked - answered are outstanding */
	char *out;
	size_t out_from, out_to, out_size;
	char *in;
	size_t in_from, in_to, in_size;
	uint64_t sent_bytes;
};

/* Say why and end with EXIT_BROKEN. */
void fail(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));
int64_t now_ns(void);
uint64_t random_next(uint64_t *seed);

void link_connect(struct link *link, uint32_t number, const char *path);
/* Over a connected descriptor, which is taken. */
void link_adopt(struct link *link, uint32_t number, int fd);
void link_close(struct link *link);
uint32_t link_outstanding(const struct link *link);
/* Queue a request. */
void link_ask(struct link *link, enum op type, uint32_t transaction, const void *body, size_t n_bytes, uint32_t kind,
	      uint32_t tag);
/* Queue "path\0value". */
void link_write(struct link *link, uint32_t transaction, const char *path, const char *value, uint32_t kind, uint32_t tag);
/* Queue a request of one string, with its NUL. */
void link_name(struct link *link, enum op type, uint32_t transaction, const char *path, uint32_t kind, uint32_t tag);
/* Queue bytes as they are; no answer is expected. */
void link_raw(struct link *link, const void *bytes, size_t n_bytes);
/* Send what the socket takes; true when nothing is left. */
bool link_flush(struct link *link);
/* Read once; false when there was nothing. */
bool link_receive(struct link *link);
/* The next whole message of what was received. */
bool link_next(struct link *link, struct message *message);
bool message_is_error(const struct message *message, const char *name);

struct poller {
	int fd;
};

void poller_open(struct poller *poller);
void poller_add(struct poller *poller, struct link *link);
/* Flush, and have the poller say when there is room for the rest. */
void poller_flush(struct poller *poller, struct link *link);
/* Links with something to read (or room again); how many. */
int poller_wait(struct poller *poller, struct link **links, int max, int timeout_ms);

/* Latencies with an error of at most 1.6 %. */
#define SUB_BITS 6
struct histogram {
	uint64_t counts[64 << SUB_BITS];
	uint64_t n;
	int64_t max_ns;
};

void histogram_add(struct histogram *histogram, int64_t ns);
/* 0 when nothing was added. `share`: 0.99 for the value that 99 of 100 do not exceed. */
int64_t histogram_share(const struct histogram *histogram, double share);

/* CPU time of all threads of a process so far, ns; 0 for pid 0. */
int64_t process_cpu_ns(int pid);
int64_t own_cpu_ns(void);

#endif
