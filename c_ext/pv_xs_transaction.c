/* SPDX-License-Identifier: MIT */
/*
 * A transaction: a view that shows nothing of itself before it commits.
 *
 * It starts empty, whatever the size of the tree. A node is kept as it is when the transaction first looks at it; one that
 * is missing then stays missing. The commit succeeds only if everything looked at still has the generation it had then:
 * otherwise EAGAIN, also if nothing was written.
 */
#include "xs_private.h"

struct xs_transaction *xs_transaction_new(struct pv_xs_conn *connection)
{
	struct xs_transaction *transaction = xs_alloc(sizeof *transaction);
	struct pv_xs *hub = connection->hub;

	do {
		transaction->number = connection->next_transaction++;
	} while (!transaction->number || xs_transaction_find(connection, transaction->number));
	transaction->hub = hub;
	transaction->domain = connection->domain;
	transaction->next = connection->transactions;
	connection->transactions = transaction;
	connection->n_transactions++;
	connection->domain->public.n_transactions++;
	hub->n_transactions++;
	return transaction;
}

struct xs_transaction *xs_transaction_find(struct pv_xs_conn *connection, uint32_t number)
{
	struct xs_transaction *transaction = connection->transactions;

	while (transaction && transaction->number != number)
		transaction = transaction->next;
	return transaction;
}

static void hold(struct xs_transaction *transaction, int64_t n_bytes)
{
	transaction->memory_bytes += n_bytes;
	xs_account(transaction->hub, transaction->domain, n_bytes);
}

/* The caller has taken it out of its connection's list. */
void xs_transaction_close(struct xs_transaction *transaction)
{
	transaction->domain->public.n_transactions--;
	transaction->hub->n_transactions--;
	hold(transaction, -transaction->memory_bytes);
}

void xs_transaction_free(struct xs_transaction *transaction)
{
	struct pv_xs *hub = transaction->hub;

	for (uint32_t i = 0; i < transaction->n_accesses; i++) {
		struct xs_access *access = &transaction->accesses[i];

		if (access->content)
			xs_content_drop(hub, access->content);
		if (access->before)
			xs_perms_drop(hub, access->before);
		if (access->node)
			xs_node_drop(access->node);
		free(access->path);
	}
	free(transaction->accesses);
	free(transaction->table);
	free(transaction->charges);
	free(transaction);
}

static struct xs_access *find(const struct xs_transaction *transaction, const char *path, uint32_t n, uint32_t hash)
{
	uint32_t mask = transaction->table_room - 1;

	if (!transaction->table_room)
		return NULL;
	for (uint32_t i = hash & mask; transaction->table[i]; i = (i + 1) & mask) {
		struct xs_access *access = &transaction->accesses[transaction->table[i] - 1];

		if (access->hash == hash && access->n_path == n && !memcmp(access->path, path, n))
			return access;
	}
	return NULL;
}

static void enter(struct xs_transaction *transaction, uint32_t index)
{
	uint32_t mask = transaction->table_room - 1;
	uint32_t i = transaction->accesses[index].hash & mask;

	while (transaction->table[i])
		i = (i + 1) & mask;
	transaction->table[i] = index + 1;
}

static struct xs_access *add(struct xs_transaction *transaction)
{
	if (transaction->n_accesses == transaction->accesses_room) {
		uint32_t room = transaction->accesses_room ? transaction->accesses_room * 2 : 16;

		transaction->accesses = xs_resize(transaction->accesses, room * sizeof *transaction->accesses);
		transaction->accesses_room = room;
		free(transaction->table);
		transaction->table_room = room * 2;
		transaction->table = xs_alloc(transaction->table_room * sizeof *transaction->table);
		for (uint32_t i = 0; i < transaction->n_accesses; i++)
			enter(transaction, i);
	}
	return &transaction->accesses[transaction->n_accesses];
}

static struct xs_access *refuse(struct xs_transaction *transaction, int refusal)
{
	transaction->failed = 1;
	transaction->refusal = refusal;
	return NULL;
}

/* Remember what is at a path now: a node, or nothing (NULL). */
static struct xs_access *look_now(struct xs_transaction *transaction, const struct xs_access *seen, struct xs_node *node)
{
	uint32_t n_bytes = seen->n_path + (node ? xs_content_bytes(node->content) : XS_NODE_HEADER_BYTES);
	struct xs_access *access;

	if (xs_over(transaction->domain, PV_XS_QUOTA_TRANSACTION_NODES, transaction->n_accesses + 1))
		return refuse(transaction, XS_ENOSPC);
	if (xs_over_memory(transaction->domain, n_bytes))
		return refuse(transaction, XS_ENOMEM);
	access = add(transaction);
	*access = *seen;
	access->path = xs_alloc(seen->n_path);
	memcpy(access->path, seen->path, seen->n_path);
	enter(transaction, transaction->n_accesses++);
	hold(transaction, n_bytes);
	if (node) {
		node->refs++;
		access->node = node;
		access->content = xs_content_keep(node->content);
		access->before = xs_perms_keep(node->content->perms);
		access->base = node->content->generation;
	}
	return access;
}

/* What it knows of the path at a level, looking now if it never has; NULL: its domain may not look at it (refusal). */
struct xs_access *xs_transaction_look(struct xs_transaction *transaction, struct xs_walk *walk, uint32_t level)
{
	struct xs_access seen = {
		.path = (char *)walk->path, .n_path = walk->end[level], .hash = walk->hash[level], .level = level,
	};
	struct xs_access *access = find(transaction, seen.path, seen.n_path, seen.hash);

	return access ? access : look_now(transaction, &seen, xs_walk_node(walk, level));
}

struct xs_access *xs_transaction_look_below(struct xs_transaction *transaction, uint32_t parent, const char *path, uint32_t n,
					    uint32_t start, uint32_t hash)
{
	const struct xs_access *above = &transaction->accesses[parent];
	struct xs_access *access = find(transaction, path, n, hash);
	struct pv_xs *hub = transaction->hub;

	if (access)
		return access;
	if (!above->node->gone) { /* what was made here has an access */
		struct xs_access seen = {
			.path = (char *)path, .n_path = n, .hash = hash, .level = above->level + 1,
		};

		return look_now(transaction, &seen, xs_find_child(hub, above->node, path + start, n - start, hash));
	}
	xs_measure(hub, &hub->look, path, n);
	xs_walk(hub, &hub->look);
	return xs_transaction_look(transaction, &hub->look, hub->look.n_levels);
}

/* Its content, for changing right now. */
struct xs_content **xs_transaction_edit(struct xs_transaction *transaction, struct xs_access *access)
{
	struct pv_xs *hub = transaction->hub;

	if (!access->modified) {
		struct xs_content *copy = xs_content_copy(access->content);

		xs_content_drop(hub, access->content);
		access->content = copy;
		access->modified = 1;
	}
	access->content->generation = ++hub->generation;
	return &access->content;
}

int64_t xs_transaction_charged(const struct xs_transaction *transaction, uint32_t domid)
{
	for (uint32_t i = 0; i < transaction->n_charges; i++) {
		if (transaction->charges[i].domid == domid)
			return transaction->charges[i].n;
	}
	return 0;
}

void xs_transaction_charge(struct xs_transaction *transaction, uint32_t domid, int32_t n_nodes, int64_t n_bytes)
{
	uint32_t i = 0;

	hold(transaction, n_bytes);

	while (i < transaction->n_charges && transaction->charges[i].domid != domid)
		i++;
	if (i == transaction->n_charges) {
		if (i == transaction->charges_room) {
			transaction->charges_room = i ? i * 2 : 4;
			transaction->charges =
				xs_resize(transaction->charges, transaction->charges_room * sizeof *transaction->charges);
		}
		transaction->charges[transaction->n_charges++] = (struct xs_charge){ .domid = domid };
	}
	transaction->charges[i].n += n_nodes;
}

void xs_transaction_forget(struct xs_transaction *transaction, const uint8_t *dead)
{
	struct pv_xs *hub = transaction->hub;

	for (uint32_t i = 0; i < transaction->n_accesses; i++) {
		struct xs_access *access = &transaction->accesses[i];
		struct xs_content *content = access->content;
		struct xs_perms *kept;
		int64_t before;

		if (!access->modified || !content || !xs_perms_name_dead(content->perms, dead))
			continue;
		if (xs_is_dead(dead, xs_owner(content->perms))) {
			transaction->outdated = 1;
			continue;
		}
		before = xs_content_bytes(content);
		kept = xs_perms_without(hub, content->perms, dead);
		xs_content_set_perms(hub, content, kept);
		xs_perms_drop(hub, kept);
		hold(transaction, xs_content_bytes(content) - before);
	}
}

/* -- commit */

/*
 * Whether what it saw is no more as it was. What was missing still is while the nearest node above it is as it was: that is
 * among the accesses too, for who finds nothing looks on upwards (xs_lookup).
 */
static int has_changed(const struct xs_access *access)
{
	return access->base && (access->node->gone || access->node->content->generation != access->base);
}

static int conflicts(const struct xs_transaction *transaction)
{
	for (uint32_t i = 0; i < transaction->n_accesses; i++) {
		if (has_changed(&transaction->accesses[i]))
			return 1;
	}
	return 0;
}

static int over_quota(struct xs_transaction *transaction, const struct xs_domain *who)
{
	struct pv_xs *hub = transaction->hub;

	if (xs_privileged(who))
		return 0;
	/* Each owner has a quota of its own, whoever commits. */
	for (uint32_t i = 0; i < transaction->n_charges; i++) {
		const struct xs_charge *charge = &transaction->charges[i];
		struct xs_domain *owner = xs_domain(hub, charge->domid);

		if (charge->n > 0 && xs_over(owner, PV_XS_QUOTA_NODES, (int64_t)owner->public.n_nodes + charge->n))
			return 1;
	}
	return 0;
}

static int by_level(const void *left, const void *right)
{
	const struct xs_access *a = *(struct xs_access *const *)left, *b = *(struct xs_access *const *)right;

	if (a->level != b->level)
		return a->level < b->level ? -1 : 1;
	if (a->sequence != b->sequence)
		return a->sequence < b->sequence ? -1 : 1;
	return a < b ? -1 : a > b;
}

/* Take away what it removed, or removed and made again: the latter stands last among its siblings. */
static void apply_removal(struct pv_xs *hub, const struct xs_access *access)
{
	if (!access->inner) /* else who reads of the node above it knows */
		xs_log_removed(hub, access->path, access->n_path, access->node);
	xs_node_unlink(hub, access->node);
	xs_node_free(hub, access->node);
}

/* The node of an access is now this one. */
static void know(struct xs_access *access, struct xs_node *node)
{
	if (access->node)
		xs_node_drop(access->node);
	access->node = node;
	node->refs++;
}

/* Whether what it is now about is a new node. */
static int is_made(const struct xs_access *access)
{
	return !access->base || access->remade;
}

static void apply_content(struct xs_transaction *transaction, struct xs_access *access)
{
	struct xs_content *content = xs_content_keep(access->content);
	struct pv_xs *hub = transaction->hub;

	if (!is_made(access)) {
		struct xs_node *node = access->node;

		xs_account_node(hub, node, -1);
		xs_content_drop(hub, node->content);
		node->content = content;
		xs_account_node(hub, node, 1);
	} else {
		struct xs_node *parent = transaction->accesses[access->parent].node;
		uint32_t start = parent->parent ? parent->n_path + 1u : 1u;

		know(access, xs_node_add(hub, parent, access->path + start, access->n_path - start, access->hash, content));
	}
}

/* Whether the record of a node says all about the one above it. */
static int implies(const struct xs_transaction *transaction, const struct xs_access *below, const struct xs_access *above)
{
	return below->content && is_made(below) && is_made(above) && &transaction->accesses[below->parent] == above &&
	       !above->content->n_value && above->content->perms == below->content->perms;
}

static void apply(struct xs_transaction *transaction)
{
	struct pv_xs *hub = transaction->hub;
	struct xs_access **changes = xs_alloc((transaction->n_accesses + 1) * sizeof *changes);
	uint32_t n = 0, n_above = 0;

	for (uint32_t i = 0; i < transaction->n_accesses; i++) {
		struct xs_access *access = &transaction->accesses[i];

		if (!access->modified)
			continue;
		changes[n++] = access;
		if (access->content)
			access->content->generation = ++hub->generation;
	}
	qsort(changes, n, sizeof *changes, by_level);
	for (uint32_t i = n; i-- > 0;) {
		if (changes[i]->base && (!changes[i]->content || changes[i]->remade))
			apply_removal(hub, changes[i]);
	}
	for (uint32_t i = 0; i < n; i++) {
		if (!changes[i]->content)
			continue;
		apply_content(transaction, changes[i]);
		if (i + 1 < n && implies(transaction, changes[i + 1], changes[i])) {
			n_above++;
			continue;
		}
		xs_log_node(hub, changes[i]->path, changes[i]->n_path, changes[i]->node, n_above);
		n_above = 0;
	}
	free(changes);
	for (uint32_t i = 0; i < transaction->n_charges; i++)
		xs_charge_nodes(hub, transaction->charges[i].domid, transaction->charges[i].n);
}

int xs_transaction_commit(struct xs_transaction *transaction, const struct xs_domain *who)
{
	struct pv_xs *hub = transaction->hub;

	if (transaction->failed || xs_memory_is_short())
		return XS_ENOMEM;
	if (over_quota(transaction, who))
		return XS_ENOSPC;
	if (conflicts(transaction) || transaction->outdated)
		return XS_EAGAIN;
	apply(transaction);
	for (uint32_t i = 0; i < transaction->n_accesses; i++) {
		const struct xs_access *access = &transaction->accesses[i];

		if (access->event && (!access->exact || xs_is_watched(hub, access->hash)))
			xs_fire(hub, access->path, access->n_path, access->content, access->exact, access->before);
	}
	return XS_OK;
}
