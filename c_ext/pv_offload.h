/* SPDX-License-Identifier: MIT */
/*
 * What network cards do for a stack: checksums, cutting large TCP packets into segments, hashes of flows. For ends that
 * cannot do it, and for what stands between them.
 *
 * All of it works on frames in private memory, of any content: what is no packet of a known form is said to be none.
 *
 * Source: RFC 791, 8200, 9293, 768, 1071; IEEE 802.1Q; Toeplitz hash as in Microsoft's RSS and Xen public/io/netif.h.
 */
#ifndef PV_OFFLOAD_H
#define PV_OFFLOAD_H

#include <stdint.h>

#include "pv_netif.h"

/* Where the parts of a TCP or UDP packet stand: bytes from the start of the frame. */
struct pv_l4 {
	uint16_t l3;               /* IP header */
	uint16_t l4;               /* TCP or UDP header */
	uint16_t payload;          /* behind that */
	uint16_t checksum;         /* its field */
	uint32_t end;              /* of the packet; what follows is padding */
	uint8_t protocol;          /* 6 TCP, 17 UDP */
	uint8_t is_v6;
};

/* 1: a TCP or UDP packet, not a fragment, whole; 0: anything else. Two VLAN tags at most. */
int pv_offload_look(const uint8_t *frame, uint32_t n_bytes, struct pv_l4 *l4);
/* Put the sum of the pseudo header into the checksum's field, as a card wants it that does the rest. */
void pv_offload_prepare(uint8_t *frame, const struct pv_l4 *l4);
/* Fill in the checksum. */
void pv_offload_finish(uint8_t *frame, const struct pv_l4 *l4);
/* Whether the checksum of a packet is right. For UDP over IPv4, 0 is: none was made. */
int pv_offload_is_right(const uint8_t *frame, const struct pv_l4 *l4);
/* Whether a frame can be what is said of its checksum and segments; then its checksum's field is prepared. */
int pv_offload_fits(uint8_t *bytes, const struct pv_frame *frame);

/* Segments that a TCP packet makes with `size` bytes of payload each: 1 or more; 0: it cannot be cut so. */
uint32_t pv_offload_segments(const struct pv_l4 *l4, uint32_t size);
/*
 * Write segment number `index` to `out` (l4->payload + size bytes), with lengths, sequence number, flags and
 * checksums of its own; its bytes.
 */
uint32_t pv_offload_segment(const uint8_t *frame, const struct pv_l4 *l4, uint32_t size, uint32_t index, uint8_t *out);

/* Toeplitz hash of n bytes, with a key of 40; what is before the end of the key is enough for 36 bytes. */
uint32_t pv_toeplitz(const uint8_t key[40], const uint8_t *bytes, uint32_t n);
/* A number that is the same for all packets of a flow: by addresses and ports, else by what else there is. */
uint32_t pv_offload_flow(const uint8_t *frame, uint32_t n_bytes);

#endif
