/* SPDX-License-Identifier: MIT */
/*
 * A caller's part of the work of the store's engine, for programs that test it: requests and what comes back, a look at all
 * that is in a store, a journal.
 */
#ifndef CALLER_H
#define CALLER_H

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pv_xs.h"

enum { DIRECTORY = 1, READ, GET_PERMS, WATCH, UNWATCH, START, END, WRITE = 11, MKDIR, RM, SET_PERMS, EVENT, ERROR, RESET = 21 };

#define must(what) ((what) ? (void)0 : fail(#what, __FILE__, __LINE__))

static inline void fail(const char *what, const char *file, int line)
{
	fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, what);
	exit(1);
}

/* What has come for a client. */
struct heard {
	uint32_t n_replies, n_events;
	uint32_t error;             /* whether the last reply was one */
	uint32_t n;
	char payload[PV_XS_PAYLOAD_MAX + 1];   /* of the last reply */
	uint64_t hash;              /* of all bytes */
};

static inline void hear(struct heard *heard, const uint8_t *data, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		heard->hash = (heard->hash ^ data[i]) * 0x100000001B3u;
	while (n) {
		uint32_t header[4];

		must(n >= sizeof header);
		memcpy(header, data, sizeof header);
		must(header[3] <= PV_XS_PAYLOAD_MAX && header[3] <= n - sizeof header);
		if (header[0] == EVENT) {
			heard->n_events++;
		} else {
			heard->n_replies++;
			heard->error = header[0] == ERROR;
			heard->n = header[3];
			memcpy(heard->payload, data + sizeof header, header[3]);
			heard->payload[header[3]] = 0;
		}
		data += sizeof header + header[3];
		n -= (uint32_t)sizeof header + header[3];
	}
}

static inline uint32_t packet(uint8_t *to, uint32_t op, uint32_t transaction, const char *payload, uint32_t n)
{
	uint32_t header[4] = { op, 7, transaction, n };

	memcpy(to, header, sizeof header);
	memcpy(to + sizeof header, payload, n);
	return (uint32_t)sizeof header + n;
}

/* Take what has come for a connection that no socket serves. */
static inline void collect(struct pv_xs_conn *connection, struct heard *heard)
{
	static uint8_t out[1 << 20];
	uint32_t n = pv_xs_output(connection, out, sizeof out);

	must(n == pv_xs_n_output(connection));
	hear(heard, out, n);
	pv_xs_sent(connection, n);
}

/* A request and its one reply: whether that was no error. */
static inline int ask(struct pv_xs_conn *connection, struct heard *heard, uint32_t op, uint32_t transaction,
		      const char *payload, uint32_t n)
{
	uint8_t data[16 + PV_XS_PAYLOAD_MAX];

	heard->n_replies = 0;
	must(pv_xs_feed(connection, data, packet(data, op, transaction, payload, n)) == PV_XS_DONE);
	collect(connection, heard);
	must(heard->n_replies == 1);
	return !heard->error;
}

static inline int has_failed(const struct heard *heard, const char *name)
{
	return heard->error && !strcmp(heard->payload, name);
}

/* Every path with its value and permissions, as text; the caller frees it. */
static inline char *dump(struct pv_xs *hub)
{
	struct pv_xs_conn *dom0 = pv_xs_connect(hub, 0);
	char **paths = malloc(4096 * sizeof *paths), *text;
	uint32_t n_paths = 1;
	size_t n_text;
	FILE *out = open_memstream(&text, &n_text);
	struct heard heard;

	paths[0] = strdup("");
	for (uint32_t i = 0; i < n_paths; i++) {
		const char *path = *paths[i] ? paths[i] : "/";
		uint32_t n = (uint32_t)strlen(path) + 1;

		must(ask(dom0, &heard, READ, 0, path, n));
		fprintf(out, "%s = %u %.*s", path, heard.n, (int)heard.n, heard.payload);
		must(ask(dom0, &heard, GET_PERMS, 0, path, n));
		for (uint32_t at = 0; at < heard.n; at += (uint32_t)strlen(heard.payload + at) + 1)
			fprintf(out, " %s", heard.payload + at);
		fputc('\n', out);
		must(ask(dom0, &heard, DIRECTORY, 0, path, n));
		for (uint32_t at = 0; at < heard.n; at += (uint32_t)strlen(heard.payload + at) + 1) {
			must(n_paths < 4096);
			must(asprintf(&paths[n_paths++], "%s/%s", paths[i], heard.payload + at) > 0);
		}
	}
	fclose(out);
	while (n_paths)
		free(paths[--n_paths]);
	free(paths);
	pv_xs_conn_free(dom0);
	return text;
}

/* -- the journal */

static inline int new_file(void)
{
	int fd = memfd_create("journal", MFD_CLOEXEC);

	must(fd >= 0);
	return fd;
}

/* Make a file the journal of a store. */
static inline void keep_journal(struct pv_xs *hub, int fd, int sync)
{
	pv_xs_snapshot_start(hub, fd);
	while (!pv_xs_snapshot_step(hub, 64))
		;
	pv_xs_snapshot_adopt(hub);
	pv_xs_journal_sync(hub, sync);
}

/* The store that a journal's file has. */
static inline struct pv_xs *load(int fd)
{
	uint64_t n = (uint64_t)lseek(fd, 0, SEEK_END), n_good;
	struct pv_xs *hub = pv_xs_new(2);
	uint8_t *data = malloc(n);

	must(pread(fd, data, n, 0) == (ssize_t)n);
	must(!pv_xs_journal_load(hub, data, n, &n_good));
	must(!pv_xs_check(hub));
	free(data);
	return hub;
}

#endif
