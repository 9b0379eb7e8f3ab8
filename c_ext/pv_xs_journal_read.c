/* SPDX-License-Identifier: MIT */
/* Make a store from its journal, whose form stands in pv_xs_journal.c. The file is ours, but it may be damaged: everything
 * is checked. */
#include <errno.h>

#include "xs_journal.h"

struct reader {
	const uint8_t *at;
	uint64_t left;
	int bad;
};

static const uint8_t *take(struct reader *reader, uint64_t n)
{
	const uint8_t *at = reader->at;

	if (n > reader->left) {
		reader->bad = 1;
		return NULL;
	}
	reader->at += n;
	reader->left -= n;
	return at;
}

static uint64_t take_number(struct reader *reader, uint32_t n)
{
	uint64_t number = 0;
	const uint8_t *at = take(reader, n);

	if (at)
		memcpy(&number, at, n);
	return number;
}

static struct xs_perms *take_perms(struct pv_xs *hub, const uint8_t *at, uint32_t n)
{
	struct xs_perm *entries = xs_alloc(n * sizeof *entries);
	struct xs_perms *perms;

	memcpy(entries, at, n * sizeof *entries);
	perms = xs_perms_intern(hub, entries, n);
	free(entries);
	return perms;
}

static int take_path(struct pv_xs *hub, const uint8_t *path, uint32_t n)
{
	if (!path || !n || n > XS_PATH_MAX || path[0] != '/' ||
	    xs_canonical(hub, xs_domain(hub, 0), (const char *)path, n) != n)
		return -EPROTO;
	xs_walk(hub, &hub->walk);
	return 0;
}

static void set_node(struct pv_xs *hub, struct xs_node *node, struct xs_perms *perms, const uint8_t *value, uint32_t n)
{
	struct xs_content **slot;

	xs_charge_nodes(hub, xs_owner(node->content->perms), -1);
	xs_charge_nodes(hub, xs_owner(perms), 1);
	xs_account_node(hub, node, -1);
	slot = xs_node_edit(hub, node);
	xs_content_set_value(slot, value, n);
	xs_content_set_perms(hub, *slot, perms);
	xs_account_node(hub, node, 1);
}

/* The first level below what there is. */
static void add_node(struct pv_xs *hub, struct xs_perms *perms, const uint8_t *value, uint32_t n)
{
	struct xs_walk *walk = &hub->walk;
	uint32_t level = walk->found + 1, start = level > 1 ? walk->end[level - 1] + 1u : 1u;
	struct xs_node *parent = walk->node;
	struct xs_content *content = xs_content_new(perms, value, n);
	const char *name = walk->path + start;

	xs_account_node(hub, parent, -1);
	xs_content_add_name(*xs_node_edit(hub, parent), name, walk->end[level] - start);
	xs_account_node(hub, parent, 1);
	content->generation = ++hub->generation;
	walk->node = xs_node_add(hub, parent, name, walk->end[level] - start, walk->hash[level], content);
	walk->found = walk->at = level;
	xs_charge_nodes(hub, xs_owner(perms), 1);
}

/* n_above: levels above it that are missing. */
static int apply_node(struct pv_xs *hub, struct reader *reader, uint32_t n_above)
{
	uint32_t n_path = (uint32_t)take_number(reader, 2), n_perms = (uint32_t)take_number(reader, 2);
	uint32_t n_value = (uint32_t)take_number(reader, 4);
	const uint8_t *path = take(reader, n_path);
	const uint8_t *entries = take(reader, n_perms * sizeof(struct xs_perm));
	const uint8_t *value = take(reader, n_value);
	struct xs_perms *perms;
	struct xs_node *node;

	if (reader->bad || !n_perms || take_path(hub, path, n_path))
		return -EPROTO;
	if (hub->walk.found + n_above + (n_above || hub->walk.found < hub->walk.n_levels) != hub->walk.n_levels)
		return -EPROTO;
	perms = take_perms(hub, entries, n_perms);
	node = xs_walk_node(&hub->walk, hub->walk.n_levels);
	if (node)
		set_node(hub, node, perms, value, n_value);
	while (hub->walk.found + 1 < hub->walk.n_levels)
		add_node(hub, perms, NULL, 0);
	if (!node)
		add_node(hub, perms, value, n_value);
	xs_perms_drop(hub, perms);
	return 0;
}

static void remove_subtree(struct pv_xs *hub, struct xs_node *top)
{
	struct xs_node *parent = top->parent, **nodes;
	uint32_t n;

	xs_account_node(hub, parent, -1);
	xs_content_remove_name(*xs_node_edit(hub, parent), top->name, top->n_name);
	xs_account_node(hub, parent, 1);
	nodes = xs_subtree(hub, top, &n);
	for (uint32_t i = 0; i < n; i++) {
		xs_charge_nodes(hub, xs_owner(nodes[i]->content->perms), -1);
		xs_node_unlink(hub, nodes[i]);
		xs_node_free(hub, nodes[i]);
	}
	free(nodes);
}

static int apply_removed(struct pv_xs *hub, struct reader *reader)
{
	uint32_t n_path = (uint32_t)take_number(reader, 2);
	const uint8_t *path = take(reader, n_path);
	struct xs_node *node;

	if (reader->bad || take_path(hub, path, n_path) || !hub->walk.n_levels)
		return -EPROTO;
	node = xs_walk_node(&hub->walk, hub->walk.n_levels);
	if (node)
		remove_subtree(hub, node);
	return 0;
}

static int apply_special(struct pv_xs *hub, struct reader *reader)
{
	uint32_t name = (uint32_t)take_number(reader, 1), n = (uint32_t)take_number(reader, 2);
	const uint8_t *entries = take(reader, n * sizeof(struct xs_perm));

	if (reader->bad || name > 1 || !n)
		return -EPROTO;
	xs_perms_drop(hub, hub->special[name]);
	hub->special[name] = take_perms(hub, entries, n);
	return 0;
}

static int apply_domain(struct pv_xs *hub, struct reader *reader)
{
	struct pv_xs_domain *domain;
	uint32_t domid = (uint32_t)take_number(reader, 4);
	const uint8_t *flags = take(reader, 4), *words = take(reader, 16);
	const uint8_t *quotas = take(reader, sizeof domain->quotas);
	uint32_t values[4];

	if (reader->bad || domid > XS_DOMID_MAX)
		return -EPROTO;
	memcpy(values, words, sizeof values);
	if (values[1] > XS_DOMID_MAX)
		return -EPROTO;
	domain = &xs_domain(hub, domid)->public;
	domain->known = flags[0];
	domain->introduced = flags[1];
	domain->shut_down = flags[2];
	domain->has_target = flags[3];
	domain->features = values[0];
	domain->target = values[1];
	domain->gfn = values[2];
	domain->port = values[3];
	memcpy(domain->quotas, quotas, sizeof domain->quotas);
	return 0;
}

static int apply_quota(struct pv_xs *hub, struct reader *reader)
{
	uint32_t quota = (uint32_t)take_number(reader, 4), value = (uint32_t)take_number(reader, 4);

	if (reader->bad || quota >= PV_XS_N_QUOTAS)
		return -EPROTO;
	hub->limits.quotas[quota] = value;
	return 0;
}

static int apply_frame(struct pv_xs *hub, const uint8_t *records, uint32_t n, int *complete)
{
	struct reader reader = { .at = records, .left = n };
	int error = 0;

	while (reader.left && !error) {
		switch (take_number(&reader, 1)) {
		case NODE: error = apply_node(hub, &reader, 0); break;
		case MADE: error = apply_node(hub, &reader, (uint32_t)take_number(&reader, 2)); break;
		case REMOVED: error = apply_removed(hub, &reader); break;
		case SPECIAL: error = apply_special(hub, &reader); break;
		case DOMAIN: error = apply_domain(hub, &reader); break;
		case QUOTA: error = apply_quota(hub, &reader); break;
		case GENERATION:
			hub->generation = take_number(&reader, 8);
			error = reader.bad ? -EPROTO : 0;
			break;
		case COMPLETE: *complete = 1; break;
		default: error = -EPROTO;
		}
	}
	return error;
}

/*
 * What stands at `at`: 1 and the header of a whole frame; 0: the rest of a write that was cut off, or that the machine has
 * kept as zeros or by halves when it failed; -EPROTO: something else, and more after it.
 */
static int look_at_frame(const uint8_t *data, uint64_t at, uint64_t end, struct frame_header *header)
{
	uint64_t left = end - at;

	if (left < FRAME_HEADER_BYTES)
		return 0;
	memcpy(header, data + at, sizeof *header);
	if (!header->n || header->n > FRAME_MAX ||
	    header->n_crc != xs_crc(0, (const uint8_t *)&header->n, sizeof header->n)) {
		for (; at < end; at++) {
			if (data[at])
				return -EPROTO;
		}
		return 0;
	}
	left -= FRAME_HEADER_BYTES;
	if (left < header->n)
		return 0;
	if (header->crc == xs_crc(0, data + at + FRAME_HEADER_BYTES, header->n))
		return 1;
	return left == header->n ? 0 : -EPROTO;
}

static void empty(struct pv_xs *hub)
{
	while (hub->root->content->n_names) {
		struct xs_walk *walk = &hub->walk;

		hub->path[0] = '/';
		strcpy(hub->path + 1, hub->root->content->names);
		xs_measure(hub, walk, hub->path, (uint32_t)strlen(hub->path));
		xs_walk(hub, walk);
		remove_subtree(hub, walk->node);
	}
}

int pv_xs_journal_load(struct pv_xs *hub, const uint8_t *data, uint64_t n, uint64_t *n_good)
{
	uint64_t at = FILE_HEADER_BYTES;
	struct frame_header header;
	uint32_t words[2];
	int found = 1, complete = 0;

	xs_crc_init();
	*n_good = 0;
	if (n < FILE_HEADER_BYTES || memcmp(data, magic, sizeof magic))
		return -EPROTO;
	memcpy(words, data + sizeof magic, sizeof words);
	if (words[1] != xs_crc(0, data, FILE_HEADER_BYTES - sizeof words[1]))
		return -EPROTO;
	if (words[0] != VERSION)
		return -ENOTSUP;
	empty(hub);
	for (; at < n; at += FRAME_HEADER_BYTES + header.n) {
		*n_good = at;
		found = look_at_frame(data, at, n, &header);
		if (found <= 0)
			break;
		if (apply_frame(hub, data + at + FRAME_HEADER_BYTES, header.n, &complete))
			return -EPROTO;
	}
	*n_good = at;
	return found < 0 || !complete ? -EPROTO : 0;
}
