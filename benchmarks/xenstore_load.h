/* SPDX-License-Identifier: MIT */
/* What the modes of xenstore_load share. */
#ifndef XENSTORE_LOAD_H
#define XENSTORE_LOAD_H

#include "xenstore_client.h"

#define TREE "/bench"
#define MAX_LINKS 1024

struct options {
	const char *mode;
	const char *kind;       /* of a flood */
	const char *socket;
	int fds[MAX_LINKS];     /* connected already, instead of `socket` */
	uint32_t n_fds;
	int pid;                /* of the daemon; 0: its CPU time is not asked for */
	int cpu;                /* to run on; -1: any */
	bool polite;            /* run only when the CPU has nothing else to do */
	bool verify;
	uint32_t connections;
	uint32_t depth;         /* requests in flight on each connection */
	uint32_t nodes;
	uint32_t per_directory;
	uint32_t domains;
	double seconds;
};

extern struct options options;

/* What was counted. Printed as one JSON object. */
struct result {
	uint64_t operations;
	uint64_t events;
	uint64_t eagain;        /* transactions that had to be repeated */
	uint64_t errors;        /* answers that were an error, and should not have been */
	uint64_t mismatches;    /* answers with the wrong contents (only with --verify) */
	uint64_t lost;          /* connections the daemon closed */
	uint64_t unfinished;    /* devices that did not connect in time */
	char first_error[16];
	int64_t start_ns;
	int64_t end_ns;
	int64_t cpu_ns;         /* of the daemon */
	int64_t own_cpu_ns;
	struct histogram latencies;
};

extern struct result result;

/* The links of this run, open and polled: of options.connections, or of the descriptors that were given. */
struct link *open_links(struct poller *poller, uint32_t *count);
/* An answer that is an error. Those that are expected are not to be shown to this. */
void note_error(const struct message *message);
/* Begin and end of what is measured. */
void measure_start(void);
void measure_end(void);

void run_flood(void);
void run_domains(void);

#endif
