/* SPDX-License-Identifier: MIT */
/*
 * What a locked port may send. The rules are those that XenServer's setup-vif-rules gives to Open vSwitch: frames of the
 * port's MAC that are ARP, IPv4 or IPv6 of its own addresses, what a DHCP client asks, and nothing that routers say.
 */
#include <string.h>

#include "switch_private.h"

#define ARP 0x0806
#define IPV4 0x0800
#define IPV6 0x86dd

#define UDP 17
#define DHCP_SERVER 67

#define HOP_BY_HOP 0
#define ROUTING 43
#define FRAGMENT 44
#define ICMPV6 58
#define DESTINATION_OPTIONS 60
#define MOST_EXTENSIONS 8

#define ROUTER_SOLICITATION 133
#define NEIGHBOUR_ADVERTISEMENT 136
#define REDIRECT 137

/* What stands behind the Ethernet header. */
struct packet {
	const uint8_t *bytes;
	uint32_t n;
};

/* Whether the first n bytes of an address of `width` are those of one in the list. */
static int is_listed(const uint8_t *list, uint32_t n_list, uint32_t width, const uint8_t *address, uint32_t n)
{
	for (uint32_t i = 0; i < n_list; i++)
		if (memcmp(list + (size_t)i * width, address, n) == 0)
			return 1;
	return 0;
}

static int is_own_ipv4(const struct pv_switch_locking *locking, const uint8_t *address)
{
	return is_listed(&locking->ipv4[0][0], locking->n_ipv4, 4, address, 4);
}

static int is_unspecified(const uint8_t *address)
{
	return !(address[0] | address[1] | address[2] | address[3]);
}

static int may_arp(const struct pv_switch_locking *locking, struct packet packet)
{
	static const uint8_t ethernet_and_ipv4[6] = { 0, 1, IPV4 >> 8, IPV4 & 0xff, 6, 4 };
	const uint8_t *sender;

	if (packet.n < 18 || memcmp(packet.bytes, ethernet_and_ipv4, sizeof(ethernet_and_ipv4)) != 0)
		return 0;
	sender = packet.bytes + 14;
	return memcmp(packet.bytes + 8, locking->mac, 6) == 0 && (is_unspecified(sender) || is_own_ipv4(locking, sender));
}

/* UDP to a DHCP server, the start of it. */
static int is_dhcp_request(struct packet packet)
{
	uint32_t header_bytes = (packet.bytes[0] & 15) * 4u, fragment = switch_be16(packet.bytes + 6) & 0x1fff;

	return packet.bytes[9] == UDP && fragment == 0 && packet.n >= header_bytes + 4 &&
	       switch_be16(packet.bytes + header_bytes + 2) == DHCP_SERVER;
}

static int may_ipv4(const struct pv_switch_locking *locking, struct packet packet)
{
	const uint8_t *source;

	if (packet.n < 20 || packet.bytes[0] >> 4 != 4 || (packet.bytes[0] & 15) < 5)
		return 0;
	source = packet.bytes + 12;
	return is_own_ipv4(locking, source) || (is_unspecified(source) && is_dhcp_request(packet));
}

static int may_icmpv6(const struct pv_switch_locking *locking, const uint8_t *message, uint32_t n, int is_fragment)
{
	uint32_t type = message[0], n_target = n < 8 ? 0 : n - 8 < 16 ? n - 8 : 16;

	switch (type) {
	case 134: /* router advertisement */
	case REDIRECT:
	case 146: /* mobile prefix solicitation and advertisement */
	case 147:
	case 151: /* multicast router advertisement, solicitation, termination */
	case 152:
	case 153:
		return 0;
	case NEIGHBOUR_ADVERTISEMENT:
		/* A frame that is longer than the header goes by what there is of it. */
		return !is_fragment && is_listed(&locking->ipv6[0][0], locking->n_ipv6, 16, message + 8, n_target);
	default:
		/* RFC 6980: there is no neighbour discovery in fragments, which could hide what it says. */
		return !is_fragment || type < ROUTER_SOLICITATION || type > REDIRECT;
	}
}

/* What comes behind IPv6's header and its extensions. */
static int may_ipv6_payload(const struct pv_switch_locking *locking, struct packet packet)
{
	uint32_t next = packet.bytes[6], at = 40;
	int is_fragment = 0;

	for (int i = 0; i < MOST_EXTENSIONS; i++) {
		uint32_t header = at;

		switch (next) {
		case HOP_BY_HOP:
		case ROUTING:
		case DESTINATION_OPTIONS:
			if (packet.n < at + 2)
				return 0;
			at += (packet.bytes[header + 1] + 1u) * 8;
			break;
		case FRAGMENT:
			if (packet.n < at + 8)
				return 0;
			/* Of the later ones only the source can be told; their first one was seen, or is missing. */
			if (switch_be16(packet.bytes + header + 2) >> 3)
				return 1;
			is_fragment = 1;
			at += 8;
			break;
		case ICMPV6:
			return packet.n > at && may_icmpv6(locking, packet.bytes + at, packet.n - at, is_fragment);
		default:
			return 1;
		}
		next = packet.bytes[header];
	}
	return 0;
}

static int may_ipv6(const struct pv_switch_locking *locking, struct packet packet)
{
	return packet.n >= 40 && packet.bytes[0] >> 4 == 6 &&
	       is_listed(&locking->ipv6[0][0], locking->n_ipv6, 16, packet.bytes + 8, 16) &&
	       may_ipv6_payload(locking, packet);
}

int switch_is_allowed(const struct pv_switch_locking *locking, const struct switch_frame *frame)
{
	struct packet packet = {
		.bytes = frame->header + frame->type_at + 2,
		.n = frame->header_bytes - frame->type_at - 2,
	};

	if (frame->from != switch_mac(locking->mac))
		return 0;
	switch (switch_be16(frame->header + frame->type_at)) {
	case ARP:
		return may_arp(locking, packet);
	case IPV4:
		return may_ipv4(locking, packet);
	case IPV6:
		return may_ipv6(locking, packet);
	default:
		return 0;
	}
}
