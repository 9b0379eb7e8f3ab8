/* SPDX-License-Identifier: MIT */
/* Watches by path: who is to be told of a change. Events reach each connection in the order it set its watches. */
#include <stdio.h>

#include "xs_private.h"

static uint32_t hash_of(const struct pv_xs *hub, const char *path, uint32_t n)
{
	return n == 1 ? xs_mix(hub->seed) : xs_mix(xs_hash_bytes(hub->seed, path, n)); /* as measured paths have it */
}

static void grow(struct pv_xs *hub)
{
	uint32_t room = hub->places_room ? hub->places_room * 2 : 64;
	struct xs_place **table = xs_alloc(room * sizeof *table);

	for (uint32_t i = 0; i < hub->places_room; i++) {
		for (struct xs_place *place = hub->places[i], *next; place; place = next) {
			next = place->chain;
			place->chain = table[place->hash & (room - 1)];
			table[place->hash & (room - 1)] = place;
		}
	}
	free(hub->places);
	hub->places = table;
	hub->places_room = room;
}

static struct xs_place *find_place(const struct pv_xs *hub, const char *path, uint32_t n, uint32_t hash)
{
	struct xs_place *place = hub->places_room ? hub->places[hash & (hub->places_room - 1)] : NULL;

	while (place && !(place->hash == hash && place->n_path == n && !memcmp(place->path, path, n)))
		place = place->chain;
	return place;
}

static uint32_t count_levels(const char *path, uint32_t n)
{
	uint32_t levels = 0;

	for (uint32_t i = 0; n > 1 && i < n; i++)
		levels += path[i] == '/';
	return levels;
}

static struct xs_place *place_for(struct pv_xs *hub, const char *path, uint32_t n)
{
	uint32_t hash = hash_of(hub, path, n);
	struct xs_place *place = find_place(hub, path, n, hash);

	if (place)
		return place;
	if (hub->n_places >= hub->places_room)
		grow(hub);
	place = xs_alloc(sizeof *place + n);
	place->hash = hash;
	place->n_path = n;
	place->n_levels = count_levels(path, n);
	memcpy(place->path, path, n);
	place->chain = hub->places[hash & (hub->places_room - 1)];
	hub->places[hash & (hub->places_room - 1)] = place;
	hub->n_places++;
	hub->places_at[place->n_levels]++;
	return place;
}

static void free_place(struct pv_xs *hub, struct xs_place *place)
{
	struct xs_place **at = &hub->places[place->hash & (hub->places_room - 1)];

	while (*at != place)
		at = &(*at)->chain;
	*at = place->chain;
	hub->n_places--;
	hub->places_at[place->n_levels]--;
	free(place);
}

struct xs_watch *xs_watch_find(struct pv_xs_conn *connection, const char *path, uint32_t n, const char *token,
			       uint32_t n_token)
{
	struct pv_xs *hub = connection->hub;
	struct xs_place *place = find_place(hub, path, n, hash_of(hub, path, n));
	struct xs_watch *watch = place ? place->first : NULL;

	while (watch && !(watch->connection == connection && watch->n_token == n_token &&
			  !memcmp(watch->token, token, n_token)))
		watch = watch->next_of_place;
	return watch;
}

static int64_t bytes_of(const struct xs_watch *watch)
{
	return watch->n_token + (int64_t)watch->place->n_path;
}

struct xs_watch *xs_watch_add(struct pv_xs_conn *connection, const char *path, uint32_t n, const char *token,
			      uint32_t n_token, uint32_t n_prefix, int32_t depth)
{
	struct pv_xs *hub = connection->hub;
	struct xs_watch *watch = xs_alloc(sizeof *watch + n_token);
	struct xs_place *place = place_for(hub, path, n);

	watch->connection = connection;
	watch->place = place;
	watch->number = ++hub->watch_number;
	watch->depth = depth;
	watch->n_prefix = (uint16_t)n_prefix;
	watch->n_token = (uint16_t)n_token;
	memcpy(watch->token, token, n_token);
	if (place->last)
		place->last->next_of_place = watch;
	else
		place->first = watch;
	place->last = watch;
	watch->previous_of_connection = connection->last_watch;
	if (connection->last_watch)
		connection->last_watch->next_of_connection = watch;
	else
		connection->watches = watch;
	connection->last_watch = watch;
	hub->n_watches++;
	connection->domain->public.n_watches++;
	xs_account(hub, connection->domain, bytes_of(watch));
	return watch;
}

void xs_watch_remove(struct xs_watch *watch)
{
	struct pv_xs_conn *connection = watch->connection;
	struct pv_xs *hub = connection->hub;
	struct xs_place *place = watch->place;
	struct xs_watch *before = NULL;

	for (struct xs_watch *at = place->first; at != watch; at = at->next_of_place)
		before = at;
	if (before)
		before->next_of_place = watch->next_of_place;
	else
		place->first = watch->next_of_place;
	if (place->last == watch)
		place->last = before;
	if (watch->previous_of_connection)
		watch->previous_of_connection->next_of_connection = watch->next_of_connection;
	else
		connection->watches = watch->next_of_connection;
	if (watch->next_of_connection)
		watch->next_of_connection->previous_of_connection = watch->previous_of_connection;
	else
		connection->last_watch = watch->previous_of_connection;
	hub->n_watches--;
	connection->domain->public.n_watches--;
	xs_account(hub, connection->domain, -bytes_of(watch));
	if (!place->first)
		free_place(hub, place);
	free(watch);
}

/* -- events */

void xs_fire_watch(struct xs_watch *watch, const char *path, uint32_t n)
{
	xs_put_event(watch->connection, path + watch->n_prefix, n - watch->n_prefix, watch->token, watch->n_token);
}

static void match_all(struct pv_xs *hub, const struct xs_place *place, uint32_t level, uint32_t *n)
{
	for (struct xs_watch *watch = place->first; watch; watch = watch->next_of_place) {
		if (watch->depth >= 0 && level - place->n_levels > (uint32_t)watch->depth)
			continue;
		if (*n == hub->matches_room) {
			hub->matches_room = hub->matches_room ? hub->matches_room * 2 : 64;
			hub->matches = xs_resize(hub->matches, hub->matches_room * sizeof *hub->matches);
		}
		hub->matches[(*n)++] = watch;
	}
}

static int by_number(const void *left, const void *right)
{
	const struct xs_watch *a = *(struct xs_watch *const *)left, *b = *(struct xs_watch *const *)right;

	return a->number < b->number ? -1 : a->number > b->number;
}

/* The watches of a measured path, and unless `exact` of its ancestors, in the order they were set: how many. */
static uint32_t find_matches(struct pv_xs *hub, const struct xs_walk *walk, int exact)
{
	uint32_t n = 0, n_places = 0;

	for (uint32_t level = walk->n_levels + 1; level-- > 0;) {
		const struct xs_place *place = NULL;

		if (hub->places_at[level])
			place = find_place(hub, walk->path, walk->end[level], walk->hash[level]);
		if (place) {
			match_all(hub, place, walk->n_levels, &n);
			n_places++;
		}
		if (exact)
			break;
	}
	if (n_places > 1)
		qsort(hub->matches, n, sizeof *hub->matches, by_number);
	return n;
}

/* What a domain must be able to read to know of a change. Private to one call of `tell`. */
struct change {
	const struct xs_content *content;     /* what is or was there; NULL: look */
	const struct xs_content *parent;      /* the same of its parent */
	const struct xs_perms *before;        /* permissions before the change, or NULL */
};

static const struct xs_content *look(struct pv_xs *hub, struct xs_walk *walk, uint32_t level)
{
	struct xs_node *node;

	xs_walk(hub, walk);
	node = xs_walk_node(walk, level);
	return node ? node->content : NULL;
}

/* Whether a domain may know: the permissions there, before or now, or those of the parent let it read. */
static int may_know(struct pv_xs *hub, struct xs_walk *walk, const struct xs_domain *domain, const struct change *change)
{
	const struct xs_content *content = change->content, *parent = change->parent;

	if (xs_privileged(domain) && content)
		return 1;
	if (change->before && xs_access(domain, change->before) & XS_READ_ACCESS)
		return 1;
	if (!content)
		content = look(hub, walk, walk->n_levels);
	if (!content)
		return 0;
	if (xs_access(domain, content->perms) & XS_READ_ACCESS)
		return 1;
	if (!parent)
		parent = look(hub, walk, walk->n_levels ? walk->n_levels - 1 : 0);
	return parent && xs_access(domain, parent->perms) & XS_READ_ACCESS;
}

static void tell(struct pv_xs *hub, const char *path, uint32_t n, int exact, const struct change *change)
{
	struct xs_walk *walk = &hub->look;
	const struct xs_domain *asked = NULL;
	uint32_t n_matches;
	int allowed = 0;

	if (!hub->n_places)
		return;
	xs_measure(hub, walk, path, n);
	n_matches = find_matches(hub, walk, exact);
	for (uint32_t i = 0; i < n_matches; i++) {
		struct xs_watch *watch = hub->matches[i];

		if (watch->connection->domain != asked) {
			asked = watch->connection->domain;
			allowed = may_know(hub, walk, asked, change);
		}
		if (allowed)
			xs_fire_watch(watch, path, n);
	}
}

void xs_fire(struct pv_xs *hub, const char *path, uint32_t n, const struct xs_content *content, int exact,
	     const struct xs_perms *before)
{
	tell(hub, path, n, exact, &(struct change){ .content = content, .before = before });
}

int xs_is_watched(const struct pv_xs *hub, uint32_t hash)
{
	const struct xs_place *place = hub->places_room ? hub->places[hash & (hub->places_room - 1)] : NULL;

	while (place && place->hash != hash)
		place = place->chain;
	return place != NULL;
}

void xs_fire_removed(struct pv_xs *hub, const struct xs_node *node, int exact)
{
	char path[XS_PATH_MAX + 1];

	if (!exact || xs_is_watched(hub, node->hash))
		tell(hub, path, xs_path_of(node, path), exact,
		     &(struct change){ .content = node->content, .parent = node->parent->content });
}

void pv_xs_fire_special(struct pv_xs *hub, int name, uint32_t domid)
{
	static const char *const names[] = { "@introduceDomain", "@releaseDomain" };
	char deep[40];
	uint32_t n = (uint32_t)strlen(names[name]), n_deep = (uint32_t)sprintf(deep, "%s/%u", names[name], domid);
	struct xs_place *place = find_place(hub, names[name], n, hash_of(hub, names[name], n));
	struct xs_place *deep_place = find_place(hub, deep, n_deep, hash_of(hub, deep, n_deep));
	uint32_t n_matches = 0;

	/* Those of any domain, and those of this one alone. */
	if (place)
		match_all(hub, place, place->n_levels, &n_matches);
	if (deep_place)
		match_all(hub, deep_place, deep_place->n_levels, &n_matches);
	if (n_matches > 1)
		qsort(hub->matches, n_matches, sizeof *hub->matches, by_number);
	for (uint32_t i = 0; i < n_matches; i++) {
		struct xs_watch *watch = hub->matches[i];

		if (!(xs_access(watch->connection->domain, hub->special[name]) & XS_READ_ACCESS))
			continue;
		if (watch->depth >= 1 || watch->place == deep_place)
			xs_fire_watch(watch, deep, n_deep);
		else
			xs_fire_watch(watch, names[name], n);
	}
}
