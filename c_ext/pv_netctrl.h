/* SPDX-License-Identifier: MIT */
/*
 * The control ring of a network device, the backend's half: how the frontend wants packets to be hashed, which of its
 * queues gets which of them, and which of its pages stay mapped.
 *
 * One thread has it at a time, the one that moves the frames of the device. Requests and tables are copied before they are
 * looked at; a table counts as a whole or not at all.
 *
 * Source: Xen public/io/netif.h, control messages; limits as in Linux' drivers/net/xen-netback/hash.c.
 */
#ifndef PV_NETCTRL_H
#define PV_NETCTRL_H

#include <stdint.h>

#include "pv_grant.h"
#include "pv_netgrefs.h"
#include "pv_netif.h"
#include "pv_ring.h"

#define PV_NETCTRL_GET_HASH_FLAGS 1
#define PV_NETCTRL_SET_HASH_FLAGS 2
#define PV_NETCTRL_SET_HASH_KEY 3
#define PV_NETCTRL_GET_MAPPING_SIZE 4
#define PV_NETCTRL_SET_MAPPING_SIZE 5
#define PV_NETCTRL_SET_MAPPING 6
#define PV_NETCTRL_SET_HASH_ALGORITHM 7
#define PV_NETCTRL_GET_GREF_MAPPING_SIZE 8
#define PV_NETCTRL_ADD_GREF_MAPPING 9
#define PV_NETCTRL_DEL_GREF_MAPPING 10

#define PV_NETCTRL_SUCCESS 0
#define PV_NETCTRL_NOT_SUPPORTED 1
#define PV_NETCTRL_INVALID 2
#define PV_NETCTRL_OVERFLOW 3

#define PV_NETHASH_NONE 0
#define PV_NETHASH_TOEPLITZ 1
#define PV_NETHASH_IPV4 1          /* flags; the types of extra information are the numbers of their bits */
#define PV_NETHASH_IPV4_TCP 2
#define PV_NETHASH_IPV6 4
#define PV_NETHASH_IPV6_TCP 8
#define PV_NETHASH_KEY_BYTES 40
#define PV_NETHASH_MAPPING 128

#define PV_NETCTRL_TAKE 16         /* requests that are taken together */

struct pv_netctrl_request {
	uint16_t id;
	uint16_t type;
	uint32_t data[3];
};

struct pv_netctrl_response {
	uint16_t id;
	uint16_t type;
	uint32_t status;
	uint32_t data;
};

/* What a frontend has said of hashes. All zero: nothing. */
struct pv_nethash {
	uint32_t n_queues;         /* that it has; not 0 */
	uint32_t algorithm;
	uint32_t flags;
	uint32_t mapping_size;     /* 0: a hash modulo n_queues */
	uint32_t mapping[PV_NETHASH_MAPPING];
	uint8_t key[PV_NETHASH_KEY_BYTES];
};

struct pv_netctrl {
	struct pv_ring *ring;
	struct pv_mapper *mapper;
	struct pv_nethash *hash;
	struct pv_netgrefs *grefs;
	uint32_t stale;            /* 1: the frontend could not be notified; for the owner, who clears it */
	uint64_t requests;
	uint64_t refused;          /* of these: with another status than success */
};

/* One request; what it answers. Tables come from the guest through the mapper. */
struct pv_netctrl_response pv_netctrl_answer(struct pv_netctrl *ctrl, const struct pv_netctrl_request *request);
/* Some requests of the ring. How many; -EPROTO: the ring is dead; another -errno. */
int64_t pv_netctrl_serve(struct pv_netctrl *ctrl);

/* The hash of a frame, into its `hash` and `hash_type`, and its flag; without one that is asked for: none. */
void pv_nethash_of(const struct pv_nethash *hash, const uint8_t *bytes, struct pv_frame *frame);
/* The queue of a frame, of which pv_nethash_of has been asked. */
uint32_t pv_nethash_queue(const struct pv_nethash *hash, const struct pv_frame *frame);

#endif
