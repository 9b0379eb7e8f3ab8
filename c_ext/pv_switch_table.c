/* SPDX-License-Identifier: MIT */
/*
 * The table of addresses: buckets of eight keys, a cache line each. A key may stand in two of them, and goes where there
 * is more room: at twice as many places as addresses both are practically never full. Nothing moves, so an address is
 * known by its place in the two lists it is in, of all and of its port, which are sorted by when it was heard.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "switch_private.h"

#define BUCKET 8
#define LEAST_BITS 3            /* 64 places: with fewer, two buckets too often are one */
#define MARK ((uint64_t)1 << 63)  /* tells the key of address 0 in VLAN 0 from a free place */
#define NEW_ENDS ((struct pv_switch_list){.oldest = SWITCH_NONE, .newest = SWITCH_NONE})

int switch_make_table(struct pv_switch *sw)
{
	size_t places;

	sw->bucket_bits = LEAST_BITS;
	while ((uint32_t)BUCKET << sw->bucket_bits < 2 * sw->max_addresses)
		sw->bucket_bits++;
	places = (size_t)BUCKET << sw->bucket_bits;
	sw->list = NEW_ENDS;
	sw->keys = aligned_alloc(BUCKET * sizeof(*sw->keys), places * sizeof(*sw->keys));
	sw->addresses = calloc(places, sizeof(*sw->addresses));
	if (!sw->keys || !sw->addresses)
		return -ENOMEM;
	memset(sw->keys, 0, places * sizeof(*sw->keys));
	return 0;
}

static uint64_t key_of(uint64_t mac, uint32_t vid)
{
	return MARK | (uint64_t)vid << 48 | mac;
}

/* The first places of the two buckets of a key, by multiplications that nobody knows who chooses addresses. */
static void buckets_of(const struct pv_switch *sw, uint64_t key, uint32_t *first, uint32_t *second)
{
	uint64_t mixed = key * sw->seeds[0];
	uint32_t bits = sw->bucket_bits;

	mixed ^= mixed >> 32;
	mixed *= sw->seeds[1];
	*first = (uint32_t)(mixed >> (64 - bits)) * BUCKET;
	*second = (uint32_t)(mixed << bits >> (64 - bits)) * BUCKET;
}

static uint32_t find(const struct pv_switch *sw, uint64_t key)
{
	uint32_t first, second;

	buckets_of(sw, key, &first, &second);
	for (uint32_t i = 0; i < BUCKET; i++)
		if (sw->keys[first + i] == key)
			return first + i;
	for (uint32_t i = 0; i < BUCKET; i++)
		if (sw->keys[second + i] == key)
			return second + i;
	return SWITCH_NONE;
}

static int is_old(const struct pv_switch *sw, uint32_t place, int64_t now_ns)
{
	return sw->ageing_ns && now_ns - sw->addresses[place].seen_ns >= sw->ageing_ns;
}

/* Lists. */

static void append(struct pv_switch *sw, struct pv_switch_list *list, uint32_t which, uint32_t place)
{
	struct switch_address *all = sw->addresses;

	all[place].links[which].older = list->newest;
	all[place].links[which].newer = SWITCH_NONE;
	if (list->newest == SWITCH_NONE)
		list->oldest = place;
	else
		all[list->newest].links[which].newer = place;
	list->newest = place;
}

static void take_out(struct pv_switch *sw, struct pv_switch_list *list, uint32_t which, uint32_t place)
{
	struct switch_address *all = sw->addresses;
	uint32_t older = all[place].links[which].older, newer = all[place].links[which].newer;

	if (older == SWITCH_NONE)
		list->oldest = newer;
	else
		all[older].links[which].newer = newer;
	if (newer == SWITCH_NONE)
		list->newest = older;
	else
		all[newer].links[which].older = older;
}

static void enter(struct pv_switch *sw, struct switch_port *port, uint32_t place, int64_t now_ns)
{
	sw->last.to = NULL;
	sw->addresses[place].port = port->number;
	sw->addresses[place].seen_ns = now_ns;
	append(sw, &sw->list, SWITCH_OF_ALL, place);
	append(sw, &port->list, SWITCH_OF_PORT, place);
	port->n_addresses++;
}

static void leave(struct pv_switch *sw, uint32_t place)
{
	struct switch_port *port = sw->ports[sw->addresses[place].port];

	take_out(sw, &sw->list, SWITCH_OF_ALL, place);
	take_out(sw, &port->list, SWITCH_OF_PORT, place);
	port->n_addresses--;
}

static void forget(struct pv_switch *sw, uint32_t place)
{
	leave(sw, place);
	sw->last.to = NULL;
	sw->keys[place] = 0;
	sw->n_addresses--;
}

void switch_trim(struct pv_switch *sw, struct switch_port *port, uint32_t most)
{
	while (port->n_addresses > most)
		forget(sw, port->list.oldest);
}

/* Learning. */

/* Whether the port may have one more. */
static int has_room(struct pv_switch *sw, struct switch_port *port, int64_t now_ns)
{
	if (!port->max_addresses)
		return 1;
	while (port->n_addresses >= port->max_addresses && is_old(sw, port->list.oldest, now_ns))
		forget(sw, port->list.oldest);
	return port->n_addresses < port->max_addresses;
}

static uint32_t n_free(const uint64_t *bucket)
{
	uint32_t n = 0;

	for (uint32_t i = 0; i < BUCKET; i++)
		n += bucket[i] == 0;
	return n;
}

static uint32_t oldest_of(const struct pv_switch *sw, uint32_t first, uint32_t second)
{
	uint32_t oldest = first;

	for (uint32_t i = 0; i < 2 * BUCKET; i++) {
		uint32_t place = i < BUCKET ? first + i : second + i - BUCKET;

		if (sw->addresses[place].seen_ns < sw->addresses[oldest].seen_ns)
			oldest = place;
	}
	return oldest;
}

/* A free place for a key. When there are as many addresses as there may be, or both buckets are full, the oldest goes. */
static uint32_t free_place(struct pv_switch *sw, uint64_t key)
{
	uint32_t first, second, bucket, place;

	if (sw->n_addresses == sw->max_addresses) {
		forget(sw, sw->list.oldest);
		sw->evicted++;
	}
	buckets_of(sw, key, &first, &second);
	bucket = n_free(sw->keys + first) >= n_free(sw->keys + second) ? first : second;
	for (uint32_t i = 0; i < BUCKET; i++)
		if (!sw->keys[bucket + i])
			return bucket + i;
	place = oldest_of(sw, first, second);
	forget(sw, place);
	sw->evicted++;
	return place;
}

int switch_learn(struct pv_switch *sw, struct switch_port *port, uint64_t mac, uint32_t vid, int64_t now_ns)
{
	uint64_t key = key_of(mac, vid);
	uint32_t place = find(sw, key);

	if (place != SWITCH_NONE && sw->addresses[place].port == port->number) {
		/* Not at each frame: it takes four more cache lines. */
		if (now_ns - sw->addresses[place].seen_ns >= sw->refresh_ns) {
			leave(sw, place);
			enter(sw, port, place, now_ns);
		}
		return 1;
	}
	if (!has_room(sw, port, now_ns))
		return 0;
	if (place == SWITCH_NONE) {
		place = free_place(sw, key);
		sw->keys[place] = key;
		sw->n_addresses++;
	} else {
		port->statistics.moved += !is_old(sw, place, now_ns);
		leave(sw, place);
	}
	enter(sw, port, place, now_ns);
	return 1;
}

struct switch_port *switch_look_up(const struct pv_switch *sw, uint64_t mac, uint32_t vid, int64_t now_ns)
{
	uint32_t place = find(sw, key_of(mac, vid));

	return place == SWITCH_NONE || is_old(sw, place, now_ns) ? NULL : sw->ports[sw->addresses[place].port];
}

/* Calls of the owner. */

int pv_switch_set_ageing(struct pv_switch *sw, int64_t ageing_ns)
{
	if (ageing_ns < 0)
		return -EINVAL;
	sw->last.to = NULL;
	sw->ageing_ns = ageing_ns;
	sw->refresh_ns = (ageing_ns ? ageing_ns : PV_SWITCH_AGEING_NS) / 256;
	return 0;
}

uint32_t pv_switch_age(struct pv_switch *sw, int64_t now_ns)
{
	uint32_t n = 0;

	for (; sw->list.oldest != SWITCH_NONE && is_old(sw, sw->list.oldest, now_ns); n++)
		forget(sw, sw->list.oldest);
	return n;
}

int pv_switch_forget(struct pv_switch *sw, uint32_t port)
{
	struct switch_port *which = switch_port(sw, port);

	if (!which)
		return -ENOENT;
	switch_trim(sw, which, 0);
	return 0;
}

int pv_switch_find(const struct pv_switch *sw, const uint8_t *mac, uint32_t vid, int64_t now_ns)
{
	struct switch_port *port = vid > PV_SWITCH_MOST_VID ? NULL : switch_look_up(sw, switch_mac(mac), vid, now_ns);

	return port ? (int)port->number : -ENOENT;
}

uint32_t pv_switch_list(const struct pv_switch *sw, struct pv_switch_address *addresses, uint32_t most, int64_t now_ns)
{
	uint32_t n = 0;

	for (uint32_t at = sw->list.oldest; at != SWITCH_NONE && n < most; at = sw->addresses[at].links[SWITCH_OF_ALL].newer) {
		struct pv_switch_address *address = &addresses[n];

		if (is_old(sw, at, now_ns))
			continue;
		*address = (struct pv_switch_address){
			.seen_ns = sw->addresses[at].seen_ns,
			.port = sw->addresses[at].port,
			.vid = (uint16_t)(sw->keys[at] >> 48 & 0xfff),
		};
		for (int i = 0; i < 6; i++)
			address->mac[i] = (uint8_t)(sw->keys[at] >> (40 - 8 * i));
		n++;
	}
	return n;
}
