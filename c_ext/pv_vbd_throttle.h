/* SPDX-License-Identifier: MIT */
/*
 * How much a disk may do a second, all its queues together: two buckets, one of requests and one of bytes, which fill at
 * their rates and hold a burst at most.
 *
 * Whoever serves the disk asks for room before he takes requests, and charges what they were when he knows. A bucket may
 * go below zero by that, and whoever comes next waits for it: over any time t no more than rate * t + burst, and a batch for
 * each queue, is let through, however large the requests are.
 *
 * Threads: every call from any.
 */
#ifndef PV_VBD_THROTTLE_H
#define PV_VBD_THROTTLE_H

#include <stdint.h>

struct pv_vbd_rates {
	uint64_t requests;       /* a second; 0: as many as come */
	uint64_t requests_burst; /* after a rest, at once; 0: a tenth of a second's worth, at least 1 */
	uint64_t bytes;          /* the same of bytes read and written */
	uint64_t bytes_burst;
};

struct pv_vbd_throttle;

/* Without limits. NULL: no memory. */
struct pv_vbd_throttle *pv_vbd_throttle_new(void);
/* Nobody may use it any more. NULL: nothing to do. */
void pv_vbd_throttle_free(struct pv_vbd_throttle *throttle);
/* From now on, with full buckets; those that rest look again. */
void pv_vbd_throttle_set(struct pv_vbd_throttle *throttle, const struct pv_vbd_rates *rates);
/* Whether there is a limit. */
int pv_vbd_throttle_is_on(const struct pv_vbd_throttle *throttle);
/* How many requests may be taken now, up to `most`, which is at least 1; 0: none before they have rested. */
uint32_t pv_vbd_throttle_room(struct pv_vbd_throttle *throttle, uint32_t most);
/* How long until there is room. */
int64_t pv_vbd_throttle_wait_ns(struct pv_vbd_throttle *throttle);
void pv_vbd_throttle_charge(struct pv_vbd_throttle *throttle, uint64_t requests, uint64_t bytes);
/* Sleep until there is room or the limits change; or, after a kick, because *stopping is not 0. */
void pv_vbd_throttle_rest(struct pv_vbd_throttle *throttle, const uint32_t *stopping);
void pv_vbd_throttle_kick(struct pv_vbd_throttle *throttle);

#endif
