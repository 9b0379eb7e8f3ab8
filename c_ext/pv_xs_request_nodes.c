/* SPDX-License-Identifier: MIT */
/* Requests that name a node: what is read, what is changed. */
#define _GNU_SOURCE /* memrchr */
#include <stdio.h>

#include "xs_request.h"

/* The first n bytes of the payload as the path the operation works on. */
static int locate(struct request *request, uint32_t n)
{
	if (!xs_request_path(request, request->payload, n))
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

int xs_request_directory(struct request *request)
{
	struct xs_content *content;
	int error = look_up(request, &content);

	return error ? error : xs_reply(request, content->names, content->n_names);
}

int xs_request_read(struct request *request)
{
	struct xs_content *content;
	int error = look_up(request, &content);

	return error ? error : xs_reply(request, content->value, content->n_value);
}

int xs_request_directory_part(struct request *request)
{
	char part[PV_XS_PAYLOAD_MAX];
	uint32_t n_path = (uint32_t)strnlen(request->payload, request->n);
	uint32_t start, room, left;
	struct xs_content *content;
	int64_t offset;
	int error;

	if (xs_count_words(request->payload, request->n) != 2)
		return XS_EINVAL;
	error = locate(request, n_path);
	if (!error)
		error = xs_lookup(&request->view, request->domain, XS_READ_ACCESS, &content);
	if (error)
		return error;
	start = (uint32_t)sprintf(part, "%llu", (unsigned long long)content->generation) + 1;
	offset = xs_number(request->payload + n_path + 1);
	if (offset < 0 || offset >= content->n_names) {
		part[start] = 0;
		return xs_reply(request, part, start + 1);
	}
	room = (uint32_t)sizeof part - start - 1;
	left = content->n_names - (uint32_t)offset;
	if (left > room) {
		/* Whole names only: back to the last NUL within the room, which has one: no name is so long. */
		const char *end = memrchr(content->names + offset, 0, room);

		left = (uint32_t)(end + 1 - (content->names + offset));
	}
	memcpy(part + start, content->names + offset, left);
	start += left;
	if (offset + left == content->n_names)
		part[start++] = 0;
	return xs_reply(request, part, start);
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
	int error = xs_reply(request, text, xs_perms_format(perms, text));

	free(text);
	return error;
}

int xs_request_get_perms(struct request *request)
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
	return xs_acknowledge(request);
}

int xs_request_write(struct request *request)
{
	uint32_t n_path = (uint32_t)strnlen(request->payload, request->n);
	int error = n_path == request->n ? XS_EINVAL : locate(request, n_path);

	if (!error)
		error = xs_write(&request->view, request->domain, request->payload + n_path + 1, request->n - n_path - 1);
	return done(request, error, 1);
}

int xs_request_mkdir(struct request *request)
{
	int made = 0, error = locate_single(request);

	if (!error)
		error = xs_mkdir(&request->view, request->domain, &made);
	return done(request, error, made);
}

int xs_request_rm(struct request *request)
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
	return xs_acknowledge(request);
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

int xs_request_set_perms(struct request *request)
{
	uint32_t n_words = xs_count_words(request->payload, request->n);
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
