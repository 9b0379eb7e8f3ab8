/* SPDX-License-Identifier: MIT */
/*
 * The tree: nodes in one table by (parent, name), contents that transactions may keep.
 *
 * Nodes also stand in the order they were made, which is the order of every list of children; a snapshot follows it.
 */
#define _GNU_SOURCE /* memmem */
#include <stddef.h>

#include "xs_private.h"

/* -- contents */

struct xs_content *xs_content_new(struct xs_perms *perms, const void *value, uint32_t n_value)
{
	struct xs_content *content = xs_alloc(sizeof *content + n_value);

	content->refs = 1;
	content->perms = xs_perms_keep(perms);
	content->n_value = n_value;
	if (n_value)
		memcpy(content->value, value, n_value);
	return content;
}

struct xs_content *xs_content_copy(const struct xs_content *content)
{
	struct xs_content *copy = xs_content_new(content->perms, content->value, content->n_value);

	copy->generation = content->generation;
	if (content->n_names) {
		copy->names = xs_alloc(content->n_names);
		memcpy(copy->names, content->names, content->n_names);
		copy->n_names = copy->names_room = content->n_names;
	}
	return copy;
}

struct xs_content *xs_content_keep(struct xs_content *content)
{
	content->refs++;
	return content;
}

void xs_content_drop(struct pv_xs *hub, struct xs_content *content)
{
	if (--content->refs)
		return;
	xs_perms_drop(hub, content->perms);
	free(content->names);
	free(content);
}

void xs_content_set_value(struct xs_content **slot, const void *value, uint32_t n)
{
	struct xs_content *content = *slot;

	if (n != content->n_value)
		content = *slot = xs_resize(content, sizeof *content + n);
	content->n_value = n;
	if (n)
		memcpy(content->value, value, n);
}

void xs_content_set_perms(struct pv_xs *hub, struct xs_content *content, struct xs_perms *perms)
{
	struct xs_perms *former = content->perms;

	content->perms = xs_perms_keep(perms);
	xs_perms_drop(hub, former);
}

/* Where a name stands among the names of the children, or NULL. */
static char *find_name(const struct xs_content *content, const char *name, uint32_t n)
{
	char *at = content->names;
	char *end = at + content->n_names;

	while (at < end) {
		at = memmem(at, (size_t)(end - at), name, n);
		if (!at)
			return NULL;
		if (at[n] == 0 && (at == content->names || at[-1] == 0))
			return at;
		at++;
	}
	return NULL;
}

int xs_content_has_name(const struct xs_content *content, const char *name, uint32_t n)
{
	return find_name(content, name, n) != NULL;
}

/* The caller has made sure that it is not there. */
void xs_content_add_name(struct xs_content *content, const char *name, uint32_t n)
{
	if (content->n_names + n + 1 > content->names_room) {
		content->names_room = (content->n_names + n + 1) + content->n_names / 2;
		content->names = xs_resize(content->names, content->names_room);
	}
	memcpy(content->names + content->n_names, name, n);
	content->names[content->n_names + n] = 0;
	content->n_names += n + 1;
}

void xs_content_remove_name(struct xs_content *content, const char *name, uint32_t n)
{
	char *at = find_name(content, name, n);

	content->n_names -= n + 1;
	memmove(at, at + n + 1, (size_t)(content->names + content->n_names - at));
}

uint32_t xs_content_bytes(const struct xs_content *content)
{
	return XS_NODE_HEADER_BYTES + XS_PERMISSION_BYTES * content->perms->n + content->n_value + content->n_names;
}

/* -- nodes */

static void grow(struct pv_xs *hub)
{
	uint32_t room = hub->nodes_room ? hub->nodes_room * 2 : 256;
	struct xs_node **table = xs_alloc(room * sizeof *table);

	for (uint32_t i = 0; i < hub->nodes_room; i++) {
		for (struct xs_node *node = hub->nodes[i], *next; node; node = next) {
			next = node->chain;
			node->chain = table[node->hash & (room - 1)];
			table[node->hash & (room - 1)] = node;
		}
	}
	free(hub->nodes);
	hub->nodes = table;
	hub->nodes_room = room;
}

struct xs_node *xs_find_child(struct pv_xs *hub, struct xs_node *parent, const char *name, uint32_t n, uint32_t hash)
{
	struct xs_node *node = hub->nodes[hash & (hub->nodes_room - 1)];

	for (; node; node = node->chain) {
		if (node->hash == hash && node->parent == parent && node->n_name == n && !memcmp(node->name, name, n))
			return node;
	}
	return NULL;
}

struct xs_node *xs_node_add(struct pv_xs *hub, struct xs_node *parent, const char *name, uint32_t n, uint32_t hash,
			    struct xs_content *content)
{
	struct xs_node *node = xs_alloc(offsetof(struct xs_node, name) + n);

	if (hub->n_nodes >= hub->nodes_room)
		grow(hub);
	node->hash = hash;
	node->refs = 1;
	node->n_path = (uint16_t)(parent ? (parent->parent ? parent->n_path : 0) + 1 + n : 1);
	node->parent = parent;
	node->content = content;
	node->n_name = (uint16_t)n;
	memcpy(node->name, name, n);
	node->chain = hub->nodes[node->hash & (hub->nodes_room - 1)];
	hub->nodes[node->hash & (hub->nodes_room - 1)] = node;
	node->older = hub->newest;
	if (hub->newest)
		hub->newest->newer = node;
	hub->newest = node;
	hub->n_nodes++;
	xs_snapshot_meet(hub, node);
	xs_account_node(hub, node, 1);
	return node;
}

void xs_node_unlink(struct pv_xs *hub, struct xs_node *node)
{
	struct xs_node **at = &hub->nodes[node->hash & (hub->nodes_room - 1)];

	while (*at != node)
		at = &(*at)->chain;
	*at = node->chain;
	xs_snapshot_skip(hub, node);
	if (node->newer)
		node->newer->older = node->older;
	else
		hub->newest = node->older;
	node->older->newer = node->newer; /* the root, which is the oldest, never goes */
	node->gone = 1;
	hub->n_nodes--;
	xs_account_node(hub, node, -1);
}

void xs_node_free(struct pv_xs *hub, struct xs_node *node)
{
	xs_content_drop(hub, node->content);
	node->content = NULL;
	xs_node_drop(node);
}

void xs_node_drop(struct xs_node *node)
{
	if (!--node->refs)
		free(node);
}

struct xs_content **xs_node_edit(struct pv_xs *hub, struct xs_node *node)
{
	if (node->content->refs > 1) {
		struct xs_content *copy = xs_content_copy(node->content);

		xs_content_drop(hub, node->content);
		node->content = copy;
	}
	node->content->generation = ++hub->generation;
	return &node->content;
}

uint32_t xs_path_of(const struct xs_node *node, char *path)
{
	uint32_t n = node->n_path;

	if (!node->parent) {
		path[0] = '/';
		path[1] = 0;
		return 1;
	}
	path[n] = 0;
	for (uint32_t end = n; node->parent; node = node->parent) {
		end -= node->n_name;
		memcpy(path + end, node->name, node->n_name);
		path[--end] = '/';
	}
	return n;
}

struct xs_node *xs_walk_node(struct xs_walk *walk, uint32_t level)
{
	if (level > walk->found)
		return NULL;
	for (; walk->at > level; walk->at--)
		walk->node = walk->node->parent;
	return walk->node;
}

/* A node to be looked into, and the hash of its path before mixing. */
struct to_see {
	struct xs_node *node;
	uint64_t hash;
};

static uint64_t hash_of_path(const struct pv_xs *hub, const struct xs_node *node)
{
	char path[XS_PATH_MAX + 1];
	uint32_t n = xs_path_of(node, path);

	return xs_hash_bytes(hub->seed, path, n);
}

static struct to_see child_to_see(struct pv_xs *hub, const struct to_see *parent, const char *name, uint32_t n)
{
	uint64_t hash = xs_hash_bytes(xs_hash_bytes(parent->hash, "/", 1), name, n);

	return (struct to_see){ xs_find_child(hub, parent->node, name, n, xs_mix(hash)), hash };
}

/*
 * Children before parents. The list is filled from its end: a node is entered when it leaves the stack, its children after
 * it, the last child first; read from its start that is every child, in order, before its parent.
 */
struct xs_node **xs_subtree(struct pv_xs *hub, struct xs_node *top, uint32_t *n)
{
	uint32_t room = 16, n_found = 0, n_stack = 1, stack_room = 16;
	struct xs_node **found = xs_alloc(room * sizeof *found);
	struct to_see *stack = xs_alloc(stack_room * sizeof *stack);

	stack[0] = (struct to_see){ top, hash_of_path(hub, top) };
	while (n_stack) {
		struct to_see seen = stack[--n_stack];
		const struct xs_content *content = seen.node->content;

		if (n_found == room)
			found = xs_resize(found, (room *= 2) * sizeof *found);
		found[n_found++] = seen.node;
		for (uint32_t at = 0; at < content->n_names;) {
			uint32_t length = (uint32_t)strlen(content->names + at);

			if (n_stack == stack_room)
				stack = xs_resize(stack, (stack_room *= 2) * sizeof *stack);
			stack[n_stack++] = child_to_see(hub, &seen, content->names + at, length);
			at += length + 1;
		}
	}
	free(stack);
	for (uint32_t i = 0; i < n_found / 2; i++) {
		struct xs_node *other = found[i];

		found[i] = found[n_found - 1 - i];
		found[n_found - 1 - i] = other;
	}
	*n = n_found;
	return found;
}

void xs_charge_nodes(struct pv_xs *hub, uint32_t domid, int32_t n)
{
	struct xs_domain *domain = xs_domain(hub, domid);

	domain->public.n_nodes = (uint32_t)((int32_t)domain->public.n_nodes + n);
}

void xs_account_node(struct pv_xs *hub, const struct xs_node *node, int sign)
{
	struct xs_domain *domain = xs_domain(hub, xs_owner(node->content->perms));

	xs_account(hub, domain, sign * (int64_t)(node->n_path + xs_content_bytes(node->content)));
}
