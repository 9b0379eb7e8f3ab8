/* SPDX-License-Identifier: MIT */
/* One request while it is handled: what its handlers (pv_xs_request.c, pv_xs_request_nodes.c) have in common. */
#ifndef XS_REQUEST_H
#define XS_REQUEST_H

#include "xs_private.h"

struct request {
	struct pv_xs_conn *connection;
	struct pv_xs *hub;
	struct xs_domain *domain;
	const struct xs_header *header;
	const char *payload;
	uint32_t n;
	struct xs_view view;
};

/* Queue the reply: XS_OK; XS_E2BIG or XS_ENOMEM where it may not be so long. */
int xs_reply(struct request *request, const void *data, uint32_t n);
int xs_acknowledge(struct request *request);
/* How many NUL-terminated strings a payload starts with; bytes after the last NUL are none. */
uint32_t xs_count_words(const char *payload, uint32_t n);
/* A number as C's atoi reads it, which the protocol's numbers follow; none is 0. */
int64_t xs_number(const char *text);
/* The canonical form of a path this client may name, in hub->path and hub->walk: its length or 0. */
uint32_t xs_request_path(struct request *request, const char *path, uint32_t n);

/* -- pv_xs_request_nodes.c: handlers of the requests that name a node */

int xs_request_directory(struct request *request);
int xs_request_directory_part(struct request *request);
int xs_request_read(struct request *request);
int xs_request_get_perms(struct request *request);
int xs_request_write(struct request *request);
int xs_request_mkdir(struct request *request);
int xs_request_rm(struct request *request);
int xs_request_set_perms(struct request *request);

#endif
