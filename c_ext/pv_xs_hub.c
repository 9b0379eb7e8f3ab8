/* SPDX-License-Identifier: MIT */
/* The hub: what all connections share, and the requests that its caller answers. */
#include "xs_private.h"

static struct xs_perms *dom0_and(struct pv_xs *hub, uint32_t n, uint16_t domid, uint16_t access)
{
	struct xs_perm entries[2] = { { 0, 0 }, { domid, access } };

	return xs_perms_intern(hub, entries, n);
}

/* A new store has what the C daemon's has: /tool/xenstored. */
static void plant(struct pv_xs *hub)
{
	struct xs_perms *perms = dom0_and(hub, 1, 0, 0);
	struct xs_domain *dom0 = xs_domain(hub, 0);
	struct xs_view view = { .hub = hub, .walk = &hub->walk };
	struct xs_content *content = xs_content_new(perms, NULL, 0);
	int made;

	content->generation = ++hub->generation;
	hub->root = xs_node_add(hub, NULL, "", 0, xs_mix(hub->seed), content);
	xs_charge_nodes(hub, 0, 1);
	xs_canonical(hub, dom0, "/tool/xenstored", 15);
	xs_walk(hub, &hub->walk);
	xs_mkdir(&view, dom0, &made);
	xs_perms_drop(hub, perms);
}

struct pv_xs *pv_xs_new(uint64_t seed)
{
	struct pv_xs *hub = xs_alloc(sizeof *hub);
	static const uint32_t quotas[PV_XS_N_QUOTAS] = {
		[PV_XS_QUOTA_NODES] = 1000, [PV_XS_QUOTA_WATCHES] = 128, [PV_XS_QUOTA_TRANSACTIONS] = 10,
		[PV_XS_QUOTA_OUTSTANDING] = 20, [PV_XS_QUOTA_TRANSACTION_NODES] = 1024,
		[PV_XS_QUOTA_MEMORY] = 2621440, [PV_XS_QUOTA_NODE_PERMISSIONS] = 5, [PV_XS_QUOTA_PATH_MAX] = 2048,
		[PV_XS_QUOTA_NODE_SIZE] = 2048, [PV_XS_QUOTA_SOFT_MEMORY] = 2097152,
	};

	(void)xs_memory_is_short(); /* set it aside in time */
	hub->seed = seed;
	memcpy(hub->limits.quotas, quotas, sizeof quotas);
	hub->limits.privileged_output_bytes = 64 << 20;
	hub->limits.event_timeout_ms = 20000;
	hub->trace.fd = -1;
	hub->journal.log.fd = hub->journal.snapshot.fd = -1;
	xs_loop_init(hub);
	hub->special[0] = dom0_and(hub, 1, 0, 0);
	hub->special[1] = dom0_and(hub, 2, XS_DOMID_ANY, XS_READ_ACCESS);
	plant(hub);
	return hub;
}

void pv_xs_free(struct pv_xs *hub)
{
	while (hub->connections) {
		struct pv_xs_conn *connection = hub->connections;

		pv_xs_disconnect(connection); /* its struct is the loop's or the caller's to free */
	}
	xs_loop_close(hub);
	for (struct xs_node *node = hub->root, *next; node; node = next) {
		next = node->newer;
		xs_node_free(hub, node);
	}
	for (int i = 0; i < 256; i++) {
		for (int k = 0; hub->domains[i] && k < 256; k++)
			free(hub->domains[i][k]);
		free(hub->domains[i]);
	}
	xs_perms_drop(hub, hub->special[0]);
	xs_perms_drop(hub, hub->special[1]);
	free(hub->nodes);
	free(hub->perms);
	free(hub->places);
	free(hub->matches);
	free(hub->trace.data);
	free(hub->journal.log.pending.data);
	free(hub->journal.snapshot.pending.data);
	free(hub);
}

struct pv_xs_limits *pv_xs_limits_of(struct pv_xs *hub)
{
	return &hub->limits;
}

void pv_xs_set_now(struct pv_xs *hub, int64_t now_ms)
{
	hub->now_ms = now_ms;
}

void pv_xs_get_statistics(struct pv_xs *hub, struct pv_xs_statistics *statistics)
{
	*statistics = hub->statistics;
	statistics->nodes = hub->n_nodes;
	statistics->watches = hub->n_watches;
	statistics->connections = hub->n_connections;
	statistics->transactions = hub->n_transactions;
	statistics->memory_bytes = (uint64_t)hub->memory_bytes;
	statistics->journal_bytes = hub->journal.log.bytes;
	statistics->journal_frames = hub->journal.frames;
	statistics->generation = hub->generation;
}

/* -- requests that the caller answers */

static const uint8_t *parked_packet(struct pv_xs *hub, struct xs_header *header)
{
	memcpy(header, hub->parked->in, sizeof *header);
	return hub->parked->in + XS_HEADER_BYTES;
}

int pv_xs_parked(struct pv_xs *hub, struct pv_xs_request *request)
{
	struct xs_header header;

	if (!hub->parked || hub->unresolved)
		return 0;
	*request = (struct pv_xs_request){ .connection = hub->parked, .payload = parked_packet(hub, &header) };
	request->op = header.op;
	request->request_id = header.request_id;
	request->transaction_id = header.transaction_id;
	request->domid = hub->parked->domain->public.domid;
	request->n_payload = header.n;
	return 1;
}

void xs_forget_absent(struct pv_xs *hub)
{
	if (hub->any_absent) {
		hub->any_absent = 0;
		memset(hub->absent, 0, sizeof hub->absent);
	}
}

void xs_drop_parked(struct pv_xs *hub)
{
	hub->parked = NULL;
	hub->unresolved = 0;
	xs_forget_absent(hub);
}

static struct pv_xs_conn *unpark(struct pv_xs *hub)
{
	struct pv_xs_conn *connection = hub->parked;

	hub->parked = NULL;
	connection->parked = 0;
	return connection;
}

int pv_xs_answer(struct pv_xs *hub, int error, const uint8_t *payload, uint32_t n)
{
	static const uint8_t too_big[] = "E2BIG";
	struct pv_xs_conn *connection;
	struct xs_header header;
	const uint8_t *arguments;

	if (!hub->parked)
		return PV_XS_DONE; /* the client left meanwhile */
	arguments = parked_packet(hub, &header);
	connection = unpark(hub);
	if (n > PV_XS_PAYLOAD_MAX) {
		error = 1;
		payload = too_big;
		n = sizeof too_big;
	}
	memcpy(xs_put_reply(connection, error ? XS_ERROR : header.op, header.request_id, header.transaction_id, n),
	       payload, n);
	if (xs_traces(hub))
		xs_trace_request(connection, &header, arguments, error ? (const char *)payload : "OK", 0);
	xs_consume_input(connection, XS_HEADER_BYTES + header.n);
	return xs_handle_waiting(connection);
}

int pv_xs_unresolved(struct pv_xs *hub, uint32_t *domid)
{
	if (!hub->parked || !hub->unresolved)
		return 0;
	*domid = hub->unresolved - 1;
	return 1;
}

int pv_xs_resolve(struct pv_xs *hub, int exists)
{
	uint32_t domid = hub->unresolved - 1;

	hub->unresolved = 0;
	if (!hub->parked)
		return PV_XS_DONE;
	if (exists) {
		xs_make_known(hub, xs_domain(hub, domid));
	} else {
		hub->absent[domid >> 3] |= (uint8_t)(1 << (domid & 7));
		hub->any_absent = 1;
	}
	return xs_handle_waiting(unpark(hub));
}

/* -- what must agree */

static const char *check_children(struct pv_xs *hub, uint64_t *n_names)
{
	for (struct xs_node *node = hub->root; node; node = node->newer) {
		const struct xs_content *content = node->content;

		if (node != hub->root && (!node->parent || node->parent->gone))
			return "a node has no parent";
		if (node->parent && !xs_content_has_name(node->parent->content, node->name, node->n_name))
			return "a node is not among the names of its parent";
		for (uint32_t at = 0; at < content->n_names; at += (uint32_t)strlen(content->names + at) + 1)
			++*n_names;
	}
	return NULL;
}

static const char *check_owned(struct pv_xs *hub)
{
	struct xs_domain *domain = NULL;

	while ((domain = xs_domain_next(hub, domain)))
		domain->n_found = 0;
	for (struct xs_node *node = hub->root; node; node = node->newer) {
		domain = xs_domain_find(hub, xs_owner(node->content->perms));
		if (!domain)
			return "a node's owner has no count";
		domain->n_found++;
	}
	domain = NULL;
	while ((domain = xs_domain_next(hub, domain))) {
		if (domain->n_found != domain->public.n_nodes)
			return "the count of what a domain owns is wrong";
		if (domain->public.memory_bytes < 0)
			return "a domain holds less than no memory";
	}
	return NULL;
}

const char *pv_xs_check(struct pv_xs *hub)
{
	uint64_t n_names = 0;
	uint32_t n_watches = 0;
	const char *result = check_children(hub, &n_names);

	if (result)
		return result;
	if (n_names + 1 != hub->n_nodes)
		return "a name has no node";
	for (const struct pv_xs_conn *connection = hub->connections; connection; connection = connection->next) {
		for (const struct xs_watch *watch = connection->watches; watch; watch = watch->next_of_connection)
			n_watches++;
	}
	if (n_watches != hub->n_watches)
		return "the count of watches is wrong";
	return check_owned(hub);
}
