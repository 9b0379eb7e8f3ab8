/* SPDX-License-Identifier: MIT */
/* What the scenarios share. */
#ifndef SCENARIOS_H
#define SCENARIOS_H

#include "explore.h"
#include "pv_event.h"

#define START (UINT32_MAX - 1)   /* indexes wrap on the way */
#define SLOT 70
#define A_LONG_TIME (-1)

/* A channel between two waiters; ports[0] sends to ports[1] and back. */
extern struct pv_waiter waiters[2];
extern struct pv_inbox inboxes[2];
extern struct pv_port ports[2];
void make_channel(void);

#endif
