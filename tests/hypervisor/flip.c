/* SPDX-License-Identifier: MIT */
/* A peer that changes an entry before every compare-exchange. Prints for map, copy and revoke: status, tries. */
#include <stdio.h>
#include <string.h>

#include "flip_shim.h"
#include "pv_grant.h"

static int tries;
static struct pv_grant_entry entries[4];
static uint8_t data[4 * 4096];

/* Fails, with another frame in the entry each time. */
int flip(uint64_t *word, uint64_t *expected)
{
	tries++;
	*word ^= (uint64_t)1 << 32;
	*expected = *word;
	return 0;
}

/* The entry of the page that is being copied. */
void flip_one(const void *page)
{
	entries[((const uint8_t *)page - data) / 4096].frame ^= 1;
}

int main(void)
{
	static uint8_t local[16];
	struct pv_grant_private granted[4] = {{0}};
	struct pv_pin pins[4] = {{0}};
	struct pv_pinned pinned[4] = {{0}};
	struct pv_granter granter = {.entries = entries, .granted = granted, .base = 8, .n_pages = 4};
	struct pv_mapper mapper = {
		.entries = entries, .data = data, .pins = pins, .pinned = pinned, .base = 8, .n_pages = 4, .self = 9};
	struct pv_grant_copy_op op = {.gref = 8, .length = 16};
	uint64_t offset;
	int status;

	pv_grant_access(&granter, 8, 9, 8, 0);
	status = pv_grant_map(&mapper, 8, 0, &offset);
	printf("%d %d ", status, tries);
	tries = 0;
	pv_grant_copy(&mapper, &op, 1, local, sizeof local, 0);
	printf("%d %d ", op.status, tries);
	tries = 0;
	status = pv_grant_revoke(&granter, 8);
	printf("%d %d ", status, tries);
	printf("%d %u\n", pins[0].readers + pins[0].writers, mapper.pinned_pages);
	return 0;
}
