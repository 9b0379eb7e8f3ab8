/* SPDX-License-Identifier: MIT */
/* What the two directions of a queue of the frontend share. */
#ifndef NETFRONT_PRIVATE_H
#define NETFRONT_PRIVATE_H

#include "pv_netfront.h"

#define PAGE_BYTES 4096u

/* What became of a push: 0, or -errno. */
static inline int64_t settle_push(struct pv_netfront *front, int64_t result)
{
	if (result < 0)
		return result;
	if (result >> 32 & PV_RING_STALE)
		front->untold = 1;
	return 0;
}

#endif
