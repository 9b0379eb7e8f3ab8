/* SPDX-License-Identifier: MIT */
/*
 * Pages of a guest that its network backend keeps mapped because the guest has asked for it on the control ring: one table
 * of references for each queue.
 *
 * Had by the thread that serves the control ring and moves the frames. A table of the guest's is copied before it is looked
 * at, and counts as a whole or not at all.
 *
 * Source: Xen public/io/netif.h, static grants.
 */
#ifndef PV_NETGREFS_H
#define PV_NETGREFS_H

#include <stdint.h>

#include "pv_grant.h"
#include "pv_netback.h"

#define PV_NETGREFS_QUEUES 64      /* a bit of a word for each */
#define PV_NETGREFS_MAX 512        /* references of a queue: what a list of one page holds */
#define PV_NETGREF_READONLY 1

/* One entry of a list. */
struct pv_netgref {
	uint32_t gref;
	uint16_t flags;            /* PV_NETGREF_READONLY */
	uint16_t status;           /* out, of those to be unmapped: PV_NETCTRL_* */
};

struct pv_netgrefs {
	struct pv_mapper *mapper;
	uint32_t n_queues;
	uint64_t *mapped;          /* of each page of the mapper, a bit for each queue whose table it is in; NULL: none is */
	uint64_t *read_only;       /* of these, mapped to be read */
	uint8_t *busy;             /* of each page: a request of the queue that is looked at names it */
	uint32_t n[PV_NETGREFS_QUEUES];
	struct pv_netback *backs[PV_NETGREFS_QUEUES]; /* whose requests use the pages; NULL: nobody's */
};

void pv_netgrefs_init(struct pv_netgrefs *grefs, struct pv_mapper *mapper, uint32_t n_queues);
/* Unmap all. Harmless when repeated. */
void pv_netgrefs_destroy(struct pv_netgrefs *grefs);
/* Map the n references of the guest's page `list`, all or none: PV_NETCTRL_*. */
uint32_t pv_netgrefs_add(struct pv_netgrefs *grefs, uint32_t queue, uint32_t list, uint32_t n);
/*
 * Unmap those of the n references that are mapped and that no request names which was taken and is not answered; each
 * one's status goes into the page. PV_NETCTRL_*; *n_unmapped: how many.
 */
uint32_t pv_netgrefs_del(struct pv_netgrefs *grefs, uint32_t queue, uint32_t list, uint32_t n, uint32_t *n_unmapped);

#endif
