/* SPDX-License-Identifier: MIT */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "switch_private.h"

#define FIRST_SLOTS 16
#define UNIT 1000000000ll       /* a frame, in a limit's level */

/* A number that has nothing to do with the one before (SplitMix64), and is odd: no address is lost in the product. */
static uint64_t next_seed(uint64_t *state)
{
	uint64_t mixed = *state += 0x9e3779b97f4a7c15;

	mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9;
	mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111eb;
	return (mixed ^ mixed >> 31) | 1;
}

int pv_switch_init(struct pv_switch *sw, uint32_t max_addresses, uint64_t seed)
{
	int status;

	*sw = (struct pv_switch){
		.mirror = PV_SWITCH_NO_PORT,
		.max_addresses = max_addresses ? max_addresses : PV_SWITCH_ADDRESSES,
	};
	if (max_addresses > PV_SWITCH_MOST_ADDRESSES)
		return -EINVAL;
	if (!seed && getrandom(&seed, sizeof(seed), 0) != sizeof(seed))
		return -errno;
	for (int i = 0; i < 2; i++)
		sw->seeds[i] = next_seed(&seed);
	pv_switch_set_ageing(sw, PV_SWITCH_AGEING_NS);
	status = switch_make_table(sw);
	if (status)
		pv_switch_destroy(sw);
	return status;
}

void pv_switch_destroy(struct pv_switch *sw)
{
	for (uint32_t i = 0; i < sw->n_slots; i++)
		free(sw->ports[i]);
	free(sw->ports);
	free(sw->keys);
	free(sw->addresses);
	*sw = (struct pv_switch){.mirror = PV_SWITCH_NO_PORT};
}

/* Ports. */

/* Twice as many, or the first. */
static int grow(struct pv_switch *sw)
{
	uint32_t n = sw->n_slots ? 2 * sw->n_slots : FIRST_SLOTS;
	struct switch_port **ports;

	if (sw->n_slots == PV_SWITCH_PORTS)
		return -ENOSPC;
	ports = realloc(sw->ports, n * sizeof(*ports));
	if (!ports)
		return -ENOMEM;
	memset(ports + sw->n_slots, 0, (n - sw->n_slots) * sizeof(*ports));
	sw->ports = ports;
	sw->n_slots = n;
	return 0;
}

int pv_switch_add_port(struct pv_switch *sw)
{
	struct switch_port *port;
	uint32_t number = 0;
	int status = sw->n_ports == sw->n_slots ? grow(sw) : 0;

	if (status)
		return status;
	port = calloc(1, sizeof(*port));
	if (!port)
		return -ENOMEM;
	while (sw->ports[number])
		number++;
	port->number = number;
	port->list = (struct pv_switch_list){.oldest = SWITCH_NONE, .newest = SWITCH_NONE};
	sw->ports[number] = port;
	sw->n_ports++;
	pv_switch_set_trunk(sw, number, NULL, 0);
	return (int)number;
}

int pv_switch_remove_port(struct pv_switch *sw, uint32_t port)
{
	if (pv_switch_forget(sw, port))
		return -ENOENT;
	sw->last.to = NULL;
	if (sw->mirror == (int32_t)port)
		sw->mirror = PV_SWITCH_NO_PORT;
	free(sw->ports[port]);
	sw->ports[port] = NULL;
	sw->n_ports--;
	return 0;
}

int pv_switch_set_access(struct pv_switch *sw, uint32_t port, uint32_t vid)
{
	struct switch_port *which = switch_port(sw, port);

	if (!which)
		return -ENOENT;
	if (vid > PV_SWITCH_MOST_VID)
		return -EINVAL;
	sw->last.to = NULL;
	switch_trim(sw, which, 0);
	which->is_trunk = 0;
	which->vid = (int32_t)vid;
	return 0;
}

int pv_switch_set_trunk(struct pv_switch *sw, uint32_t port, const uint8_t *vids, int32_t native)
{
	struct switch_port *which = switch_port(sw, port);

	if (!which)
		return -ENOENT;
	if (native < PV_SWITCH_NO_VID || native > PV_SWITCH_MOST_VID)
		return -EINVAL;
	sw->last.to = NULL;
	switch_trim(sw, which, 0);
	which->is_trunk = 1;
	which->vid = native;
	if (vids)
		memcpy(which->vids, vids, sizeof(which->vids));
	else
		memset(which->vids, 0xff, sizeof(which->vids));
	/* VLAN 0 has no tag, and 4095 does not exist. */
	which->vids[0] &= 0xfe;
	which->vids[PV_SWITCH_MAP_BYTES - 1] &= 0x7f;
	return 0;
}

int pv_switch_set_limit(struct pv_switch *sw, uint32_t port, uint32_t kind, uint32_t frames, uint32_t burst)
{
	struct switch_port *which = switch_port(sw, port);
	int64_t most;

	if (!which)
		return -ENOENT;
	if (kind >= PV_SWITCH_LIMITS)
		return -EINVAL;
	most = UNIT * (burst ? burst : frames >= 10 ? frames / 10 : 1);
	which->limits[kind] = (struct switch_limit){.rate = frames, .level = most, .most = most};
	return 0;
}

int pv_switch_set_locking(struct pv_switch *sw, uint32_t port, const struct pv_switch_locking *locking)
{
	struct switch_port *which = switch_port(sw, port);

	if (!which)
		return -ENOENT;
	if (locking->mode > PV_SWITCH_DISABLED)
		return -EINVAL;
	if (locking->mode == PV_SWITCH_LOCKED &&
	    (locking->n_ipv4 > PV_SWITCH_LOCKED_ADDRESSES || locking->n_ipv6 > PV_SWITCH_LOCKED_ADDRESSES ||
	     !switch_is_station(switch_mac(locking->mac))))
		return -EINVAL;
	sw->last.to = NULL;
	which->locking = *locking;
	if (locking->mode != PV_SWITCH_UNLOCKED)
		switch_trim(sw, which, 0);
	return 0;
}

int pv_switch_set_address_limit(struct pv_switch *sw, uint32_t port, uint32_t most)
{
	struct switch_port *which = switch_port(sw, port);

	if (!which)
		return -ENOENT;
	which->max_addresses = most;
	if (most)
		switch_trim(sw, which, most);
	return 0;
}

/* Groups. */

int pv_switch_set_multicast_filter(struct pv_switch *sw, uint32_t port, int on)
{
	struct switch_port *which = switch_port(sw, port);

	if (!which)
		return -ENOENT;
	which->is_filtered = on != 0;
	return 0;
}

static uint32_t place_of(const struct switch_port *port, uint64_t group)
{
	uint32_t i = 0;

	while (i < port->n_groups && port->groups[i] != group)
		i++;
	return i;
}

int pv_switch_mcast_add(struct pv_switch *sw, uint32_t port, const uint8_t *mac)
{
	struct switch_port *which = switch_port(sw, port);
	uint64_t group = switch_mac(mac);
	uint32_t place;

	if (!which)
		return -ENOENT;
	if (!SWITCH_IS_GROUP(group) || group == SWITCH_BROADCAST)
		return -EINVAL;
	place = place_of(which, group);
	if (place == PV_SWITCH_GROUPS)
		return -ENOSPC;
	which->groups[place] = group;
	which->n_groups += place == which->n_groups;
	return 0;
}

int pv_switch_mcast_del(struct pv_switch *sw, uint32_t port, const uint8_t *mac)
{
	struct switch_port *which = switch_port(sw, port);
	uint32_t place;

	if (!which)
		return -ENOENT;
	place = place_of(which, switch_mac(mac));
	if (place == which->n_groups)
		return -ENOENT;
	which->groups[place] = which->groups[--which->n_groups];
	return 0;
}

/* The mirror. */

int pv_switch_set_mirror(struct pv_switch *sw, int32_t port)
{
	if (port != PV_SWITCH_NO_PORT && pv_switch_forget(sw, (uint32_t)port))
		return -ENOENT;
	sw->last.to = NULL;
	sw->mirror = port;
	return 0;
}

int pv_switch_set_mirrored(struct pv_switch *sw, uint32_t port, int on)
{
	struct switch_port *which = switch_port(sw, port);

	if (!which)
		return -ENOENT;
	which->is_mirrored = on != 0;
	return 0;
}

/* What it can tell. */

int pv_switch_statistics(const struct pv_switch *sw, uint32_t port, struct pv_switch_statistics *statistics)
{
	const struct switch_port *which = switch_port(sw, port);

	if (!which)
		return -ENOENT;
	*statistics = which->statistics;
	statistics->addresses = which->n_addresses;
	return 0;
}

const char *pv_switch_drop_name(uint32_t reason)
{
	static const char *const names[PV_SWITCH_DROPS] = {
		"none", "no_port", "bad_frame", "vlan", "spoof", "limit", "same_port", "blocked", "table", "disabled", "mirror",
	};

	return reason < PV_SWITCH_DROPS ? names[reason] : "?";
}
