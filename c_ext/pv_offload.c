/* SPDX-License-Identifier: MIT */
/* Checksums, segments and hashes, by software. */
#include <string.h>

#include "pv_offload.h"

#define MAC_BYTES 12u              /* both addresses */
#define TAG_BYTES 4u
#define MAX_TAGS 2
#define IPV4 0x0800
#define IPV6 0x86DD
#define VLAN 0x8100
#define SERVICE_VLAN 0x88A8
#define TCP 6
#define UDP 17
#define TCP_FIN_PSH 0x09
#define TCP_CWR 0x80

static uint16_t get16(const uint8_t *at)
{
	return (uint16_t)(at[0] << 8 | at[1]);
}

static uint32_t get32(const uint8_t *at)
{
	return (uint32_t)get16(at) << 16 | get16(at + 2);
}

static void put16(uint8_t *at, uint32_t value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

static void put32(uint8_t *at, uint32_t value)
{
	put16(at, value >> 16);
	put16(at + 2, value & 0xFFFF);
}

/* Of bytes as 16-bit words in the order of the network, not folded: add as many as wanted. */
static uint64_t sum_of(const uint8_t *bytes, uint32_t n)
{
	uint64_t sum = 0, swapped;

	/* The sum of words in this machine's order, with the carries kept, is that of swapped words, swapped (RFC 1071). */
	for (; n >= 8; n -= 8, bytes += 8) {
		uint32_t words[2];

		memcpy(words, bytes, 8);
		sum += (uint64_t)words[0] + words[1];
	}
	for (; n >= 2; n -= 2, bytes += 2) {
		uint16_t word;

		memcpy(&word, bytes, 2);
		sum += word;
	}
	if (n) {
		uint8_t last[2] = { bytes[0], 0 };
		uint16_t word;

		memcpy(&word, last, 2);
		sum += word;
	}
	while (sum >> 16)
		sum = (sum & 0xFFFF) + (sum >> 16);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
	swapped = (sum & 0xFF) << 8 | sum >> 8;
#else
	swapped = sum;
#endif
	return swapped;
}

static uint16_t fold(uint64_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xFFFF) + (sum >> 16);
	return (uint16_t)sum;
}

static uint64_t pseudo_sum(const uint8_t *frame, const struct pv_l4 *l4, uint32_t l4_bytes)
{
	uint64_t sum = l4->protocol + (l4_bytes & 0xFFFF) + (l4_bytes >> 16);

	return sum + (l4->is_v6 ? sum_of(frame + l4->l3 + 8, 32) : sum_of(frame + l4->l3 + 12, 8));
}

static uint16_t checksum_of(const uint8_t *frame, const struct pv_l4 *l4)
{
	uint32_t l4_bytes = l4->end - l4->l4, field = l4->checksum - l4->l4;
	const uint8_t *header = frame + l4->l4;
	uint64_t sum = pseudo_sum(frame, l4, l4_bytes);

	/* Both parts begin at an even byte of it. */
	sum += sum_of(header, field) + sum_of(header + field + 2, l4_bytes - field - 2);
	return (uint16_t)~fold(sum);
}

/* ---- what stands where ---- */

static int look_at_v4(const uint8_t *frame, uint32_t n_bytes, struct pv_l4 *l4)
{
	const uint8_t *ip = frame + l4->l3;
	uint32_t header, total;

	if (n_bytes - l4->l3 < 20 || ip[0] >> 4 != 4)
		return 0;
	header = (ip[0] & 15u) * 4;
	total = get16(ip + 2);
	if (header < 20 || total < header || total > n_bytes - l4->l3 || get16(ip + 6) & 0x3FFF)
		return 0;
	l4->protocol = ip[9];
	l4->l4 = (uint16_t)(l4->l3 + header);
	l4->end = l4->l3 + total;
	return 1;
}

static int is_option_header(uint8_t next)
{
	return next == 0 || next == 43 || next == 60;
}

static int look_at_v6(const uint8_t *frame, uint32_t n_bytes, struct pv_l4 *l4)
{
	const uint8_t *ip = frame + l4->l3;
	uint32_t at = l4->l3 + 40u;
	uint8_t next;

	if (n_bytes - l4->l3 < 40 || ip[0] >> 4 != 6)
		return 0;
	l4->end = at + get16(ip + 4);
	if (l4->end > n_bytes)
		return 0;
	for (next = ip[6]; is_option_header(next);) {
		if (at + 8 > l4->end)
			return 0;
		next = frame[at];
		at += (frame[at + 1] + 1u) * 8;
	}
	/* A routing header may name another last address than the one that the pseudo header is made of: not so here, as
	 * packets that still travel by one have been given up by all. */
	if (at > l4->end || at > UINT16_MAX)
		return 0;
	l4->protocol = next;
	l4->l4 = (uint16_t)at;
	return 1;
}

int pv_offload_look(const uint8_t *frame, uint32_t n_bytes, struct pv_l4 *l4)
{
	uint32_t at = MAC_BYTES, left, header;
	uint16_t type;

	if (n_bytes < PV_NETIF_MIN_FRAME || n_bytes > PV_NETIF_MAX_FRAME)
		return 0;
	type = get16(frame + at);
	for (int tags = 0; tags < MAX_TAGS && (type == VLAN || type == SERVICE_VLAN); tags++) {
		at += TAG_BYTES;
		if (at + 2 > n_bytes)
			return 0;
		type = get16(frame + at);
	}
	l4->l3 = (uint16_t)(at + 2);
	l4->is_v6 = type == IPV6;
	if (type == IPV4 ? !look_at_v4(frame, n_bytes, l4) : type != IPV6 || !look_at_v6(frame, n_bytes, l4))
		return 0;
	left = l4->end - l4->l4;
	if (l4->protocol == UDP && left >= 8) {
		/* Its own length is what its checksum is of; more of IP's payload is not the packet's. */
		uint32_t length = get16(frame + l4->l4 + 4);

		if (length < 8 || length > left)
			return 0;
		l4->end = l4->l4 + length;
		l4->checksum = (uint16_t)(l4->l4 + 6);
		l4->payload = (uint16_t)(l4->l4 + 8);
		return 1;
	}
	if (l4->protocol != TCP || left < 20)
		return 0;
	header = (frame[l4->l4 + 12] >> 4) * 4u;
	if (header < 20 || header > left || l4->l4 + header > UINT16_MAX)
		return 0;
	l4->checksum = (uint16_t)(l4->l4 + 16);
	l4->payload = (uint16_t)(l4->l4 + header);
	return 1;
}

/* ---- checksums ---- */

void pv_offload_prepare(uint8_t *frame, const struct pv_l4 *l4)
{
	put16(frame + l4->checksum, fold(pseudo_sum(frame, l4, l4->end - l4->l4)));
}

void pv_offload_finish(uint8_t *frame, const struct pv_l4 *l4)
{
	uint16_t sum = checksum_of(frame, l4);

	put16(frame + l4->checksum, l4->protocol == UDP && !sum ? 0xFFFF : sum);
}

int pv_offload_is_right(const uint8_t *frame, const struct pv_l4 *l4)
{
	uint16_t found = get16(frame + l4->checksum), sum = checksum_of(frame, l4);

	if (l4->protocol == UDP && !found)
		return !l4->is_v6;
	/* Both are zero to who adds it up. */
	return found == sum || (found == 0xFFFF && !sum);
}

int pv_offload_fits(uint8_t *bytes, const struct pv_frame *frame)
{
	struct pv_l4 l4;

	if (!(frame->flags & PV_FRAME_CSUM_BLANK) && !frame->gso_type)
		return 1;
	if (!pv_offload_look(bytes, frame->length, &l4))
		return 0;
	if (frame->gso_type && (!frame->gso_size || frame->gso_type > PV_NETIF_GSO_TCPV6 || l4.protocol != TCP ||
				l4.is_v6 != (frame->gso_type == PV_NETIF_GSO_TCPV6)))
		return 0;
	pv_offload_prepare(bytes, &l4);
	return 1;
}

/* ---- segments ---- */

uint32_t pv_offload_segments(const struct pv_l4 *l4, uint32_t size)
{
	uint32_t payload = l4->end - l4->payload;

	if (l4->protocol != TCP || !size)
		return 0;
	return payload ? (payload + size - 1) / size : 1;
}

uint32_t pv_offload_segment(const uint8_t *frame, const struct pv_l4 *l4, uint32_t size, uint32_t index, uint8_t *out)
{
	uint32_t from = index * size, left = l4->end - l4->payload - from, n = left < size ? left : size;
	struct pv_l4 own = *l4;
	uint8_t *ip = out + l4->l3, *tcp = out + l4->l4;

	memcpy(out, frame, l4->payload);
	memcpy(out + l4->payload, frame + l4->payload + from, n);
	own.end = l4->payload + n;
	if (l4->is_v6) {
		put16(ip + 4, own.end - l4->l3 - 40);
	} else {
		put16(ip + 2, own.end - l4->l3);
		put16(ip + 4, (get16(ip + 4) + index) & 0xFFFF);
		put16(ip + 10, 0);
		put16(ip + 10, (uint16_t)~fold(sum_of(ip, (ip[0] & 15u) * 4)));
	}
	put32(tcp + 4, get32(tcp + 4) + from);
	if (n < left)
		tcp[13] &= (uint8_t)~TCP_FIN_PSH;
	if (index)
		tcp[13] &= (uint8_t)~TCP_CWR;
	pv_offload_finish(out, &own);
	return own.end;
}

/* ---- flows ---- */

uint32_t pv_toeplitz(const uint8_t key[40], const uint8_t *bytes, uint32_t n)
{
	uint32_t hash = 0, window = get32(key);

	for (uint32_t i = 0; i < n; i++)
		for (int bit = 7; bit >= 0; bit--) {
			uint32_t next = i + 4 < 40 ? key[i + 4] >> bit & 1u : 0;

			if (bytes[i] >> bit & 1)
				hash ^= window;
			window = window << 1 | next;
		}
	return hash;
}

static uint32_t mix(uint32_t hash, const uint8_t *bytes, uint32_t n)
{
	for (uint32_t i = 0; i + 4 <= n; i += 4) {
		hash ^= get32(bytes + i);
		hash *= 0x9E3779B1u;
		hash ^= hash >> 15;
	}
	return hash;
}

uint32_t pv_offload_flow(const uint8_t *frame, uint32_t n_bytes)
{
	struct pv_l4 l4;

	if (pv_offload_look(frame, n_bytes, &l4)) {
		uint32_t hash = mix(l4.protocol, frame + l4.l4, 4);

		return l4.is_v6 ? mix(hash, frame + l4.l3 + 8, 32) : mix(hash, frame + l4.l3 + 12, 8);
	}
	return mix(1, frame, n_bytes < MAC_BYTES ? 0 : MAC_BYTES);
}
