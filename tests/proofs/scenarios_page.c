/* SPDX-License-Identifier: MIT */
/* What the explorer runs of the other shared pages: streams, flex rings, grants. */
#include <string.h>

#include "scenarios.h"
#include "pv_flex.h"
#include "pv_grant.h"
#include "pv_stream.h"

/* -- a stream of four bytes */

static uint8_t page[64] __attribute__((aligned(8)));
static struct pv_stream writer, reader;

static void set_up_stream(void)
{
	const struct pv_stream_layout out = { .out = 0, .out_size = 2, .in = 8, .in_size = 2,
					      .out_cons = 16, .out_prod = 20, .in_cons = 24, .in_prod = 28 };
	const struct pv_stream_layout in = { .out = 8, .out_size = 2, .in = 0, .in_size = 2,
					     .out_cons = 28 - 4, .out_prod = 28, .in_cons = 16, .in_prod = 20 };

	memset(page, 0, sizeof page);
	must(pv_stream_attach(&writer, page, sizeof page, &out, NULL) == 0);
	must(pv_stream_attach(&reader, page, sizeof page, &in, NULL) == 0);
}

static void writes_bytes(void)
{
	static const uint8_t text[5] = "abcde";

	for (uint32_t done = 0; done < sizeof text;) {
		int64_t n = pv_stream_write(&writer, text + done, (uint32_t)sizeof text - done);

		must(n >= 0);
		done += (uint32_t)n;
		if (n == 0)
			await_change();
	}
}

static void reads_bytes(void)
{
	uint8_t text[5];

	for (uint32_t done = 0; done < sizeof text;) {
		int64_t n = pv_stream_read(&reader, text + done, (uint32_t)sizeof text - done);

		must(n >= 0);
		for (; n > 0; n--, done++)
			must(text[done] == "abcde"[done]);
		if (done < sizeof text)
			await_change();
	}
}

/* -- a flex ring whose back end says "no more" behind its last bytes */

static struct pv_flex flex_front, flex_back;
static struct pv_flex_indexes flex_page;
static uint8_t flex_data[PV_PAGE_BYTES];

static void set_up_flex(void)
{
	uint32_t refs[1] = { 9 };

	must(pv_flex_create(&flex_front, &flex_page, flex_data, 0, refs, NULL, START) == 0);
	must(pv_flex_look(&flex_page, 0, refs) == 0 && refs[0] == 9);
	must(pv_flex_attach(&flex_back, &flex_page, flex_data, 0, NULL) == 0);
}

static void says_no_more(void)
{
	must(pv_flex_write(&flex_back, (const uint8_t *)"abcd", 4) == 4);
	must(pv_flex_set_error(&flex_back, 1, -5) == 0);
	must(pv_flex_set_error(&flex_back, 0, -5) == 0);
}

static void reads_to_the_end(void)
{
	uint8_t text[4];

	while (!pv_flex_error(&flex_front, 1) && !pv_flex_error(&flex_front, 0))
		await_change();
	must(pv_flex_read(&flex_front, text, 4) == 4 && text[3] == 'd');
}

/* -- a page that is granted, mapped, written, unmapped, revoked and used for something else */

#define BASE 8
static struct pv_grant_entry entries[1];
static struct pv_grant_private granted[1];
static struct pv_pin pins[1];
static struct pv_pinned pinned[1];
static struct pv_granter granter;
static struct pv_mapper mapper;
static uint64_t data;

static void set_up_grant(void)
{
	memset(entries, 0, sizeof entries);
	memset(granted, 0, sizeof granted);
	memset(pins, 0, sizeof pins);
	granter = (struct pv_granter){ .entries = entries, .granted = granted, .base = BASE, .n_pages = 1 };
	mapper = (struct pv_mapper){ .entries = entries, .pins = pins, .pinned = pinned, .base = BASE, .n_pages = 1, .self = 3 };
	data = 0;
}

static void grants(void)
{
	data = 1;
	must(pv_grant_access(&granter, BASE, 3, BASE, 0) == 0);
	/* Not before somebody has mapped it, else nothing would be tried. */
	await_signal(0);
	while (pv_grant_revoke(&granter, BASE))
		await_change();
	must(data == 2);
	data = 3;
}

static void maps(void)
{
	uint64_t offset;

	while (pv_grant_map(&mapper, BASE, 0, &offset))
		await_change();
	raise_signal(0);
	must(data == 1);
	data = 2;
	must(pv_grant_unmap(&mapper, BASE, 0) == PV_GNTST_OKAY);
}

/* Two threads of the mapping process: their pins are counted under its lock. */
static void maps_to_read(void)
{
	uint64_t offset;

	if (pv_grant_map(&mapper, BASE, 1, &offset) == PV_GNTST_OKAY) {
		must(data == 1);
		must(pv_grant_unmap(&mapper, BASE, 1) == PV_GNTST_OKAY);
	}
}

static void grants_only(void)
{
	data = 1;
	must(pv_grant_access(&granter, BASE, 3, BASE, 0) == 0);
}

static int nothing_pinned(void)
{
	return mapper.pinned_pages == 0 && !(entries[0].flags & (PV_GTF_READING | PV_GTF_WRITING));
}

/* Copies out of a page, without a pin, beside its granter, which takes it back when it likes. */
static uint64_t words[2];

static void set_up_copy(void)
{
	set_up_grant();
	memset(words, 0, sizeof words);
	mapper.data = (uint8_t *)words;
}

static void put(uint64_t value)
{
	for (int i = 0; i < 2; i++)
		write_word(&words[i], value);
}

static void grants_and_reuses(void)
{
	put(1);
	must(pv_grant_access(&granter, BASE, 3, BASE, 0) == 0);
	raise_signal(0);
	while (pv_grant_revoke(&granter, BASE))
		await_change();
	put(2);
}

/* The same reference in the same way: who copies cannot tell the two grants from each other, but from what comes after. */
static void grants_twice_and_reuses(void)
{
	grants_and_reuses();
	must(pv_grant_access(&granter, BASE, 3, BASE, 0) == 0);
	while (pv_grant_revoke(&granter, BASE))
		await_change();
	put(3);
}

static int copy_out(uint64_t *copied)
{
	struct pv_grant_copy_op op = { .gref = BASE, .length = sizeof words };

	await_signal(0);
	pv_grant_copy(&mapper, &op, 1, (uint8_t *)copied, sizeof words, 0);
	return op.status == PV_GNTST_OKAY;
}

static void maps_and_unmaps(void)
{
	uint64_t offset;

	if (pv_grant_map(&mapper, BASE, 1, &offset) == PV_GNTST_OKAY)
		must(pv_grant_unmap(&mapper, BASE, 1) == PV_GNTST_OKAY);
}

static void copies_one(void)
{
	uint64_t copied[2];

	if (copy_out(copied))
		must(copied[0] == 1 && copied[1] == 1);
}

static void copies_one_or_two(void)
{
	uint64_t copied[2];

	if (copy_out(copied))
		for (int i = 0; i < 2; i++)
			must(copied[i] == 1 || copied[i] == 2);
}

/* Copies into a page: what its owner has taken back is not written to any more. */
static void grants_and_looks(void)
{
	put(1);
	must(pv_grant_access(&granter, BASE, 3, BASE, 0) == 0);
	raise_signal(0);
	while (pv_grant_revoke(&granter, BASE))
		await_change();
	for (int i = 0; i < 2; i++) {
		uint64_t found = words[i];

		must(found == words[0] && (found == 1 || found == 2));
	}
	put(3);
}

static void copies_into(void)
{
	struct pv_grant_copy_op op = { .gref = BASE, .length = sizeof words };
	uint64_t twos[] = { 2, 2 };

	await_signal(0);
	pv_grant_copy(&mapper, &op, 1, (uint8_t *)twos, sizeof twos, 1);
}

/* A process that dies with a page mapped: the broker gives the page back, but not what another process has mapped. */
static struct pv_pin other_pins[1];
static struct pv_pinned other_pinned[1];
static struct pv_mapper other;

static void set_up_death(void)
{
	set_up_grant();
	memset(other_pins, 0, sizeof other_pins);
	other = mapper;
	other.pins = other_pins;
	other.pinned = other_pinned;
	must(pv_grant_access(&granter, BASE, 3, BASE, 0) == 0);
}

static void maps_and_dies(void)
{
	uint64_t offset;

	if (pv_grant_map(&mapper, BASE, 0, &offset) == PV_GNTST_OKAY)
		data = 2;
	end_process(0);
}

static void is_broker(void)
{
	struct pv_pin *others[] = { other_pins };

	await_signal(0);
	pv_grant_release(entries, 1, pins, others, 1);
}

static void revokes(void)
{
	while (pv_grant_revoke(&granter, BASE))
		await_change();
	data = 3;
}

static void other_maps(void)
{
	uint64_t offset;

	must(pv_grant_map(&other, BASE, 0, &offset) == PV_GNTST_OKAY);
}

static int other_still_maps(void)
{
	return (entries[0].flags & (PV_GTF_READING | PV_GTF_WRITING)) == (PV_GTF_READING | PV_GTF_WRITING);
}

const struct scenario page_scenarios[] = {
	{"stream", set_up_stream, {writes_bytes, reads_bytes}, NULL, 0},
	{"flex ring", set_up_flex, {says_no_more, reads_to_the_end}, NULL, 0},
	{"grant and revoke", set_up_grant, {grants, maps}, NULL, 0},
	{"two threads that map", set_up_grant, {grants_only, maps_to_read, maps_to_read}, nothing_pinned, 0},
	{"copy and revoke", set_up_copy, {grants_and_reuses, copies_one}, nothing_pinned, 0},
	{"copy, revoke, grant again", set_up_copy, {grants_twice_and_reuses, copies_one_or_two}, nothing_pinned, 0},
	{"copy beside a mapping thread", set_up_copy, {grants_and_reuses, copies_one, maps_and_unmaps}, nothing_pinned, 1},
	{"copy into and revoke", set_up_copy, {grants_and_looks, copies_into}, nothing_pinned, 0},
	{"copy into beside a mapping thread", set_up_copy, {grants_and_looks, copies_into, maps_and_unmaps}, nothing_pinned, 1},
	{"dead mapper", set_up_death, {maps_and_dies, is_broker, revokes}, NULL, 0},
	{"dead mapper beside a live one", set_up_death, {maps_and_dies, is_broker, other_maps}, other_still_maps, 0},
	{0},
};
