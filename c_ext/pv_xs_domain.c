/* SPDX-License-Identifier: MIT */
/* The domains: their quotas, what they hold, what is left of them when they are gone. */
#include <stdio.h>

#include "xs_private.h"

struct xs_domain *xs_domain_find(struct pv_xs *hub, uint32_t domid)
{
	struct xs_domain **page = domid <= XS_DOMID_MAX ? hub->domains[domid >> 8] : NULL;

	return page ? page[domid & 255] : NULL;
}

static void make_new(struct pv_xs *hub, struct xs_domain *domain)
{
	uint32_t n_nodes = domain->public.n_nodes;
	int64_t memory_bytes = domain->public.memory_bytes;

	domain->public = (struct pv_xs_domain){
		.domid = domain->public.domid, .n_nodes = n_nodes, .memory_bytes = memory_bytes,
		.known = domain->public.domid == 0, .introduced = domain->public.domid == 0, .features = XS_FEATURES,
	};
	memcpy(domain->public.quotas, hub->limits.quotas, sizeof hub->limits.quotas);
	domain->reported_ms = -XS_MEMORY_REPORT_MS;
	domain->has_credit = 0;
}

struct xs_domain *xs_domain(struct pv_xs *hub, uint32_t domid)
{
	struct xs_domain *domain = xs_domain_find(hub, domid);

	if (domain)
		return domain;
	if (!hub->domains[domid >> 8])
		hub->domains[domid >> 8] = xs_alloc(256 * sizeof **hub->domains);
	domain = hub->domains[domid >> 8][domid & 255] = xs_alloc(sizeof *domain);
	domain->public.domid = domid;
	domain->n_home = (uint32_t)sprintf(domain->home, "/local/domain/%u", domid);
	make_new(hub, domain);
	return domain;
}

struct xs_domain *xs_domain_next(struct pv_xs *hub, const struct xs_domain *domain)
{
	for (uint32_t domid = domain ? domain->public.domid + 1 : 0; domid <= XS_DOMID_MAX; domid++) {
		struct xs_domain **page = hub->domains[domid >> 8];

		if (!page)
			domid |= 255;
		else if (page[domid & 255])
			return page[domid & 255];
	}
	return NULL;
}

/* -- quotas */

uint32_t pv_xs_quota(struct pv_xs *hub, uint32_t domid, uint32_t quota)
{
	const struct xs_domain *domain = domid == PV_XS_GLOBAL ? NULL : xs_domain_find(hub, domid);

	return domain ? domain->public.quotas[quota] : hub->limits.quotas[quota];
}

void pv_xs_set_quota(struct pv_xs *hub, uint32_t domid, uint32_t quota, uint32_t value)
{
	if (domid == PV_XS_GLOBAL) {
		hub->limits.quotas[quota] = value;
		xs_log_quota(hub, quota, value);
	} else {
		struct xs_domain *domain = xs_domain(hub, domid);

		domain->public.quotas[quota] = value;
		xs_log_domain(hub, domain);
	}
	xs_log_commit(hub);
	xs_settle(hub);
}

int xs_over(struct xs_domain *domain, uint32_t quota, int64_t count)
{
	uint32_t limit = domain->public.quotas[quota];

	if (xs_privileged(domain))
		return 0;
	if (limit && count >= limit)
		return 1;
	xs_note(domain, quota, count);
	return 0;
}

int xs_over_memory(struct xs_domain *domain, int64_t n_bytes)
{
	return xs_over(domain, PV_XS_QUOTA_MEMORY, domain->public.memory_bytes + n_bytes);
}

static void gather_maxima(struct pv_xs *hub, const struct xs_domain *domain)
{
	for (uint32_t quota = 0; quota < PV_XS_N_QUOTAS; quota++) {
		if (domain->public.maxima[quota] > hub->maxima[quota])
			hub->maxima[quota] = domain->public.maxima[quota];
	}
}

void pv_xs_maxima(struct pv_xs *hub, uint32_t *maxima, int reset)
{
	struct xs_domain *domain = NULL;

	if (reset)
		memset(hub->maxima, 0, sizeof hub->maxima);
	while ((domain = xs_domain_next(hub, domain))) {
		if (reset)
			memset(domain->public.maxima, 0, sizeof domain->public.maxima);
		gather_maxima(hub, domain);
	}
	memcpy(maxima, hub->maxima, sizeof hub->maxima);
}

void xs_account(struct pv_xs *hub, struct xs_domain *domain, int64_t n_bytes)
{
	domain->public.memory_bytes += n_bytes;
	hub->memory_bytes += n_bytes;
}

void xs_note_memory(struct pv_xs *hub, struct xs_domain *domain)
{
	int64_t n_bytes = domain->public.memory_bytes;

	xs_note(domain, PV_XS_QUOTA_MEMORY, n_bytes);
	if (!xs_reached(n_bytes, domain->public.quotas[PV_XS_QUOTA_SOFT_MEMORY]))
		return;
	if (hub->now_ms - domain->reported_ms >= XS_MEMORY_REPORT_MS) {
		domain->reported_ms = hub->now_ms;
		xs_tell(hub, PV_XS_EVENT_MEMORY, -1, 0, domain->public.domid, NULL);
	}
}

/* -- who is served */

int xs_may_be_handled(const struct xs_domain *domain)
{
	return xs_privileged(domain) ||
	       !(xs_reached(domain->public.n_outstanding, domain->public.quotas[PV_XS_QUOTA_OUTSTANDING]) ||
		 domain->public.credit < 0);
}

int xs_may_be_read(const struct xs_domain *domain)
{
	return xs_privileged(domain) ||
	       (xs_may_be_handled(domain) &&
		!xs_reached(domain->public.memory_bytes, domain->public.quotas[PV_XS_QUOTA_MEMORY]));
}

void xs_stall(struct pv_xs *hub, struct xs_domain *domain)
{
	hub->n_stalled += !domain->stalled;
	domain->stalled = 1;
}

static void unstall(struct pv_xs *hub, struct xs_domain *domain)
{
	hub->n_stalled -= domain->stalled;
	domain->stalled = 0;
}

void xs_settle(struct pv_xs *hub)
{
	struct xs_domain *domain = NULL;

	while (hub->n_stalled && (domain = xs_domain_next(hub, domain))) {
		int read, handle;

		if (!domain->stalled)
			continue;
		if (domain->public.credit < 0)
			xs_grow_credit(hub, domain);
		read = xs_may_be_read(domain);
		handle = xs_may_be_handled(domain);
		if (read)
			unstall(hub, domain);
		for (struct pv_xs_conn *connection = domain->first; connection; connection = connection->next_of_domain) {
			if (read || (handle && connection->n_waiting && !xs_blocked(connection)))
				xs_mark_dirty(connection);
		}
	}
}

void xs_make_known(struct pv_xs *hub, struct xs_domain *domain)
{
	if (domain->public.known)
		return;
	memcpy(domain->public.quotas, hub->limits.quotas, sizeof hub->limits.quotas); /* those that new domains get */
	domain->public.known = 1;
	xs_log_domain(hub, domain);
	xs_log_commit(hub);
}

int64_t pv_xs_next_timeout(struct pv_xs *hub)
{
	int64_t next = INT64_MAX;
	struct xs_domain *domain = NULL;

	if (!hub->n_timed && !hub->n_stalled)
		return -1;
	while (hub->n_stalled && (domain = xs_domain_next(hub, domain))) {
		if (domain->stalled && domain->public.credit < 0) {
			int64_t due = domain->credit_ms + xs_debt_ms(hub, domain);

			next = due < next ? due : next;
		}
	}
	for (struct pv_xs_conn *connection = hub->connections; hub->n_timed && connection; connection = connection->next) {
		int64_t due = connection->timed ? xs_next_expiry(connection) : INT64_MAX;

		next = due < next ? due : next;
	}
	if (next == INT64_MAX)
		return -1;
	return next > hub->now_ms ? next - hub->now_ms : 0;
}

void pv_xs_on_time(struct pv_xs *hub)
{
	for (struct pv_xs_conn *connection = hub->connections; connection; connection = connection->next) {
		if (connection->timed)
			xs_drop_old_events(connection);
	}
	xs_settle(hub);
}

/* -- who there is */

int pv_xs_get_domain(struct pv_xs *hub, uint32_t domid, struct pv_xs_domain *public)
{
	const struct xs_domain *domain = xs_domain_find(hub, domid);

	if (!domain)
		return 0;
	*public = domain->public;
	return 1;
}

void pv_xs_set_domain(struct pv_xs *hub, const struct pv_xs_domain *public)
{
	struct xs_domain *domain = xs_domain(hub, public->domid);

	xs_make_known(hub, domain);
	domain->public.introduced = public->introduced;
	domain->public.shut_down = public->shut_down;
	domain->public.features = public->features;
	domain->public.has_target = public->has_target;
	domain->public.target = public->target;
	domain->public.gfn = public->gfn;
	domain->public.port = public->port;
	xs_log_domain(hub, domain);
	xs_log_commit(hub);
}

uint32_t pv_xs_domains(struct pv_xs *hub, uint32_t *domids, uint32_t max)
{
	uint32_t n = 0;

	for (struct xs_domain *domain = NULL; (domain = xs_domain_next(hub, domain));) {
		if (!domain->public.known)
			continue;
		if (n < max)
			domids[n] = domain->public.domid;
		n++;
	}
	return n;
}

/* -- what is left of the dead */

struct found {
	struct xs_node **nodes;
	uint32_t n;
	uint32_t room;
};

static void note(struct found *found, struct xs_node *node)
{
	if (found->n == found->room) {
		found->room = found->room ? found->room * 2 : 16;
		found->nodes = xs_resize(found->nodes, found->room * sizeof *found->nodes);
	}
	found->nodes[found->n++] = node;
}

/* Length of a path, kept while nodes are sorted. */
struct by_length {
	uint32_t n_path;
	uint32_t order;
	struct xs_node *node;
};

static int shorter(const void *left, const void *right)
{
	const struct by_length *a = left, *b = right;

	if (a->n_path != b->n_path)
		return a->n_path < b->n_path ? -1 : 1;
	return a->order < b->order ? -1 : 1;
}

static void sort_by_length(struct found *found)
{
	struct by_length *keys = xs_alloc((found->n + 1) * sizeof *keys);

	for (uint32_t i = 0; i < found->n; i++) {
		struct xs_node *node = found->nodes[i];

		keys[i] = (struct by_length){ .n_path = node->n_path, .order = i, .node = node };
	}
	qsort(keys, found->n, sizeof *keys, shorter);
	for (uint32_t i = 0; i < found->n; i++)
		found->nodes[i] = keys[i].node;
	free(keys);
}

/* Cut what is at and below a node; the nodes are added to `cut`, a NULL after each subtree. */
static void cut(struct pv_xs *hub, struct xs_node *top, struct found *removed)
{
	uint32_t n;
	struct xs_node **nodes = xs_subtree(hub, top, &n);
	struct xs_content **parent;
	char path[XS_PATH_MAX + 1];

	xs_log_removed(hub, path, xs_path_of(top, path), top);
	for (uint32_t i = 0; i < n; i++) {
		xs_charge_nodes(hub, xs_owner(nodes[i]->content->perms), -1);
		xs_node_unlink(hub, nodes[i]);
		note(removed, nodes[i]);
	}
	note(removed, NULL);
	free(nodes);
	xs_account_node(hub, top->parent, -1);
	parent = xs_node_edit(hub, top->parent);
	xs_content_remove_name(*parent, top->name, top->n_name);
	xs_account_node(hub, top->parent, 1);
}

static void unname(struct pv_xs *hub, struct xs_node *node, const uint8_t *dead)
{
	struct xs_perms *kept = xs_perms_without(hub, node->content->perms, dead);
	char path[XS_PATH_MAX + 1];

	xs_charge_nodes(hub, xs_owner(node->content->perms), -1);
	xs_charge_nodes(hub, xs_owner(kept), 1);
	xs_account_node(hub, node, -1);
	xs_content_set_perms(hub, *xs_node_edit(hub, node), kept);
	xs_account_node(hub, node, 1);
	xs_perms_drop(hub, kept);
	xs_log_node(hub, path, xs_path_of(node, path), node, 0);
}

static void tell_and_free(struct pv_xs *hub, struct found *removed)
{
	for (uint32_t i = 0; i < removed->n; i++) {
		if (removed->nodes[i])
			xs_fire_removed(hub, removed->nodes[i], removed->nodes[i + 1] != NULL);
	}
	/* A parent comes after its children: free when no path is needed any more. */
	for (uint32_t i = 0; i < removed->n; i++) {
		if (removed->nodes[i])
			xs_node_free(hub, removed->nodes[i]);
	}
	free(removed->nodes);
}

static void forget_nodes(struct pv_xs *hub, const uint8_t *dead)
{
	struct found owned = { 0 }, named = { 0 }, removed = { 0 };

	for (struct xs_node *node = hub->root; node; node = node->newer) {
		if (xs_perms_name_dead(node->content->perms, dead))
			note(xs_is_dead(dead, xs_owner(node->content->perms)) && node->parent ? &owned : &named, node);
	}
	sort_by_length(&owned);
	for (uint32_t i = 0; i < owned.n; i++) {
		if (!owned.nodes[i]->gone)
			cut(hub, owned.nodes[i], &removed);
	}
	for (uint32_t i = 0; i < named.n; i++) {
		if (!named.nodes[i]->gone)
			unname(hub, named.nodes[i], dead);
	}
	for (int name = 0; name < 2; name++) {
		struct xs_perms *kept = xs_perms_without(hub, hub->special[name], dead);

		xs_perms_drop(hub, hub->special[name]);
		hub->special[name] = kept;
		xs_log_special(hub, name);
	}
	tell_and_free(hub, &removed);
	free(owned.nodes);
	free(named.nodes);
}

static void forget_one(struct pv_xs *hub, struct xs_domain *domain)
{
	for (struct pv_xs_conn *connection = domain->first, *next; connection; connection = next) {
		next = connection->next_of_domain;
		pv_xs_disconnect(connection);
	}
	domain->epoch++;
	unstall(hub, domain);
	xs_leave_rate(hub, domain);
	gather_maxima(hub, domain);
	make_new(hub, domain);
	xs_log_domain(hub, domain);
}

void pv_xs_forget(struct pv_xs *hub, const uint32_t *domids, uint32_t n)
{
	uint8_t *dead = xs_alloc((XS_DOMID_MAX + 1) / 8);

	for (uint32_t i = 0; i < n; i++) {
		struct xs_domain *domain = domids[i] ? xs_domain_find(hub, domids[i]) : NULL;

		if (!domain)
			continue;
		dead[domids[i] >> 3] |= (uint8_t)(1 << (domids[i] & 7));
		forget_one(hub, domain);
	}
	for (struct xs_domain *domain = NULL; (domain = xs_domain_next(hub, domain));) {
		if (domain->public.has_target && xs_is_dead(dead, domain->public.target)) {
			domain->public.has_target = 0;
			xs_log_domain(hub, domain);
		}
	}
	for (struct pv_xs_conn *connection = hub->connections; connection; connection = connection->next) {
		struct xs_transaction *transaction = connection->transactions;

		for (; transaction; transaction = transaction->next)
			xs_transaction_forget(transaction, dead);
	}
	forget_nodes(hub, dead);
	xs_log_commit(hub);
	xs_settle(hub);
	free(dead);
}
