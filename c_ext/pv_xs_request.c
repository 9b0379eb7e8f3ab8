/* SPDX-License-Identifier: MIT */
/*
 * What each operation does. Order of checks, before any of these: unknown operation (ENOSYS), Dom0 only (EACCES), unknown
 * transaction (ENOENT).
 */
#define _GNU_SOURCE /* memmem, memrchr */
#include <limits.h>
#include <stdio.h>

#include "xs_private.h"

const char *const xs_errno_names[XS_N_ERRNOS] = {
	[XS_OK] = "OK", [XS_EINVAL] = "EINVAL", [XS_EACCES] = "EACCES", [XS_EEXIST] = "EEXIST", [XS_ENOENT] = "ENOENT",
	[XS_ENOMEM] = "ENOMEM", [XS_ENOSPC] = "ENOSPC", [XS_EIO] = "EIO", [XS_ENOSYS] = "ENOSYS", [XS_EBUSY] = "EBUSY",
	[XS_EAGAIN] = "EAGAIN", [XS_E2BIG] = "E2BIG", [XS_EPERM] = "EPERM",
};

/* One request while it is handled. */
struct request {
	struct pv_xs_conn *connection;
	struct pv_xs *hub;
	struct xs_domain *domain;
	const struct xs_header *header;
	const char *payload;
	uint32_t n;
	struct xs_view view;
};

typedef int (*handler)(struct request *request);

/* -- replies */

static int reply(struct request *request, const void *data, uint32_t n)
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

static int acknowledge(struct request *request)
{
	return reply(request, "OK", 3);
}

/* -- arguments */

/* How many NUL-terminated strings a payload starts with; bytes after the last NUL are none. */
static uint32_t count_words(const char *payload, uint32_t n)
{
	uint32_t n_words = 0;

	for (uint32_t i = 0; i < n; i++)
		n_words += payload[i] == 0;
	return n_words;
}

/* A number as C's atoi reads it, which the protocol's numbers follow; none is 0. */
static int64_t number(const char *text)
{
	char *end;
	long long value = strtoll(text, &end, 10);

	return value == LLONG_MAX || value == LLONG_MIN ? 0 : value;
}

/* The canonical form of a path this client may name, measured in hub->walk: its length or 0. */
static uint32_t canonical(struct request *request, const char *path, uint32_t n)
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
		return canonical(request, path, n);
	if (n > XS_RELATIVE_PATH_MAX || !xs_is_well_formed(hub, path, n))
		return 0;
	memcpy(hub->path, path, n);
	hub->path[n] = 0;
	return xs_over(request->domain, PV_XS_QUOTA_PATH_MAX, n) ? 0 : n;
}

/* The first n bytes of the payload as the path the operation works on. */
static int locate(struct request *request, uint32_t n)
{
	if (!canonical(request, request->payload, n))
		return XS_EINVAL;
	request->view.walk = &request->hub->walk;
	xs_walk(request->hub, &request->hub->walk);
	return XS_OK;
}

/* The whole payload is one string: the path. */
static int locate_single(struct request *request)
{
	if (!request->n || strnlen(request->payload, request->n) != request->n - 1)
		return XS_EINVAL;
	return locate(request, request->n - 1);
}

static int look_up(struct request *request, struct xs_content **content)
{
	int error = locate_single(request);

	return error ? error : xs_lookup(&request->view, request->domain, XS_READ_ACCESS, content);
}

/* -- reading */

static int directory(struct request *request)
{
	struct xs_content *content;
	int error = look_up(request, &content);

	return error ? error : reply(request, content->names, content->n_names);
}

static int read_value(struct request *request)
{
	struct xs_content *content;
	int error = look_up(request, &content);

	return error ? error : reply(request, content->value, content->n_value);
}

static int directory_part(struct request *request)
{
	char part[PV_XS_PAYLOAD_MAX];
	uint32_t n_path = (uint32_t)strnlen(request->payload, request->n);
	uint32_t start, room, left;
	struct xs_content *content;
	int64_t offset;
	int error;

	if (count_words(request->payload, request->n) != 2)
		return XS_EINVAL;
	error = locate(request, n_path);
	if (!error)
		error = xs_lookup(&request->view, request->domain, XS_READ_ACCESS, &content);
	if (error)
		return error;
	start = (uint32_t)sprintf(part, "%llu", (unsigned long long)content->generation) + 1;
	offset = number(request->payload + n_path + 1);
	if (offset < 0 || offset >= content->n_names) {
		part[start] = 0;
		return reply(request, part, start + 1);
	}
	room = (uint32_t)sizeof part - start - 1;
	left = content->n_names - (uint32_t)offset;
	if (left > room) {
		/* Whole names only: back to the last NUL within the room. */
		const char *end = memrchr(content->names + offset, 0, room);

		left = end ? (uint32_t)(end + 1 - (content->names + offset)) : 0;
	}
	memcpy(part + start, content->names + offset, left);
	start += left;
	if (offset + left == content->n_names)
		part[start++] = 0;
	return reply(request, part, start);
}

/* Which special node a string names, -1: none. */
static int special_of(const char *name)
{
	if (!strcmp(name, "@introduceDomain"))
		return 0;
	return strcmp(name, "@releaseDomain") ? -1 : 1;
}

static int reply_perms(struct request *request, const struct xs_perms *perms)
{
	char *text = xs_alloc(8 * (uint64_t)perms->n);
	int error = reply(request, text, xs_perms_format(perms, text));

	free(text);
	return error;
}

static int get_perms(struct request *request)
{
	struct xs_content *content;
	int error, special;

	if (request->n && request->payload[0] == '@' &&
	    strnlen(request->payload, request->n) == request->n - 1) {
		special = special_of(request->payload);
		if (special < 0)
			return XS_EINVAL;
		if (!(xs_access(request->domain, request->hub->special[special]) & XS_READ_ACCESS))
			return XS_EACCES;
		return reply_perms(request, request->hub->special[special]);
	}
	error = look_up(request, &content);
	return error ? error : reply_perms(request, content->perms);
}

/* -- changing. A change outside a transaction is whole now; in one it is when that commits. */

static int done(struct request *request, int error, int changed)
{
	if (error)
		return error;
	if (changed && !request->view.transaction) {
		xs_log_commit(request->hub);
		xs_debit(request->hub, request->domain);
	}
	return acknowledge(request);
}

static int write_value(struct request *request)
{
	uint32_t n_path = (uint32_t)strnlen(request->payload, request->n);
	int error = n_path == request->n ? XS_EINVAL : locate(request, n_path);

	if (!error)
		error = xs_write(&request->view, request->domain, request->payload + n_path + 1, request->n - n_path - 1);
	return done(request, error, 1);
}

static int make_directory(struct request *request)
{
	int made = 0, error = locate_single(request);

	if (!error)
		error = xs_mkdir(&request->view, request->domain, &made);
	return done(request, error, made);
}

static int remove_node(struct request *request)
{
	int removed = 0, error = locate_single(request);

	if (!error)
		error = xs_rm(&request->view, request->domain, &removed);
	return done(request, error, removed);
}

static int set_special(struct request *request, int special, const struct xs_perm *entries, uint32_t n)
{
	struct pv_xs *hub = request->hub;
	struct xs_perms *before = hub->special[special];

	if ((xs_access(request->domain, before) & (XS_WRITE_ACCESS | XS_OWNER_ACCESS)) !=
	    (XS_WRITE_ACCESS | XS_OWNER_ACCESS))
		return XS_EACCES;
	if (!xs_privileged(request->domain) && xs_owner(before) != entries[0].domid)
		return XS_EPERM;
	hub->special[special] = xs_perms_intern(hub, entries, n);
	xs_perms_drop(hub, before);
	xs_log_special(hub, special);
	xs_log_commit(hub);
	return acknowledge(request);
}

/* Mark entries of domains that do not exist; XS_UNRESOLVED: the caller has to say whether one does. */
static int resolve(struct request *request, struct xs_perm *entries, uint32_t n)
{
	struct pv_xs *hub = request->hub;

	for (uint32_t i = 0; i < n; i++) {
		struct xs_domain *domain;

		if (i && entries[i].domid == XS_DOMID_ANY)
			continue;
		domain = xs_domain_find(hub, entries[i].domid);
		if (domain && domain->public.known)
			continue;
		if (entries[i].domid < XS_DOMID_SELF && !(hub->absent[entries[i].domid >> 3] >> (entries[i].domid & 7) & 1)) {
			hub->unresolved = entries[i].domid + 1u;
			return XS_UNRESOLVED;
		}
		if (i == 0)
			return XS_ENOENT;
		entries[i].access |= XS_IGNORED;
	}
	return XS_OK;
}

static int names_any(const struct xs_perm *entries, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++) {
		if (entries[i].domid == XS_DOMID_ANY)
			return 1;
	}
	return 0;
}

static int set_perms(struct request *request)
{
	uint32_t n_words = count_words(request->payload, request->n);
	uint32_t n_path = (uint32_t)strnlen(request->payload, request->n), n = n_words - 1;
	struct xs_perm *entries;
	int error;

	if (n_words < 2)
		return XS_EINVAL;
	if (xs_over(request->domain, PV_XS_QUOTA_NODE_PERMISSIONS, n))
		return XS_ENOSPC;
	entries = xs_alloc(n * sizeof *entries);
	error = xs_perms_parse(request->payload + n_path + 1, n, entries);
	if (!error && names_any(entries, n) && !(request->domain->public.features & XS_FEATURE_DOMID_ANY))
		error = XS_EINVAL;
	if (!error)
		error = resolve(request, entries, n);
	if (!error && request->payload[0] == '@') {
		int special = special_of(request->payload);

		error = special < 0 ? XS_EINVAL : set_special(request, special, entries, n);
	} else {
		if (!error)
			error = locate(request, n_path);
		if (!error)
			error = xs_set_perms(&request->view, request->domain, entries, n);
		error = done(request, error, 1);
	}
	free(entries);
	return error;
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
	*depth = (int32_t)number(text);
	return XS_OK;
}

static int watch(struct request *request)
{
	struct pv_xs *hub = request->hub;
	struct xs_domain *domain = request->domain;
	const char *path = request->payload, *token;
	uint32_t n_words = count_words(path, request->n), n_path = (uint32_t)strnlen(path, request->n);
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
	return acknowledge(request);
}

static int unwatch(struct request *request)
{
	const char *path = request->payload;
	uint32_t n_path = (uint32_t)strnlen(path, request->n);
	struct xs_watch *found;
	const char *token;

	if (count_words(path, request->n) != 2)
		return XS_EINVAL;
	token = path + n_path + 1;
	n_path = canonical_to_watch(request, path, n_path);
	if (!n_path)
		return XS_EINVAL;
	found = xs_watch_find(request->connection, request->hub->path, n_path, token, (uint32_t)strlen(token));
	if (!found)
		return XS_ENOENT;
	xs_watch_remove(found);
	return acknowledge(request);
}

static int reset_watches(struct request *request)
{
	xs_drop_state(request->connection);
	return acknowledge(request);
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
	return reply(request, id,
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
	return error ? error : acknowledge(request);
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
	return reply(request, path, (uint32_t)sprintf(path, "/local/domain/%u", domid) + 1);
}

static int is_domain_introduced(struct request *request)
{
	const struct xs_domain *domain;
	int64_t domid;

	if (!request->n || strnlen(request->payload, request->n) != request->n - 1)
		return XS_EINVAL;
	domid = number(request->payload);
	domain = domid >= 0 && domid <= XS_DOMID_MAX ? xs_domain_find(request->hub, (uint32_t)domid) : NULL;
	return reply(request, domid == XS_DOMID_SELF || (domain && domain->public.introduced) ? "T" : "F", 2);
}

static int park(struct request *request)
{
	return XS_PARKED;
}

static const struct {
	handler run;
	uint8_t privileged;
	uint8_t in_transaction;
} handlers[PV_XS_N_OPS] = {
	[XS_CONTROL] = { park, 1, 1 },
	[XS_DIRECTORY] = { directory, 0, 1 },
	[XS_READ] = { read_value, 0, 1 },
	[XS_GET_PERMS] = { get_perms, 0, 1 },
	[XS_WATCH] = { watch, 0, 0 },
	[XS_UNWATCH] = { unwatch, 0, 0 },
	[XS_TRANSACTION_START] = { transaction_start, 0, 1 },
	[XS_TRANSACTION_END] = { transaction_end, 0, 1 },
	[XS_INTRODUCE] = { park, 1, 1 },
	[XS_RELEASE] = { park, 1, 1 },
	[XS_GET_DOMAIN_PATH] = { get_domain_path, 0, 1 },
	[XS_WRITE] = { write_value, 0, 1 },
	[XS_MKDIR] = { make_directory, 0, 1 },
	[XS_RM] = { remove_node, 0, 1 },
	[XS_SET_PERMS] = { set_perms, 0, 1 },
	[XS_IS_DOMAIN_INTRODUCED] = { is_domain_introduced, 1, 1 },
	[XS_RESUME] = { park, 1, 1 },
	[XS_SET_TARGET] = { park, 1, 1 },
	[XS_RESET_WATCHES] = { reset_watches, 0, 1 },
	[XS_DIRECTORY_PART] = { directory_part, 0, 1 },
	[XS_GET_FEATURE] = { park, 1, 1 },
	[XS_SET_FEATURE] = { park, 1, 1 },
	[XS_GET_QUOTA] = { park, 1, 1 },
	[XS_SET_QUOTA] = { park, 1, 1 },
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
