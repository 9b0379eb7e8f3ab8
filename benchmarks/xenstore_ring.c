/* SPDX-License-Identifier: MIT */
/*
 * A guest's end of a xenstore ring page that keeps some requests in flight, as a library for xenstore_ring_guest.py.
 *
 * The page's streams are our C core's. Events are either a channel of our hypervisor or, for the C daemon under its
 * pretended hypervisor, datagrams; nothing else differs. As Linux does, it notifies after each write and after a read
 * that found the ring full. It sleeps at once when there is nothing to do.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "pv_atomic.h"
#include "pv_event.h"
#include "pv_stream.h"
#include "xenstore_client.h"

#define RING_BYTES 1024
#define MAX_DEPTH 16
#define MESSAGE_MAX 64
#define WAIT_MS 10000

/* What the caller fills in. All of the first group is of our hypervisor, the second of the pretended one. */
struct ring_setup {
	void *page;
	struct pv_inbox *rx_inbox;  /* NULL: datagrams */
	struct pv_inbox *tx_inbox;
	uint32_t rx_slot;
	uint32_t tx_slot;
	int32_t rx_bell_fd;
	int32_t tx_bell_fd;

	int32_t events_fd;          /* where events arrive */
	uint32_t port;              /* what the daemon calls us */
	const char *events_path;    /* where its events go */

	int32_t pid;                /* of the daemon */
	uint32_t nodes;             /* data/n0 and so on */
	uint32_t depth;
	uint32_t writes;            /* 1: write, 0: read */
	double seconds;
};

struct ring_result {
	uint64_t operations;
	uint64_t errors;
	uint64_t mismatches;
	double seconds;
	double p50_us, p99_us, max_us;
	double cpu_us;              /* of the daemon for one operation */
};

struct guest {
	const struct ring_setup *setup;
	struct pv_stream stream;
	struct pv_waiter waiter;
	struct pv_port port;
	struct sockaddr_un daemon;
	char out[MAX_DEPTH * MESSAGE_MAX];
	uint32_t out_bytes;
	char in[2 * RING_BYTES];
	uint32_t in_bytes;
	int64_t sent_ns[MAX_DEPTH];
	uint32_t asked, answered;
	uint64_t seed;
	struct histogram latencies;
	struct ring_result *result;
};

static const struct pv_stream_layout front = {0, 1024, 2048, 2052, 1024, 1024, 2056, 2060};

static void notify(struct guest *guest)
{
	const struct ring_setup *setup = guest->setup;

	if (setup->rx_inbox)
		pv_notify(&guest->port);
	else
		sendto(setup->events_fd, &setup->port, sizeof setup->port, MSG_DONTWAIT, (struct sockaddr *)&guest->daemon,
		       sizeof guest->daemon);
}

static void wait_for_event(struct guest *guest)
{
	struct pollfd ready = {.fd = guest->setup->events_fd, .events = POLLIN};
	uint32_t port;
	int came;

	if (guest->setup->rx_inbox) {
		came = pv_wait(&guest->waiter, &guest->port, 0, (int64_t)WAIT_MS * 1000000) != PV_WAIT_TIMEOUT;
	} else {
		came = poll(&ready, 1, WAIT_MS);
		while (came > 0 && recv(ready.fd, &port, sizeof port, MSG_DONTWAIT) >= 0)
			;
	}
	if (!came)
		fail("the ring (%s): no event for %d ms with %u in flight", guest->setup->rx_inbox ? "ours" : "datagrams", WAIT_MS,
		     guest->asked - guest->answered);
}

static void open_channel(struct guest *guest)
{
	const struct ring_setup *setup = guest->setup;

	if (setup->rx_inbox) {
		if (pv_waiter_init(&guest->waiter, NULL) ||
		    pv_waiter_add(&guest->waiter, setup->rx_inbox, setup->rx_bell_fd))
			fail("the ring: no waiter");
		pv_port_init(&guest->port, &guest->waiter, setup->rx_inbox, setup->rx_slot);
		pv_port_set_peer(&guest->port, setup->tx_inbox, setup->tx_slot, setup->tx_bell_fd, 0);
	} else {
		guest->daemon.sun_family = AF_UNIX;
		snprintf(guest->daemon.sun_path, sizeof guest->daemon.sun_path, "%s", setup->events_path);
	}
	if (pv_stream_attach(&guest->stream, setup->page, 4096, &front, NULL))
		fail("the ring: indexes that cannot be");
}

static void close_channel(struct guest *guest)
{
	if (!guest->setup->rx_inbox)
		return;
	pv_port_close(&guest->port);
	pv_waiter_remove(&guest->waiter, guest->setup->rx_inbox, guest->setup->rx_bell_fd);
	pv_waiter_destroy(&guest->waiter);
}

/* Each node once in as many requests. */
static uint32_t node_of(uint32_t request, uint32_t nodes)
{
	return (uint32_t)((uint64_t)request * 7919 % nodes);
}

static void ask(struct guest *guest, int writes)
{
	uint32_t node = node_of(guest->asked, guest->setup->nodes);
	struct header header = {writes ? OP_WRITE : OP_READ, guest->asked, 0, 0};
	char *body = guest->out + guest->out_bytes + sizeof header;

	header.n_bytes = (uint32_t)snprintf(body, MESSAGE_MAX - sizeof header, "data/n%u", node) + 1;
	if (writes)
		header.n_bytes += (uint32_t)snprintf(body + header.n_bytes, 16, "%04u%04u", node,
						     (uint32_t)(random_next(&guest->seed) % 10000));
	memcpy(body - sizeof header, &header, sizeof header);
	guest->out_bytes += (uint32_t)sizeof header + header.n_bytes;
	guest->sent_ns[guest->asked++ % MAX_DEPTH] = now_ns();
}

static void check(struct guest *guest, const struct header *header, const char *body)
{
	char mark[16];

	snprintf(mark, sizeof mark, "%04u", node_of(guest->answered, guest->setup->nodes));
	if (header->type == OP_ERROR)
		guest->result->errors++;
	else if (header->id != guest->answered ||
		 (header->type == OP_READ && (header->n_bytes != 8 || memcmp(body, mark, 4))))
		guest->result->mismatches++;
}

static void take_answers(struct guest *guest)
{
	struct header header;
	uint32_t from = 0;

	for (; guest->in_bytes - from >= sizeof header; from += (uint32_t)sizeof header + header.n_bytes) {
		memcpy(&header, guest->in + from, sizeof header);
		if (header.n_bytes > RING_BYTES || guest->answered == guest->asked)
			fail("the ring: an answer that was not asked for");
		if (guest->in_bytes - from < sizeof header + header.n_bytes)
			break;
		check(guest, &header, guest->in + from + sizeof header);
		histogram_add(&guest->latencies, now_ns() - guest->sent_ns[guest->answered++ % MAX_DEPTH]);
		guest->result->operations++;
	}
	memmove(guest->in, guest->in + from, guest->in_bytes - from);
	guest->in_bytes -= from;
}

/* Whether anything moved. */
static int move(struct guest *guest)
{
	int64_t n_in, n_out = pv_stream_write(&guest->stream, (uint8_t *)guest->out, guest->out_bytes);

	if (n_out > 0) {
		memmove(guest->out, guest->out + n_out, guest->out_bytes - (uint32_t)n_out);
		guest->out_bytes -= (uint32_t)n_out;
		notify(guest);
	}
	n_in = pv_stream_read(&guest->stream, (uint8_t *)guest->in + guest->in_bytes,
			      (uint32_t)sizeof guest->in - guest->in_bytes);
	if (n_out < 0 || n_in < 0)
		fail("the ring is broken");
	if (n_in > 0) {
		pv_fence_full(); /* our consumer index, before another look at the daemon's producer index */
		if (n_in + pv_stream_readable(&guest->stream) >= RING_BYTES)
			notify(guest);
		guest->in_bytes += (uint32_t)n_in;
		take_answers(guest);
	}
	return n_out > 0 || n_in > 0;
}

/* Ask until `end_ns` or, when that is 0, each node once; then wait for the last answer. */
static void run(struct guest *guest, int64_t end_ns)
{
	uint32_t depth = end_ns ? guest->setup->depth : 1;
	int writes = end_ns ? (int)guest->setup->writes : 1, more = 1;

	while (more || guest->answered != guest->asked) {
		more = more && (end_ns ? now_ns() < end_ns : guest->asked < guest->setup->nodes);
		while (more && guest->asked - guest->answered < depth)
			ask(guest, writes);
		if (!move(guest) && guest->answered != guest->asked)
			wait_for_event(guest);
	}
}

/* 0. Makes the nodes first; ends the process with EXIT_BROKEN where the ring breaks. */
int xenstore_ring_run(const struct ring_setup *setup, struct ring_result *result)
{
	struct guest *guest = calloc(1, sizeof *guest);
	int64_t start_ns, cpu_ns;

	if (!guest || setup->depth < 1 || setup->depth > MAX_DEPTH || setup->nodes < 1 || setup->nodes > 1000)
		fail("the ring: 1 to %d in flight, 1 to 1000 nodes", MAX_DEPTH);
	*result = (struct ring_result){0};
	guest->setup = setup;
	guest->result = result;
	guest->seed = 88172645463325252u;
	open_channel(guest);
	run(guest, 0);
	memset(&guest->latencies, 0, sizeof guest->latencies);
	result->operations = 0;
	cpu_ns = process_cpu_ns(setup->pid);
	start_ns = now_ns();
	run(guest, start_ns + (int64_t)(setup->seconds * 1e9));
	result->seconds = (double)(now_ns() - start_ns) / 1e9;
	result->cpu_us = (double)(process_cpu_ns(setup->pid) - cpu_ns) / 1e3 / (double)result->operations;
	result->p50_us = (double)histogram_share(&guest->latencies, 0.50) / 1e3;
	result->p99_us = (double)histogram_share(&guest->latencies, 0.99) / 1e3;
	result->max_us = (double)guest->latencies.max_ns / 1e3;
	close_channel(guest);
	free(guest);
	return 0;
}
