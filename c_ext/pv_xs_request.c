/* SPDX-License-Identifier: MIT */
/*
 * What each request means; those that name a node are in pv_xs_request_nodes.c. Order of checks, before any of these:
 * unknown operation (ENOSYS), Dom0 only (EACCES), unknown transaction (ENOENT), no memory (ENOMEM).
 */
#include <limits.h>
#include <stdio.h>

#include "xs_request.h"

const char *const xs_errno_names[XS_N_ERRNOS] = {
	[XS_OK] = "OK", [XS_EINVAL] = "EINVAL", [XS_EACCES] = "EACCES", [XS_EEXIST] = "EEXIST", [XS_ENOENT] = "ENOENT",
	[XS_ENOMEM] = "ENOMEM", [XS_ENOSPC] = "ENOSPC", [XS_EIO] = "EIO", [XS_ENOSYS] = "ENOSYS", [XS_EBUSY] = "EBUSY",
	[XS_EAGAIN] = "EAGAIN", [XS_E2BIG] = "E2BIG", [XS_EPERM] = "EPERM",
};

typedef int (*handler)(struct request *request);

/* -- replies */

int xs_reply(struct request *request, const void *data, uint32_t n)
{
	const struct xs_header *header = request->header;

	if (n > PV_XS_PAYLOAD_MAX)
		return XS_E2BIG;
	if (n > XS_SMALL_REPLY && xs_over_memory(request->domain, XS_HEADER_BYTES + n))
		return XS_ENOMEM;
	uint8_t *payload =
		xs_put_reply(request->connection, header->op, header->request_id, header->transaction_id, n);
	if (n)
		memcpy(payload, data, n);
	return XS_OK;
}

int xs_acknowledge(struct request *request)
{
	return xs_reply(request, "OK", 3);
}

/* -- arguments */

uint32_t xs_count_words(const char *payload, uint32_t n)
{
	uint32_t n_words = 0;

	for (uint32_t i = 0; i < n; i++)
		n_words += payload[i] == 0;
	return n_words;
}

int64_t xs_number(const char *text)
{
	char *end;
	long long value = strtoll(text, &end, 10);

	return value == LLONG_MAX || value == LLONG_MIN ? 0 : value;
}

uint32_t xs_request_path(struct request *request, const char *path, uint32_t n)
{
	struct pv_xs *hub = request->hub;
	uint32_t length = xs_canonical(hub, request->domain, path, n);

	if (length && xs_over(request->domain, PV_XS_QUOTA_PATH_MAX, xs_quota_length(hub->path, length)))
		return 0;
	return length;
}

/* The same for what may be watched: beside nodes, special names, which begin with @. In hub->path. */
static uint32_t canonical_to_watch(struct request *request, const char *path, uint32_t n)
{
	struct pv_xs *hub = request->hub;

	if (path[0] != '@')
		return xs_request_path(request, path, n);
	if (n > XS_RELATIVE_PATH_MAX || !xs_is_well_formed(hub, path, n))
		return 0;
	memcpy(hub->path, path, n);
	hub->path[n] = 0;
	return xs_over(request->domain, PV_XS_QUOTA_PATH_MAX, n) ? 0 : n;
}

/* -- watches */

/* Depth of a watch's third argument: -1 and XS_EINVAL for anything but a number. */
static int parse_depth(const char *text, int32_t *depth)
{
	for (const char *at = text; *at; at++) {
		if (*at < '0' || *at > '9')
			return XS_EINVAL;
	}
	if (!*text || strlen(text) > 9)
		return XS_EINVAL;
	*depth = (int32_t)xs_number(text);
	return XS_OK;
}

static int watch(struct request *request)
{
	struct pv_xs *hub = request->hub;
	struct xs_domain *domain = request->domain;
	const char *path = request->payload, *token;
	uint32_t n_words = xs_count_words(path, request->n), n_path = (uint32_t)strnlen(path, request->n);
	uint32_t n_prefix, n_token;
	int32_t depth = -1;

	if (n_words < 2 || n_words > 3)
		return XS_EINVAL;
	token = path + n_path + 1;
	n_token = (uint32_t)strlen(token);
	if (n_words == 3 && (!(domain->public.features & XS_FEATURE_WATCH_DEPTH) || parse_depth(token + n_token + 1, &depth)))
		return XS_EINVAL;
	n_prefix = path[0] == '/' || path[0] == '@' ? 0 : domain->n_home + 1;
	n_path = canonical_to_watch(request, path, n_path);
	if (!n_path)
		return XS_EINVAL;
	path = hub->path;
	if (xs_watch_find(request->connection, path, n_path, token, n_token))
		return XS_EEXIST;
	if (xs_over(domain, PV_XS_QUOTA_WATCHES, (int64_t)domain->public.n_watches + 1))
		return XS_ENOSPC;
	if (xs_over_memory(domain, (int64_t)n_path + n_token))
		return XS_ENOMEM;
	request->connection->first_event =
		xs_watch_add(request->connection, path, n_path, token, n_token, n_prefix, depth);
	return xs_acknowledge(request);
}

static int unwatch(struct request *request)
{
	const char *path = request->payload;
	uint32_t n_path = (uint32_t)strnlen(path, request->n);
	struct xs_watch *found;
	const char *token;

	if (xs_count_words(path, request->n) != 2)
		return XS_EINVAL;
	token = path + n_path + 1;
	n_path = canonical_to_watch(request, path, n_path);
	if (!n_path)
		return XS_EINVAL;
	found = xs_watch_find(request->connection, request->hub->path, n_path, token, (uint32_t)strlen(token));
	if (!found)
		return XS_ENOENT;
	xs_watch_remove(found);
	return xs_acknowledge(request);
}

static int reset_watches(struct request *request)
{
	xs_drop_state(request->connection);
	return xs_acknowledge(request);
}

/* -- transactions */

static int transaction_start(struct request *request)
{
	struct xs_domain *domain = request->domain;
	char id[16];

	if (request->view.transaction)
		return XS_EBUSY;
	if (xs_over(domain, PV_XS_QUOTA_TRANSACTIONS, (int64_t)domain->public.n_transactions + 1))
		return XS_ENOSPC;
	return xs_reply(request, id,
		     (uint32_t)sprintf(id, "%u", xs_transaction_new(request->connection)->number) + 1);
}

static int transaction_end(struct request *request)
{
	struct pv_xs_conn *connection = request->connection;
	struct xs_transaction *transaction = request->view.transaction, **at = &connection->transactions;
	int error = XS_OK;

	if (request->n != 2 || request->payload[1] || (request->payload[0] != 'T' && request->payload[0] != 'F'))
		return XS_EINVAL;
	if (!transaction)
		return XS_ENOENT;
	while (*at != transaction)
		at = &(*at)->next;
	*at = transaction->next;
	connection->n_transactions--;
	xs_transaction_close(transaction);
	if (request->payload[0] == 'T') {
		error = xs_transaction_commit(transaction, request->domain);
		if (!error) {
			xs_log_commit(request->hub);
			xs_debit(request->hub, request->domain);
		}
	}
	xs_transaction_free(transaction);
	return error ? error : xs_acknowledge(request);
}

/* -- domains */

static int get_domain_path(struct request *request)
{
	char path[32];
	uint32_t domid = 0;

	if (request->n < 2 || request->n > 6 || request->payload[request->n - 1])
		return XS_EINVAL;
	for (uint32_t i = 0; i + 1 < request->n; i++) {
		if (request->payload[i] < '0' || request->payload[i] > '9')
			return XS_EINVAL;
		domid = domid * 10 + (uint32_t)(request->payload[i] - '0');
	}
	if (domid > XS_DOMID_MAX)
		return XS_EINVAL;
	return xs_reply(request, path, (uint32_t)sprintf(path, "/local/domain/%u", domid) + 1);
}

static int is_domain_introduced(struct request *request)
{
	const struct xs_domain *domain;
	int64_t domid;

	if (!request->n || strnlen(request->payload, request->n) != request->n - 1)
		return XS_EINVAL;
	domid = xs_number(request->payload);
	domain = domid >= 0 && domid <= XS_DOMID_MAX ? xs_domain_find(request->hub, (uint32_t)domid) : NULL;
	return xs_reply(request, domid == XS_DOMID_SELF || (domain && domain->public.introduced) ? "T" : "F", 2);
}

static int park(struct request *request)
{
	return XS_PARKED;
}

static const struct {
	handler run;
	uint8_t privileged;
	uint8_t in_transaction;
	uint8_t frees;          /* memory: handled even when there is little */
} handlers[PV_XS_N_OPS] = {
	[XS_CONTROL] = { park, 1, 1, 1 },
	[XS_DIRECTORY] = { xs_request_directory, 0, 1, 0 },
	[XS_READ] = { xs_request_read, 0, 1, 0 },
	[XS_GET_PERMS] = { xs_request_get_perms, 0, 1, 0 },
	[XS_WATCH] = { watch, 0, 0, 0 },
	[XS_UNWATCH] = { unwatch, 0, 0, 1 },
	[XS_TRANSACTION_START] = { transaction_start, 0, 1, 0 },
	[XS_TRANSACTION_END] = { transaction_end, 0, 1, 1 },
	[XS_INTRODUCE] = { park, 1, 1, 0 },
	[XS_RELEASE] = { park, 1, 1, 1 },
	[XS_GET_DOMAIN_PATH] = { get_domain_path, 0, 1, 0 },
	[XS_WRITE] = { xs_request_write, 0, 1, 0 },
	[XS_MKDIR] = { xs_request_mkdir, 0, 1, 0 },
	[XS_RM] = { xs_request_rm, 0, 1, 1 },
	[XS_SET_PERMS] = { xs_request_set_perms, 0, 1, 0 },
	[XS_IS_DOMAIN_INTRODUCED] = { is_domain_introduced, 1, 1, 0 },
	[XS_RESUME] = { park, 1, 1, 0 },
	[XS_SET_TARGET] = { park, 1, 1, 0 },
	[XS_RESET_WATCHES] = { reset_watches, 0, 1, 1 },
	[XS_DIRECTORY_PART] = { xs_request_directory_part, 0, 1, 0 },
	[XS_GET_FEATURE] = { park, 1, 1, 0 },
	[XS_SET_FEATURE] = { park, 1, 1, 0 },
	[XS_GET_QUOTA] = { park, 1, 1, 0 },
	[XS_SET_QUOTA] = { park, 1, 1, 0 },
};

static int run(struct request *request)
{
	const struct xs_header *header = request->header;

	if (header->op >= PV_XS_N_OPS || !handlers[header->op].run)
		return XS_ENOSYS;
	if (handlers[header->op].privileged && !xs_privileged(request->domain))
		return XS_EACCES;
	if (header->transaction_id && handlers[header->op].in_transaction) {
		request->view.transaction = xs_transaction_find(request->connection, header->transaction_id);
		if (!request->view.transaction)
			return XS_ENOENT;
	}
	if (!handlers[header->op].frees && xs_memory_is_short())
		return XS_ENOMEM;
	return handlers[header->op].run(request);
}

int xs_handle(struct pv_xs_conn *connection, const struct xs_header *header, const uint8_t *payload)
{
	struct pv_xs *hub = connection->hub;
	struct request request = {
		.connection = connection, .hub = hub, .domain = connection->domain, .header = header,
		.payload = (const char *)payload, .n = header->n, .view = { .hub = hub },
	};
	int64_t started = xs_traces(hub) ? pv_now_ns() : 0;
	int error;

	hub->statistics.requests++;
	error = run(&request);
	if (error == XS_PARKED || error == XS_UNRESOLVED)
		return error;
	xs_forget_absent(hub);
	if (error) {
		const char *name = xs_errno_names[error];
		uint32_t n = (uint32_t)strlen(name) + 1;

		memcpy(xs_put_reply(connection, XS_ERROR, header->request_id, header->transaction_id, n), name, n);
	}
	if (started)
		xs_trace_request(connection, header, payload, xs_errno_names[error], pv_now_ns() - started);
	return XS_OK;
}
