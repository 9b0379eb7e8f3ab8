/* SPDX-License-Identifier: MIT */
/*
 * Permissions: the first entry names the owner and what everybody else may do, the others name one domain each. Most
 * nodes have one of a few lists, so equal lists are one object.
 */
#include <stdio.h>

#include "xs_private.h"

static uint32_t hash_of(const struct pv_xs *hub, const struct xs_perm *entries, uint32_t n)
{
	return xs_mix(xs_hash_bytes(hub->seed, entries, n * (uint32_t)sizeof *entries));
}

static void grow(struct pv_xs *hub)
{
	uint32_t room = hub->perms_room ? hub->perms_room * 2 : 64;
	struct xs_perms **table = xs_alloc(room * sizeof *table);

	for (uint32_t i = 0; i < hub->perms_room; i++) {
		for (struct xs_perms *perms = hub->perms[i], *next; perms; perms = next) {
			next = perms->chain;
			perms->chain = table[perms->hash & (room - 1)];
			table[perms->hash & (room - 1)] = perms;
		}
	}
	free(hub->perms);
	hub->perms = table;
	hub->perms_room = room;
}

struct xs_perms *xs_perms_intern(struct pv_xs *hub, const struct xs_perm *entries, uint32_t n)
{
	uint32_t hash = hash_of(hub, entries, n);
	struct xs_perms *perms;

	if (hub->n_perms >= hub->perms_room)
		grow(hub);
	for (perms = hub->perms[hash & (hub->perms_room - 1)]; perms; perms = perms->chain) {
		if (perms->hash == hash && perms->n == n && !memcmp(perms->entries, entries, n * sizeof *entries))
			return xs_perms_keep(perms);
	}
	perms = xs_alloc(sizeof *perms + n * sizeof *entries);
	perms->refs = 1;
	perms->hash = hash;
	perms->n = n;
	memcpy(perms->entries, entries, n * sizeof *entries);
	perms->chain = hub->perms[hash & (hub->perms_room - 1)];
	hub->perms[hash & (hub->perms_room - 1)] = perms;
	hub->n_perms++;
	return perms;
}

struct xs_perms *xs_perms_keep(struct xs_perms *perms)
{
	perms->refs++;
	return perms;
}

void xs_perms_drop(struct pv_xs *hub, struct xs_perms *perms)
{
	struct xs_perms **at;

	if (--perms->refs)
		return;
	for (at = &hub->perms[perms->hash & (hub->perms_room - 1)]; *at != perms; at = &(*at)->chain)
		;
	*at = perms->chain;
	hub->n_perms--;
	free(perms);
}

static int access_of_letter(char letter)
{
	switch (letter) {
	case 'n': return 0;
	case 'r': return XS_READ_ACCESS;
	case 'w': return XS_WRITE_ACCESS;
	case 'b': return XS_READ_ACCESS | XS_WRITE_ACCESS;
	default: return -1;
	}
}

int xs_perms_parse(const char *text, uint32_t n_words, struct xs_perm *entries)
{
	for (uint32_t i = 0; i < n_words; i++, text += strlen(text) + 1) {
		int access = access_of_letter(text[0]);
		uint32_t domid = 0;
		uint32_t n = 1;

		for (; access >= 0 && text[n] >= '0' && text[n] <= '9' && n <= 5; n++)
			domid = domid * 10 + (uint32_t)(text[n] - '0');
		if (access < 0 || n == 1 || text[n] || domid > XS_DOMID_MAX)
			return XS_EINVAL;
		entries[i] = (struct xs_perm){ .domid = (uint16_t)domid, .access = (uint16_t)access };
	}
	return XS_OK;
}

uint32_t xs_perms_format(const struct xs_perms *perms, char *text)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < perms->n; i++)
		n += (uint32_t)sprintf(text + n, "%c%u", "nrwb"[perms->entries[i].access & 3], perms->entries[i].domid) + 1;
	return n;
}

int xs_access(const struct xs_domain *domain, const struct xs_perms *perms)
{
	uint32_t domid = domain->public.domid;
	uint32_t target = domain->public.has_target ? domain->public.target : domid;

	if (domid == 0)
		return XS_ALL_ACCESS;
	if (xs_owner(perms) == domid || xs_owner(perms) == target)
		return XS_ALL_ACCESS;
	for (uint32_t i = 1; i < perms->n; i++) {
		const struct xs_perm *entry = &perms->entries[i];

		if (entry->access & XS_IGNORED)
			continue;
		if (entry->domid == domid || entry->domid == target || entry->domid == XS_DOMID_ANY)
			return entry->access;
	}
	return perms->entries[0].access;
}

struct xs_perms *xs_perms_owned_by(struct pv_xs *hub, struct xs_perms *perms, uint32_t domid)
{
	struct xs_perm *entries;
	struct xs_perms *owned;

	if (xs_owner(perms) == domid)
		return xs_perms_keep(perms);
	entries = xs_alloc(perms->n * sizeof *entries);
	memcpy(entries, perms->entries, perms->n * sizeof *entries);
	entries[0].domid = (uint16_t)domid;
	owned = xs_perms_intern(hub, entries, perms->n);
	free(entries);
	return owned;
}

int xs_perms_name_dead(const struct xs_perms *perms, const uint8_t *dead)
{
	for (uint32_t i = 0; i < perms->n; i++) {
		if (xs_is_dead(dead, perms->entries[i].domid))
			return 1;
	}
	return 0;
}

struct xs_perms *xs_perms_without(struct pv_xs *hub, struct xs_perms *perms, const uint8_t *dead)
{
	struct xs_perm *entries = xs_alloc(perms->n * sizeof *entries);
	struct xs_perms *kept;
	uint32_t n = 1;

	entries[0] = perms->entries[0];
	if (xs_is_dead(dead, entries[0].domid))
		entries[0].domid = 0;
	for (uint32_t i = 1; i < perms->n; i++) {
		if (!xs_is_dead(dead, perms->entries[i].domid))
			entries[n++] = perms->entries[i];
	}
	kept = xs_perms_intern(hub, entries, n);
	free(entries);
	return kept;
}
