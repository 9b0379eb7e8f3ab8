/* SPDX-License-Identifier: MIT */
/*
 * Who did what: a line of text for each request, kept for whoever asks and written to the access log.
 *
 *   unix time in s with ms, domid.connection, transaction or -, operation, arguments, outcome, duration in us
 */
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "xs_private.h"

#define TRACE_BYTES (256u << 10)
#define ARGUMENTS_MAX 512

static const char *const op_names[PV_XS_N_OPS] = {
	"CONTROL", "DIRECTORY", "READ", "GET_PERMS", "WATCH", "UNWATCH", "TRANSACTION_START", "TRANSACTION_END",
	"INTRODUCE", "RELEASE", "GET_DOMAIN_PATH", "WRITE", "MKDIR", "RM", "SET_PERMS", "WATCH_EVENT", "ERROR",
	"IS_DOMAIN_INTRODUCED", "RESUME", "SET_TARGET", "RESTRICT", "RESET_WATCHES", "DIRECTORY_PART", "GET_FEATURE",
	"SET_FEATURE", "GET_QUOTA", "SET_QUOTA",
};

void pv_xs_trace_until(struct pv_xs *hub, int64_t now_ms)
{
	if (!hub->trace.data)
		hub->trace.data = xs_alloc(TRACE_BYTES);
	hub->trace.until_ms = now_ms;
}

void pv_xs_trace_to(struct pv_xs *hub, int fd)
{
	hub->trace.fd = fd;
}

/* The strings of a payload with commas between, odd bytes in hexadecimal; "-" for none. What follows the path of a WRITE
 * is data. */
static uint32_t put_arguments(char *text, uint32_t op, const uint8_t *payload, uint32_t n)
{
	uint32_t at = 0, end = n;

	while (end && payload[end - 1])
		end--; /* no string: it has no NUL */
	for (uint32_t i = 0; i < end; i++) {
		if (at >= ARGUMENTS_MAX)
			return at + (uint32_t)sprintf(text + at, "...");
		if (!payload[i] && (op == XS_WRITE || i + 1 == end))
			break;
		if (!payload[i])
			text[at++] = ',';
		else if (payload[i] > ' ' && payload[i] < 127 && payload[i] != '\\' && payload[i] != ',')
			text[at++] = (char)payload[i];
		else
			at += (uint32_t)sprintf(text + at, "\\x%02x", payload[i]);
	}
	return at ? at : (uint32_t)sprintf(text, "-");
}

static void drop_first_line(struct xs_trace *trace)
{
	while (trace->data[trace->start++ % TRACE_BYTES] != '\n')
		;
	trace->first++;
}

static void keep(struct xs_trace *trace, const char *line, uint32_t n)
{
	while (trace->end + n - trace->start > TRACE_BYTES)
		drop_first_line(trace);
	for (uint32_t i = 0; i < n; i++)
		trace->data[trace->end++ % TRACE_BYTES] = (uint8_t)line[i];
	trace->next++;
}

void xs_trace_request(struct pv_xs_conn *connection, const struct xs_header *header, const uint8_t *payload,
		      const char *outcome, int64_t ns)
{
	struct xs_trace *trace = &connection->hub->trace;
	char line[ARGUMENTS_MAX + 200];
	struct timespec now;
	int n;

	if (header->op == XS_CONTROL && header->n >= 6 && !memcmp(payload, "trace", 6))
		return; /* who asks for the trace is not in it */
	clock_gettime(CLOCK_REALTIME, &now);
	n = sprintf(line, "%lld.%03ld %u.%u ", (long long)now.tv_sec, now.tv_nsec / 1000000,
		    connection->domain->public.domid, connection->number);
	n += header->transaction_id ? sprintf(line + n, "%u ", header->transaction_id) : sprintf(line + n, "- ");
	n += header->op < PV_XS_N_OPS ? sprintf(line + n, "%s ", op_names[header->op])
				      : sprintf(line + n, "%u ", header->op);
	n += (int)put_arguments(line + n, header->op, payload, header->n);
	n += sprintf(line + n, " %s %lld\n", outcome, (long long)(ns / 1000));
	if (connection->hub->now_ms < trace->until_ms)
		keep(trace, line, (uint32_t)n);
	if (trace->fd >= 0 && write(trace->fd, line, (size_t)n) < 0)
		trace->fd = -1; /* a full disk must not stop the store; the caller sees it with the next line it wants */
}

uint32_t pv_xs_trace_read(struct pv_xs *hub, uint64_t *first, uint64_t *lost, uint8_t *buffer, uint32_t max)
{
	const struct xs_trace *trace = &hub->trace;
	uint64_t at = trace->start, number = trace->first;
	uint32_t n = 0, line = 0;

	*lost = *first < trace->first ? trace->first - *first : 0;
	if (*first > trace->next)
		*first = trace->next;
	for (; number < *first; number++) {
		while (trace->data[at++ % TRACE_BYTES] != '\n')
			;
	}
	for (; at < trace->end && n < max; at++) {
		buffer[n++] = trace->data[at % TRACE_BYTES];
		if (buffer[n - 1] == '\n') {
			line = n;
			number++;
		}
	}
	*first = number;
	return line;
}
