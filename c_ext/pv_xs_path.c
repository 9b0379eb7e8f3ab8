/* SPDX-License-Identifier: MIT */
/* Paths: their canonical form, their levels, and how far the tree has them. */
#include "xs_private.h"

/* Characters a name may have. */
static const uint8_t allowed[256] = {
	['-'] = 1, ['_'] = 1, ['@'] = 1, ['0' ... '9'] = 1, ['A' ... 'Z'] = 1, ['a' ... 'z'] = 1,
};

static uint64_t hash_byte(uint64_t hash, uint8_t byte)
{
	return (hash ^ byte) * 0x100000001B3u;
}

uint64_t xs_hash_bytes(uint64_t seed, const void *data, uint32_t n)
{
	const uint8_t *bytes = data;
	uint64_t hash = seed;

	for (uint32_t i = 0; i < n; i++)
		hash = hash_byte(hash, bytes[i]);
	return hash;
}

/*
 * Find the levels of an absolute path and the hash of each prefix. XS_EINVAL: a character that is not allowed, an empty
 * name, a slash at the end. The hash of a prefix is that of its bytes, so a child's follows from its parent's.
 */
static int measure(struct pv_xs *hub, struct xs_walk *walk, const char *path, uint32_t n)
{
	uint64_t hash = hub->seed;
	uint32_t levels = 0;

	walk->path = path;
	walk->end[0] = 1;
	walk->hash[0] = xs_mix(hub->seed);
	if (n == 1) {
		walk->n_levels = 0;
		return XS_OK;
	}
	for (uint32_t i = 0; i < n; i++) {
		uint8_t c = (uint8_t)path[i];

		if (c == '/') {
			if (i + 1 == n || path[i + 1] == '/')
				return XS_EINVAL;
			if (i) {
				walk->end[++levels] = (uint16_t)i;
				walk->hash[levels] = xs_mix(hash);
			}
		} else if (!allowed[c]) {
			return XS_EINVAL;
		}
		hash = hash_byte(hash, c);
	}
	walk->end[++levels] = (uint16_t)n;
	walk->hash[levels] = xs_mix(hash);
	walk->n_levels = levels;
	return XS_OK;
}

int xs_is_well_formed(struct pv_xs *hub, const char *path, uint32_t n)
{
	return measure(hub, &hub->walk, path, n) == XS_OK;
}

void xs_measure(struct pv_xs *hub, struct xs_walk *walk, const char *path, uint32_t n)
{
	(void)measure(hub, walk, path, n);
}

uint32_t xs_canonical(struct pv_xs *hub, const struct xs_domain *domain, const char *path, uint32_t n)
{
	uint32_t length = n;

	if (n && path[0] == '/') {
		if (n > XS_PATH_MAX)
			return 0;
		memcpy(hub->path, path, n);
	} else {
		if (n > XS_RELATIVE_PATH_MAX || (n && path[0] == '@'))
			return 0;
		length = domain->n_home + 1 + n;
		memcpy(hub->path, domain->home, domain->n_home);
		hub->path[domain->n_home] = '/';
		memcpy(hub->path + domain->n_home + 1, path, n);
	}
	hub->path[length] = 0;
	return measure(hub, &hub->walk, hub->path, length) == XS_OK ? length : 0;
}

uint32_t xs_quota_length(const char *path, uint32_t n)
{
	static const char prefix[] = "/local/domain/";
	uint32_t at = sizeof prefix - 1;
	uint32_t digits = 0;

	if (n <= at || memcmp(path, prefix, at))
		return n;
	while (at < n && digits < 5 && path[at] >= '0' && path[at] <= '9')
		at++, digits++;
	return digits && at < n && path[at] == '/' ? n - at - 1 : n;
}

void xs_walk(struct pv_xs *hub, struct xs_walk *walk)
{
	struct xs_node *node = hub->root;
	uint32_t level = 0;

	while (level < walk->n_levels) {
		uint32_t start = level ? walk->end[level] + 1u : 1u;
		struct xs_node *child = xs_find_child(hub, node, walk->path + start, walk->end[level + 1] - start,
						      walk->hash[level + 1]);

		if (!child)
			break;
		node = child;
		level++;
	}
	walk->node = node;
	walk->found = walk->at = level;
}
