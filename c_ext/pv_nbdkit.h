/* SPDX-License-Identifier: MIT */
/*
 * What the process that follows xenstore and the plugin of nbdkit say to each other.
 *
 * One AF_UNIX SOCK_SEQPACKET socket; each message is one struct in the host's byte order. The first asks, the plugin
 * answers each in turn with the same `kind` and a status; COMPLAIN and nothing else comes unasked. Its end is the end of
 * both: each stops when the other is gone.
 */
#ifndef PV_NBDKIT_H
#define PV_NBDKIT_H

#include <stdint.h>

#include "pv_blkdisk.h"

#define PV_NBDKIT_MAKE 1      /* backend, ring_order, max_spin_ns; answer: keys. pv_blkdisk_make */
#define PV_NBDKIT_GO 2        /* shape. pv_blkdisk_go */
#define PV_NBDKIT_RESHAPE 3   /* shape. pv_blkdisk_reshape */
#define PV_NBDKIT_PAUSE 4     /* pv_blkdisk_pause */
#define PV_NBDKIT_FAIL 5      /* error. pv_blkdisk_fail */
#define PV_NBDKIT_COUNT 6     /* answer: counters. pv_blkdisk_count */
#define PV_NBDKIT_COMPLAIN 7  /* text: how the backend has broken the protocol */

#define PV_NBDKIT_TEXT_BYTES 160

struct pv_nbdkit_message {
	uint32_t kind;
	int32_t status;           /* of an answer: 0 or a negative errno */
	uint32_t backend;         /* domid */
	uint32_t ring_order;
	int64_t max_spin_ns;
	uint32_t error;           /* errno */
	uint32_t pad;
	struct pv_blkdisk_shape shape;
	struct pv_front_keys keys;
	struct pv_blkdisk_counters counters;
	uint8_t text[PV_NBDKIT_TEXT_BYTES];  /* NUL-terminated */
};

#endif
