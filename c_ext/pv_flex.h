/* SPDX-License-Identifier: MIT */
/*
 * Flex rings: two byte streams in pages of their own, with their indexes in a third page, for protocols whose messages
 * vary in length (9pfs, pvcalls). Source: DEFINE_XEN_FLEX_RING of Xen's public/io/ring.h.
 *
 * A ring of order n has data of 2**n pages: the first half is "in" (the back end produces), the second "out" (the front
 * end produces). Indexes run freely over 32 bits and are masked where they are used. Each direction is a pv_stream, with
 * its trust, threads and fork: the peer's index is read once a call and checked; what is read is a private copy.
 *
 * There is no event index: an end notifies after each call that moved bytes.
 */
#ifndef PV_FLEX_H
#define PV_FLEX_H

#include <stdint.h>

#include "pv_stream.h"

#define PV_FLEX_MAX_ORDER 9

/* The shared page of indexes, as DEFINE_XEN_FLEX_RING_AND_INTF lays it out; pvcalls has the errors, 9pfs has padding. */
struct pv_flex_indexes {
	uint32_t in_cons;           /* front */
	uint32_t in_prod;           /* back */
	int32_t in_error;           /* back: pvcalls */
	uint32_t pad1[13];
	uint32_t out_cons;          /* back */
	uint32_t out_prod;          /* front */
	int32_t out_error;          /* back: pvcalls */
	uint32_t pad2[13];
	uint32_t ring_order;        /* front */
	uint32_t ref[512];          /* front: grant references of the data pages, 2**ring_order of them */
};

/* Private: one end. */
struct pv_flex {
	struct pv_stream stream;    /* `out` is what this end writes */
	struct pv_flex_indexes *indexes;
	uint32_t order;
	uint32_t is_front;
};

/* Bytes of one direction (XEN_FLEX_RING_SIZE); 0 for an order that cannot be. */
uint32_t pv_flex_bytes(uint32_t order);
/*
 * Front: make an empty ring: indexes 0 (or `start`, for a test of the wrap), errors 0, the order, and the references
 * of 2**order pages (NULL: none). `data`: pv_flex_bytes(order) * 2 bytes. 0; -EINVAL.
 */
int pv_flex_create(struct pv_flex *flex, void *indexes, void *data, uint32_t order, const uint32_t *refs,
		   struct pv_port *port, uint32_t start);
/*
 * What the front end says of its ring, for a back end that has mapped only the page of indexes: the order, read once, with
 * the references copied to refs[0 .. 2**order - 1]; -EPROTO for an order above `max_order`.
 */
int pv_flex_look(const void *indexes, uint32_t max_order, uint32_t *refs);
/*
 * Back: join at the indexes that stand there, with the order that pv_flex_look returned. 0; -EINVAL; -EPROTO for indexes
 * that cannot be.
 */
int pv_flex_attach(struct pv_flex *flex, void *indexes, void *data, uint32_t order, struct pv_port *port);

/* Bytes to be read, and room for bytes to be written; -EPROTO dead; -ECHILD. (NAME_queued; size - NAME_queued) */
int64_t pv_flex_queued(struct pv_flex *flex);
int64_t pv_flex_avail(struct pv_flex *flex);
/*
 * A whole packet or nothing: n | PV_STREAM_STALE << 32; 0 when it is not there, or has no room, yet; -EMSGSIZE: it is larger
 * than the ring; -EPROTO; -ECHILD. (NAME_read_packet, NAME_write_packet)
 */
int64_t pv_flex_read(struct pv_flex *flex, uint8_t *data, uint32_t n);
int64_t pv_flex_write(struct pv_flex *flex, const uint8_t *data, uint32_t n);
/* Copy what pv_flex_read would read and leave it there: a header, to learn how long the packet is. No notification. */
int64_t pv_flex_peek(struct pv_flex *flex, uint8_t *data, uint32_t n);

/* pvcalls: what the back end says of a direction (0: fine, negative: no more). in: 1 or 0. */
int32_t pv_flex_error(const struct pv_flex *flex, int in);
/* Back: say so, after the last bytes of that direction; notifies. 0 or PV_STREAM_STALE; -EINVAL for a front end. */
int64_t pv_flex_set_error(struct pv_flex *flex, int in, int32_t error);

#endif
