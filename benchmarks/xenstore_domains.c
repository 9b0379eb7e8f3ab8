/* SPDX-License-Identifier: MIT */
/*
 * Many domains start at once, each with three devices, as a toolstack, its frontends and its backends do it together:
 *
 *   toolstack   makes both directories of a device in one transaction, state 1; again after EAGAIN
 *   backend     one connection a class, which watches all its devices: sees a new one, watches its frontend, state 2
 *   frontend    one connection a domain: at 2 publishes its ring in a transaction, state 3
 *   backend     at 3: publishes what the device is, state 4
 *   frontend    at 4: state 4
 *   backend     at 4: the device is connected
 *
 * Everything goes over sockets of Dom0, so that no quota is in the way and every daemon can be asked. --seconds is the
 * most it may take.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "xenstore_load.h"

#define CLASSES 3
#define BASE TREE "/domains"
#define PLACE_BYTES 128

enum kind { PLAIN, CREATE_START, CREATE_END, PUBLISH_START, PUBLISH_END, SEE_BACKEND, SEE_FRONTEND, CLEAR };

struct device {
	char front[PLACE_BYTES];
	char back[PLACE_BYTES];
	int front_state;
	int back_state;         /* what the backend has written */
	bool connected;
	int64_t start_ns;
};

static const char *const classes[CLASSES] = {"vbd", "vif", "vkbd"};

static struct poller poller;
static struct link *links;  /* the domains', then the backends', one a class */
static struct device *devices;
static uint32_t n_connected;

static struct link *front_link(uint32_t device)
{
	return &links[device / CLASSES];
}

static struct link *back_link(uint32_t device)
{
	return &links[options.domains + device % CLASSES];
}

static void put(struct link *link, uint32_t transaction, const char *directory, const char *key, const char *value,
		uint32_t device)
{
	char path[2 * PLACE_BYTES];

	snprintf(path, sizeof path, "%s/%s", directory, key);
	link_write(link, transaction, path, value, PLAIN, device);
}

static void put_state(struct link *link, const char *directory, int state, uint32_t device)
{
	char value[4];

	snprintf(value, sizeof value, "%d", state);
	put(link, 0, directory, "state", value, device);
}

static void watch_state(struct link *link, const char *directory, uint32_t device)
{
	char request[2 * PLACE_BYTES];
	int n = snprintf(request, sizeof request, "%s/state", directory) + 1;

	n += snprintf(request + n, sizeof request - (size_t)n, "%u", device) + 1;
	link_ask(link, OP_WATCH, 0, request, (size_t)n, PLAIN, device);
}

static void see_state(struct link *link, const char *directory, enum kind kind, uint32_t device)
{
	char path[2 * PLACE_BYTES];

	snprintf(path, sizeof path, "%s/state", directory);
	link_name(link, OP_READ, 0, path, kind, device);
}

static void create(uint32_t number, uint32_t transaction)
{
	struct device *device = &devices[number];
	struct link *link = front_link(number);
	char domid[16];

	snprintf(domid, sizeof domid, "%u", number / CLASSES + 1);
	link_name(link, OP_MKDIR, transaction, device->back, PLAIN, number);
	link_name(link, OP_MKDIR, transaction, device->front, PLAIN, number);
	put(link, transaction, device->back, "frontend", device->front, number);
	put(link, transaction, device->back, "frontend-id", domid, number);
	put(link, transaction, device->back, "online", "1", number);
	put(link, transaction, device->back, "state", "1", number);
	put(link, transaction, device->front, "backend", device->back, number);
	put(link, transaction, device->front, "backend-id", "0", number);
	put(link, transaction, device->front, "handle", "0", number);
	put(link, transaction, device->front, "state", "1", number);
	link_name(link, OP_TRANSACTION_END, transaction, "T", CREATE_END, number);
}

static void publish(uint32_t number, uint32_t transaction)
{
	const char *front = devices[number].front;
	struct link *link = front_link(number);

	put(link, transaction, front, "ring-ref", "8", number);
	put(link, transaction, front, "event-channel", "5", number);
	put(link, transaction, front, "protocol", "x86_64-abi", number);
	link_name(link, OP_TRANSACTION_END, transaction, "T", PUBLISH_END, number);
}

/* The frontend has read the backend's state. */
static void front_sees(uint32_t number, int state)
{
	struct device *device = &devices[number];
	struct link *link = front_link(number);

	if (state == 2 && device->front_state == 1) {
		device->front_state = 2;
		link_name(link, OP_TRANSACTION_START, 0, "", PUBLISH_START, number);
	} else if (state == 4 && device->front_state == 3) {
		device->front_state = 4;
		put_state(link, device->front, 4, number);
	}
}

/* The backend has read the frontend's state. */
static void back_sees(uint32_t number, int state)
{
	struct device *device = &devices[number];
	struct link *link = back_link(number);

	if (state == 3 && device->back_state == 2) {
		device->back_state = 4;
		put(link, 0, device->back, "sectors", "2097152", number);
		put(link, 0, device->back, "sector-size", "512", number);
		put_state(link, device->back, 4, number);
	} else if (state == 4 && device->back_state == 4 && !device->connected) {
		device->connected = true;
		n_connected++;
		result.operations++;
		histogram_add(&result.latencies, now_ns() - device->start_ns);
	}
}

static void transaction_started(struct link *link, const struct message *message)
{
	uint32_t id = (uint32_t)strtoul(message->body, NULL, 10), number = message->question.tag;

	if (message->header.type == OP_ERROR)
		fail("connection %u: no transaction: %s", link->number, message->body);
	if (message->question.kind == CREATE_START)
		create(number, id);
	else
		publish(number, id);
}

static void transaction_ended(struct link *link, const struct message *message)
{
	bool creates = message->question.kind == CREATE_END;
	uint32_t number = message->question.tag;
	struct device *device = &devices[number];

	if (message_is_error(message, "EAGAIN")) {
		result.eagain++;
		link_name(link, OP_TRANSACTION_START, 0, "", creates ? CREATE_START : PUBLISH_START, number);
	} else if (message->header.type == OP_ERROR) {
		note_error(message);
	} else if (creates) {
		device->front_state = 1;
		watch_state(link, device->back, number);
	} else {
		device->front_state = 3;
		put_state(link, device->front, 3, number);
	}
}

static void on_answer(struct link *link, const struct message *message)
{
	uint32_t kind = message->question.kind, number = message->question.tag;
	bool failed = message->header.type == OP_ERROR;
	int state = message->header.n_bytes == 1 ? message->body[0] - '0' : 0;

	if (kind == CREATE_START || kind == PUBLISH_START)
		transaction_started(link, message);
	else if (kind == CREATE_END || kind == PUBLISH_END)
		transaction_ended(link, message);
	else if (kind == PLAIN && failed)
		note_error(message);
	else if (kind == SEE_BACKEND && !failed)
		front_sees(number, state);
	else if (kind == SEE_FRONTEND && !failed)
		back_sees(number, state);
}

/* "BASE/back/CLASS/DOMAIN/0/...": a device of this class that the backend may not know yet. */
static void back_notices(struct link *link, const char *path)
{
	uint32_t class = link->number - options.domains, domain, number;
	struct device *device;
	int end = 0;

	if (sscanf(path, BASE "/back/%*[a-z]/%u/0%n", &domain, &end) != 1 || !end || domain >= options.domains)
		return;
	number = domain * CLASSES + class;
	device = &devices[number];
	if (device->back_state)
		return;
	device->back_state = 2;
	watch_state(link, device->front, number);
	put_state(link, device->back, 2, number);
}

static void on_event(struct link *link, const char *path, const char *token)
{
	uint32_t number = (uint32_t)strtoul(token, NULL, 10);

	result.events++;
	if (!strcmp(token, "all"))
		back_notices(link, path);
	else if (link->number < options.domains)
		see_state(link, devices[number].back, SEE_BACKEND, number);
	else
		see_state(link, devices[number].front, SEE_FRONTEND, number);
}

static void pump(int timeout_ms)
{
	struct link *ready[64];
	struct message message;
	int n = poller_wait(&poller, ready, 64, timeout_ms);

	for (int i = 0; i < n; i++) {
		link_receive(ready[i]);
		while (link_next(ready[i], &message))
			if (message.header.type == OP_WATCH_EVENT)
				on_event(ready[i], message.body, message.body + strlen(message.body) + 1);
			else
				on_answer(ready[i], &message);
		poller_flush(&poller, ready[i]);
	}
}

/* Wait for all that a connection has asked. */
static void settle(struct link *link)
{
	poller_flush(&poller, link);
	while (link_outstanding(link))
		pump(100);
}

static void make_devices(void)
{
	devices = calloc((size_t)options.domains * CLASSES, sizeof *devices);
	if (!devices)
		fail("no memory");
	for (uint32_t i = 0; i < options.domains * CLASSES; i++) {
		uint32_t domain = i / CLASSES;

		snprintf(devices[i].front, PLACE_BYTES, BASE "/front/%u/device/%s/0", domain, classes[i % CLASSES]);
		snprintf(devices[i].back, PLACE_BYTES, BASE "/back/%s/%u/0", classes[i % CLASSES], domain);
	}
}

static void start_backends(void)
{
	for (uint32_t i = 0; i < CLASSES; i++) {
		struct link *link = &links[options.domains + i];
		char request[PLACE_BYTES];
		size_t n_bytes = (size_t)snprintf(request, sizeof request, BASE "/back/%s", classes[i]) + 1;

		link_name(link, OP_MKDIR, 0, request, PLAIN, 0);
		memcpy(request + n_bytes, "all", 4);
		link_ask(link, OP_WATCH, 0, request, n_bytes + 4, PLAIN, 0);
		settle(link);
	}
}

static void clear(void)
{
	link_name(&links[options.domains], OP_RM, 0, BASE, CLEAR, 0);
	settle(&links[options.domains]);
}

void run_domains(void)
{
	uint32_t n_links, n_devices = options.domains * CLASSES;
	int64_t end;

	options.connections = options.domains + CLASSES;
	if (options.connections > MAX_LINKS)
		fail("at most %d domains", MAX_LINKS - CLASSES);
	make_devices();
	links = open_links(&poller, &n_links);
	clear();
	start_backends();
	measure_start();
	end = result.start_ns + (int64_t)(options.seconds * 1e9);
	for (uint32_t i = 0; i < n_devices; i++) {
		devices[i].start_ns = now_ns();
		link_name(front_link(i), OP_TRANSACTION_START, 0, "", CREATE_START, i);
	}
	for (uint32_t i = 0; i < options.domains; i++)
		poller_flush(&poller, &links[i]);
	while (n_connected < n_devices && now_ns() < end)
		pump(100);
	measure_end();
	result.unfinished = n_devices - n_connected;
	if (!result.unfinished)
		clear();
	for (uint32_t i = 0; i < n_links; i++)
		link_close(&links[i]);
	free(links);
	free(devices);
}
