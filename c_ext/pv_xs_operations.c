/* SPDX-License-Identifier: MIT */
/*
 * What requests do to the tree: look up, write, make, remove, set permissions.
 *
 * Each works on the path in the view's walk, in the tree or in a transaction, and comes to XS_OK or an errno; nothing is
 * changed when it is an errno. No recursion: a path may have 1500 levels.
 */
#include "xs_private.h"

/* -- the view */

static struct xs_content *get(struct xs_view *view, uint32_t level)
{
	if (view->transaction) {
		struct xs_access *access = xs_transaction_look(view->transaction, view->walk, level);

		return access ? access->content : NULL;
	}
	struct xs_node *node = xs_walk_node(view->walk, level);

	return node ? node->content : NULL;
}

/* Why a `get` found nothing although there may be something (XS_ENOSPC, XS_ENOMEM), or XS_OK. */
static int refused(const struct xs_view *view)
{
	return view->transaction ? view->transaction->refusal : XS_OK;
}

/* A change could not be made as a whole: a transaction can then only be given up. */
static void fail(struct xs_view *view)
{
	if (view->transaction)
		view->transaction->failed = 1;
}

/* The content at a level that `get` found, for changing right now; `edited` follows. */
static struct xs_content **edit(struct xs_view *view, uint32_t level)
{
	if (view->transaction) {
		struct xs_access *access = xs_transaction_look(view->transaction, view->walk, level);

		return xs_transaction_edit(view->transaction, access);
	}
	struct xs_node *node = xs_walk_node(view->walk, level);

	xs_account_node(view->hub, node, -1);
	return xs_node_edit(view->hub, node);
}

static void edited(struct xs_view *view, uint32_t level)
{
	if (!view->transaction)
		xs_account_node(view->hub, xs_walk_node(view->walk, level), 1);
}

static int64_t owned(const struct xs_view *view, uint32_t domid)
{
	const struct xs_domain *domain = xs_domain_find(view->hub, domid);
	int64_t n = domain ? domain->public.n_nodes : 0;

	return view->transaction ? n + xs_transaction_charged(view->transaction, domid) : n;
}

/* A change of what a domain owns. The tree accounts for bytes where nodes change (`edit`, `edited`). */
static void charge(struct xs_view *view, uint32_t domid, int32_t n_nodes, int64_t n_bytes)
{
	if (view->transaction)
		xs_transaction_charge(view->transaction, domid, n_nodes, n_bytes);
	else
		xs_charge_nodes(view->hub, domid, n_nodes);
}

/* Whether the memory counts as that of `who` when a node of `owner` grows: a transaction's copies are its own. */
static int pays(const struct xs_view *view, const struct xs_domain *who, uint32_t owner)
{
	return view->transaction || who->public.domid == owner;
}

static const char *name_at(const struct xs_walk *walk, uint32_t level, uint32_t *n)
{
	uint32_t start = level > 1 ? walk->end[level - 1] + 1u : 1u;

	*n = walk->end[level] - start;
	return walk->path + start;
}

/* Tell watchers of a change, or have the transaction do it when it commits. n_above: levels that were made for the node. */
static void changed(struct xs_view *view, uint32_t n_above, const struct xs_content *content, const struct xs_perms *before)
{
	uint32_t level = view->walk->n_levels;

	if (view->transaction) {
		struct xs_access *access = xs_transaction_look(view->transaction, view->walk, level);

		access->event = 1;
		access->exact = 0;
	} else {
		xs_log_node(view->hub, view->walk->path, view->walk->end[level], xs_walk_node(view->walk, level), n_above);
		xs_fire(view->hub, view->walk->path, view->walk->end[level], content, 0, before);
	}
}

/* -- look up */

/*
 * The node, if `who` has all of the access `need`. Otherwise ENOENT or EACCES: a domain learns that a node is missing only
 * if the nearest ancestor that exists would grant it the same access.
 */
int xs_lookup(struct xs_view *view, const struct xs_domain *who, int need, struct xs_content **content)
{
	uint32_t level = view->walk->n_levels;
	struct xs_content *found = get(view, level), *ancestor = NULL;
	int error;

	*content = found;
	if (!found && refused(view))
		return refused(view);
	if (found && (xs_access(who, found->perms) & need) == need)
		return XS_OK;
	error = found ? XS_EACCES : XS_ENOENT;
	while (!ancestor) {
		level -= level > 0;
		ancestor = get(view, level);
		if (!ancestor && refused(view))
			return refused(view);
	}
	return xs_access(who, ancestor->perms) & need ? error : XS_EACCES;
}

/* -- make */

/* Why a guest may not make a node of `owner` grow by n_more bytes, to n_bytes; a transaction fails then. */
static int refused_growth(struct xs_view *view, struct xs_domain *who, uint32_t owner, int64_t n_more, int64_t n_bytes)
{
	int error = XS_OK;

	if (xs_over(who, PV_XS_QUOTA_NODE_SIZE, n_bytes))
		error = XS_ENOSPC;
	else if (n_more > 0 && pays(view, who, owner) && xs_over_memory(who, n_more))
		error = XS_ENOMEM;
	if (error)
		fail(view);
	return error;
}

/* Sizes of the levels below `parent_level`, which are to be made. */
struct making {
	uint32_t n_nodes;
	int64_t n_bytes;        /* of all of them, with their paths */
	int64_t largest;
	uint32_t n_name;        /* bytes by which the parent's list of names grows */
};

static struct making measure_new(const struct xs_walk *walk, uint32_t parent_level, const struct xs_perms *perms,
				 uint32_t n_value)
{
	struct making making = { .n_nodes = walk->n_levels - parent_level };

	for (uint32_t level = parent_level + 1; level <= walk->n_levels; level++) {
		int64_t n_bytes = XS_NODE_HEADER_BYTES + XS_PERMISSION_BYTES * (int64_t)perms->n;
		uint32_t n_name;

		if (level == walk->n_levels) {
			n_bytes += n_value;
		} else {
			(void)name_at(walk, level + 1, &n_name);
			n_bytes += n_name + 1;
		}
		making.n_bytes += n_bytes + walk->end[level];
		making.largest = n_bytes > making.largest ? n_bytes : making.largest;
	}
	(void)name_at(walk, parent_level + 1, &making.n_name);
	making.n_name++;
	return making;
}

/* Why a guest may not make new nodes below `parent`. */
static int refused_nodes(struct xs_view *view, struct xs_domain *who, const struct xs_content *parent,
			 const struct making *making)
{
	int64_t n_owned = owned(view, who->public.domid), n_more = making->n_bytes;
	int64_t n_parent = xs_content_bytes(parent) + making->n_name;

	if (xs_over(who, PV_XS_QUOTA_NODES, n_owned + making->n_nodes)) {
		if (!xs_over(who, PV_XS_QUOTA_NODES, n_owned + 1))
			fail(view);
		return XS_ENOSPC;
	}
	if (pays(view, who, xs_owner(parent->perms)))
		n_more += making->n_name;
	return refused_growth(view, who, who->public.domid, n_more, n_parent > making->largest ? n_parent : making->largest);
}

/* One new node; its parent is there and does not have its name yet. */
static struct xs_content *make_one(struct xs_view *view, uint32_t level, struct xs_perms *perms, const void *value,
				   uint32_t n_value)
{
	struct xs_content *content = xs_content_new(perms, value, n_value);
	struct xs_walk *walk = view->walk;
	uint32_t n_name;
	const char *name = name_at(walk, level, &n_name);

	if (level < walk->n_levels) {
		uint32_t n_child;
		const char *child = name_at(walk, level + 1, &n_child);

		xs_content_add_name(content, child, n_child);
	}
	content->generation = view->hub->generation + walk->n_levels - level + 1;
	if (view->transaction) {
		struct xs_transaction *transaction = view->transaction;
		struct xs_access *parent = xs_transaction_look(transaction, walk, level - 1);
		struct xs_access *access = xs_transaction_look(transaction, walk, level);

		access->parent = (uint32_t)(parent - transaction->accesses);
		access->content = content;
		access->modified = 1;
		access->sequence = ++view->transaction->n_made;
	} else {
		walk->node = xs_node_add(view->hub, xs_walk_node(walk, level - 1), name, n_name, walk->hash[level], content);
		walk->at = walk->found = level;
	}
	return content;
}

static int create(struct xs_view *view, struct xs_domain *who, const void *value, uint32_t n_value)
{
	struct xs_walk *walk = view->walk;
	uint32_t top = walk->n_levels - 1;      /* the root always exists, so level 0 is not made */
	struct xs_content *parent, *made = NULL;
	struct xs_perms *perms;
	struct making making;
	const char *name;
	uint32_t n_name, owner;
	int error = XS_OK;

	while (!(parent = get(view, top))) /* which the look-up has looked at */
		top--;
	owner = xs_owner(parent->perms);
	if (xs_privileged(who))
		perms = xs_perms_keep(parent->perms);
	else
		perms = xs_perms_owned_by(view->hub, parent->perms, who->public.domid);
	making = measure_new(walk, top, perms, n_value);
	if (!xs_privileged(who))
		error = refused_nodes(view, who, parent, &making);
	if (!error) {
		name = name_at(walk, top + 1, &n_name);
		xs_content_add_name(*edit(view, top), name, n_name);
		edited(view, top);
		charge(view, owner, 0, making.n_name);
		for (uint32_t level = top + 1; level <= walk->n_levels; level++)
			made = make_one(view, level, perms, level == walk->n_levels ? value : NULL,
					level == walk->n_levels ? n_value : 0);
		view->hub->generation += making.n_nodes;
		charge(view, xs_owner(perms), (int32_t)making.n_nodes, making.n_bytes);
		changed(view, making.n_nodes - 1, made, NULL);
	}
	xs_perms_drop(view->hub, perms);
	return error;
}

int xs_write(struct xs_view *view, struct xs_domain *who, const void *value, uint32_t n)
{
	uint32_t level = view->walk->n_levels;
	struct xs_content *content, **slot;
	int error = xs_lookup(view, who, XS_WRITE_ACCESS, &content);
	uint32_t owner;
	int64_t n_more;

	if (error == XS_ENOENT)
		return create(view, who, value, n);
	if (error)
		return error;
	owner = xs_owner(content->perms);
	n_more = (int64_t)n - content->n_value;
	error = refused_growth(view, who, owner, n_more, xs_content_bytes(content) + n_more);
	if (error)
		return error;
	slot = edit(view, level);
	xs_content_set_value(slot, value, n);
	edited(view, level);
	charge(view, owner, 0, n_more);
	changed(view, 0, *slot, NULL);
	return XS_OK;
}

int xs_mkdir(struct xs_view *view, struct xs_domain *who, int *made)
{
	struct xs_content *content;
	int error = xs_lookup(view, who, XS_WRITE_ACCESS, &content);

	*made = error == XS_ENOENT;
	return *made ? create(view, who, NULL, 0) : error;
}

/* -- remove */

static void cut_from_parent(struct xs_view *view)
{
	uint32_t level = view->walk->n_levels, n_name;
	const char *name = name_at(view->walk, level, &n_name);
	struct xs_content *content = *edit(view, level - 1);

	xs_content_remove_name(content, name, n_name);
	edited(view, level - 1);
	charge(view, xs_owner(content->perms), 0, -(int64_t)n_name - 1);
}

/* In the tree: events come after all is gone, those of what was below the node only for who watches exactly that. */
static int cut_tree(struct xs_view *view)
{
	struct pv_xs *hub = view->hub;
	struct xs_walk *walk = view->walk;
	uint32_t n;
	struct xs_node **nodes = xs_subtree(hub, xs_walk_node(walk, walk->n_levels), &n);

	xs_log_removed(hub, walk->path, walk->end[walk->n_levels], nodes[n - 1]);
	for (uint32_t i = 0; i < n; i++) {
		xs_charge_nodes(hub, xs_owner(nodes[i]->content->perms), -1);
		xs_node_unlink(hub, nodes[i]);
	}
	walk->node = xs_walk_node(walk, walk->n_levels - 1);
	walk->found = walk->at = walk->n_levels - 1;
	cut_from_parent(view);
	for (uint32_t i = 0; i < n; i++)
		xs_fire_removed(hub, nodes[i], i + 1 < n);
	for (uint32_t i = 0; i < n; i++)
		xs_node_free(hub, nodes[i]);
	free(nodes);
	return XS_OK;
}

/* A path below one that is to go. */
struct doomed {
	char *path;
	uint32_t n_path;
	uint32_t parent;        /* index of its access */
	uint32_t start;         /* of the name, in the path */
	uint64_t hash;          /* of the path, before mixing */
};

static struct doomed doomed_child(const struct doomed *above, uint32_t parent, const char *name, uint32_t n)
{
	struct doomed child = {
		.path = xs_alloc(above->n_path + n + 1), .n_path = above->n_path + n + 1, .parent = parent,
		.start = above->n_path + 1, .hash = xs_hash_bytes(xs_hash_bytes(above->hash, "/", 1), name, n),
	};

	memcpy(child.path, above->path, above->n_path);
	child.path[above->n_path] = '/';
	memcpy(child.path + child.start, name, n);
	return child;
}

static struct doomed doomed_top(const struct xs_view *view)
{
	const struct xs_walk *walk = view->walk;
	uint32_t n = walk->end[walk->n_levels];
	struct doomed top = { .path = xs_alloc(n), .n_path = n, .hash = xs_hash_bytes(view->hub->seed, walk->path, n) };

	memcpy(top.path, walk->path, n);
	return top;
}

/* Look at everything below a path in a transaction: indexes of accesses, parents before children. */
static int look_below(struct xs_view *view, uint32_t **found, uint32_t *n_found)
{
	struct xs_transaction *transaction = view->transaction;
	uint32_t room = 16, n_stack = 1, stack_room = 16;
	struct doomed *stack = xs_alloc(stack_room * sizeof *stack);
	int error = XS_OK;

	*found = xs_alloc(room * sizeof **found);
	*n_found = 0;
	stack[0] = doomed_top(view);
	while (n_stack) {
		struct doomed top = stack[--n_stack];
		struct xs_access *access = NULL;

		if (!error) {
			access = *n_found ? xs_transaction_look_below(transaction, top.parent, top.path, top.n_path,
								      top.start, xs_mix(top.hash))
					  : xs_transaction_look(transaction, view->walk, view->walk->n_levels);
			if (!access || !access->content)
				error = refused(view) ? refused(view) : XS_EIO;
		}
		if (error) {
			free(top.path);
			continue;
		}
		if (*n_found == room)
			*found = xs_resize(*found, (room *= 2) * sizeof **found);
		(*found)[(*n_found)++] = (uint32_t)(access - transaction->accesses);
		for (uint32_t at = 0; at < access->content->n_names;) {
			const char *name = access->content->names + at;
			uint32_t n_name = (uint32_t)strlen(name);

			if (n_stack == stack_room)
				stack = xs_resize(stack, (stack_room *= 2) * sizeof *stack);
			stack[n_stack++] = doomed_child(&top, (uint32_t)(access - transaction->accesses), name, n_name);
			at += n_name + 1;
		}
		free(top.path);
	}
	free(stack);
	return error;
}

static int cut_transaction(struct xs_view *view)
{
	struct xs_transaction *transaction = view->transaction;
	struct xs_walk *walk = view->walk;
	uint32_t level = walk->n_levels, n_name, n = 0, *found;
	const char *name = name_at(walk, level, &n_name);
	struct xs_content *parent = get(view, level - 1);
	int error;

	if (refused(view))
		return refused(view);
	/* A transaction that first saw these nodes at different times may find them at odds; it will not commit. */
	if (!parent)
		return XS_EINVAL;
	if (!xs_content_has_name(parent, name, n_name))
		return XS_EIO;
	error = look_below(view, &found, &n);
	for (uint32_t i = n; !error && i-- > 0;) {
		struct xs_access *access = &transaction->accesses[found[i]];

		xs_transaction_charge(transaction, xs_owner(access->content->perms), -1,
				      -(int64_t)(access->n_path + xs_content_bytes(access->content)));
		xs_content_drop(view->hub, access->content);
		access->content = NULL;
		access->modified = access->remade = 1;
		access->inner |= i != 0;
		access->exact = i != 0 && (access->exact || !access->event);
		access->event = 1;
	}
	if (!error)
		cut_from_parent(view);
	free(found);
	return error;
}

int xs_rm(struct xs_view *view, struct xs_domain *who, int *removed)
{
	struct xs_content *content;
	uint32_t level = view->walk->n_levels;
	int error = xs_lookup(view, who, XS_WRITE_ACCESS, &content);

	*removed = 0;
	if (error == XS_ENOENT)
		return get(view, level - 1) ? XS_OK : error;
	if (error)
		return error;
	if (!level)
		return XS_EINVAL;
	*removed = 1;
	return view->transaction ? cut_transaction(view) : cut_tree(view);
}

/* -- permissions */

int xs_set_perms(struct xs_view *view, struct xs_domain *who, const struct xs_perm *entries, uint32_t n)
{
	uint32_t level = view->walk->n_levels;
	struct xs_content *content, **slot;
	struct xs_perms *before, *perms;
	int64_t n_more, n_bytes;
	int error = xs_lookup(view, who, XS_WRITE_ACCESS | XS_OWNER_ACCESS, &content);

	if (error)
		return error;
	n_more = XS_PERMISSION_BYTES * ((int64_t)n - content->perms->n);
	if (!xs_privileged(who)) {
		if (xs_owner(content->perms) != entries[0].domid)
			return XS_EPERM;
		error = refused_growth(view, who, entries[0].domid, n_more, xs_content_bytes(content) + n_more);
		if (error)
			return error;
	}
	before = xs_perms_keep(content->perms);
	perms = xs_perms_intern(view->hub, entries, n);
	n_bytes = view->walk->end[level] + (int64_t)xs_content_bytes(content);
	charge(view, xs_owner(before), -1, -n_bytes);
	charge(view, xs_owner(perms), 1, n_bytes + n_more);
	slot = edit(view, level);
	xs_content_set_perms(view->hub, *slot, perms);
	edited(view, level);
	changed(view, 0, *slot, before);
	xs_perms_drop(view->hub, before);
	xs_perms_drop(view->hub, perms);
	return XS_OK;
}
