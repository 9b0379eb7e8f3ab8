/* SPDX-License-Identifier: MIT */
#ifndef NETBACK_PRIVATE_H
#define NETBACK_PRIVATE_H

#include "pv_netback.h"

/* A frame that waits; its bytes follow. */
struct waiting {
	int64_t since_ns;
	struct pv_backlog *sender;
	struct pv_frame frame;     /* offset: bytes into those of its block */
};

/* How many of them there are in memory of one piece: they are delivered together. */
struct pv_waiting_block {
	struct pv_waiting_block *next;
	uint32_t n;
	uint32_t from;             /* bytes: where the oldest one is */
	uint32_t used;
	uint32_t capacity;
	uint8_t bytes[];
};

/* A frame waits from now on: 1; 0: enough waits already. */
int netback_wait(struct pv_netback *netback, const uint8_t *bytes, const struct pv_frame *frame, int64_t now_ns);
/* The oldest of all. There is one. */
struct waiting *netback_oldest(const struct pv_netback *netback);
/* It waits no longer; its block goes with the last one in it. */
void netback_drop_oldest(struct pv_netback *netback);

#endif
