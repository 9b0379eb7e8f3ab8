/* SPDX-License-Identifier: MIT */
/*
 * A copy out of a granted page, and at one of its accesses to shared words, each in turn, something happens to the grant.
 * Prints for each thing that happens: at how many places it did, how many copies were okay, how many were not.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "interrupt_shim.h"
#include "pv_grant.h"

#define BASE 8
#define SELF 9
#define PAGES 2
#define PAGE 4096

static struct pv_grant_entry entries[PAGES];
static struct pv_grant_private granted[PAGES];
static struct pv_pin pins[PAGES];
static struct pv_pinned pinned[PAGES];
static uint8_t data[PAGES * PAGE], local[PAGE];
static struct pv_granter granter;
static struct pv_mapper mapper;
static void (*happens)(void);
static int place, wanted;
static int happened;            /* it did, and did something */

#define must(what) ((what) ? (void)0 : fail(#what, __LINE__))

static void fail(const char *what, int line)
{
	fprintf(stderr, "%s, line %d, at access %d\n", what, line, wanted);
	exit(1);
}

void interrupt(void)
{
	void (*now)(void) = happens;

	if (!now || place++ != wanted)
		return;
	happens = NULL;
	now();
}

static void grant(uint32_t frame, int read_only)
{
	must(pv_grant_access(&granter, BASE, SELF, frame, read_only) == 0);
}

/* Taken back, and used for something else. */
static void revoke(void)
{
	if (pv_grant_revoke(&granter, BASE))
		return;
	happened = 1;
	memset(data, 'x', PAGE);
}

static void replace(void)
{
	revoke();
	if (happened)
		grant(BASE + 1, 1);
}

static void grant_again(void)
{
	revoke();
	if (!happened)
		return;
	memset(data, 'c', PAGE);
	grant(BASE, 0);
}

static void map(void)
{
	uint64_t offset;

	if (mapper.lock)    /* held by who has been interrupted */
		return;
	must(pv_grant_map(&mapper, BASE, 0, &offset) == PV_GNTST_OKAY && offset == 0);
	happened = 1;
}

static int is_all(const uint8_t *bytes, size_t n, int value)
{
	for (size_t i = 0; i < n; i++)
		if (bytes[i] != value)
			return 0;
	return 1;
}

static void set_up(void)
{
	memset(entries, 0, sizeof entries);
	memset(granted, 0, sizeof granted);
	memset(pins, 0, sizeof pins);
	granter = (struct pv_granter){.entries = entries, .granted = granted, .base = BASE, .n_pages = PAGES};
	mapper = (struct pv_mapper){
		.entries = entries, .data = data, .pins = pins, .pinned = pinned, .base = BASE, .n_pages = PAGES, .self = SELF};
	memset(data, 'a', PAGE);
	memset(data + PAGE, 'b', PAGE);
	grant(BASE, 0);
	place = happened = 0;
}

/* The status of a copy of the page that is interrupted at access `wanted`; 1 if it had no such access. */
static int copy(void (*what)(void))
{
	struct pv_grant_copy_op op = {.gref = BASE, .length = PAGE};
	int missed;

	set_up();
	happens = what;
	pv_grant_copy(&mapper, &op, 1, local, sizeof local, 0);
	missed = happens == what;
	happens = NULL;
	must(mapper.lock == 0 && mapper.copies + mapper.failures == 1 && mapper.copies == (op.status == PV_GNTST_OKAY));
	must(mapper.copied_bytes == (op.status ? 0 : PAGE));
	return missed ? 1 : op.status;
}

static void try_each_place(const char *name, void (*what)(void), int (*is_good)(void))
{
	int okay = 0, failed = 0, did = 0, status;

	for (wanted = 0; (status = copy(what)) <= 0; wanted++) {
		did += happened;
		okay += status == PV_GNTST_OKAY;
		failed += status == PV_GNTST_GENERAL_ERROR;
		must(status == PV_GNTST_OKAY || status == PV_GNTST_GENERAL_ERROR);
		must(status == PV_GNTST_OKAY ? is_good() : happened);
		if (what == map && happened)
			must(pv_grant_unmap(&mapper, BASE, 0) == PV_GNTST_OKAY);
		must(mapper.pinned_pages == 0 && !pins[0].readers && !pins[0].writers);
		must(!(entries[0].flags & (PV_GTF_READING | PV_GTF_WRITING)));
	}
	printf("%s %d %d %d\n", name, did, okay, failed);
}

static int is_first(void)
{
	return is_all(local, PAGE, 'a');
}

static int is_first_or_second(void)
{
	return is_first() || is_all(local, PAGE, 'b');
}

/* What cannot be told from the first grant, but never what the page was used for between the two. */
static int is_of_either_grant(void)
{
	return (is_all(local, PAGE / 2, 'a') || is_all(local, PAGE / 2, 'c')) &&
	       (is_all(local + PAGE / 2, PAGE / 2, 'a') || is_all(local + PAGE / 2, PAGE / 2, 'c'));
}

int main(void)
{
	try_each_place("revoked", revoke, is_first);
	try_each_place("replaced", replace, is_first_or_second);
	try_each_place("granted-again", grant_again, is_of_either_grant);
	try_each_place("mapped", map, is_first);
	return 0;
}
