/* SPDX-License-Identifier: MIT */
/*
 * A histogram of times with buckets that grow with what they hold, so that each time is kept to 3 %: 32 buckets for each
 * power of two, as HdrHistogram's with two digits.
 *
 * Threads: one at a time.
 */
#ifndef PV_HISTOGRAM_H
#define PV_HISTOGRAM_H

#include <stdint.h>

#define PV_HISTOGRAM_BUCKETS 1216       /* to 73 minutes; what is longer is counted in the last one */

struct pv_histogram {
	uint64_t n;
	uint64_t sum_ns;
	uint64_t least_ns;              /* 0 when n is 0 */
	uint64_t most_ns;
	uint64_t buckets[PV_HISTOGRAM_BUCKETS];
};

void pv_histogram_clear(struct pv_histogram *histogram);
/* A negative time counts as 0. */
void pv_histogram_add(struct pv_histogram *histogram, int64_t ns);
/* Everything of `from`, too. */
void pv_histogram_merge(struct pv_histogram *histogram, const struct pv_histogram *from);
/* The least time in a bucket; of PV_HISTOGRAM_BUCKETS: the end of the last one. */
uint64_t pv_histogram_bucket_ns(uint32_t bucket);
/*
 * The time that `millionths` of all do not exceed: the middle of its bucket, but never less than least_ns or more than
 * most_ns. 0 when there is none.
 */
uint64_t pv_histogram_percentile_ns(const struct pv_histogram *histogram, uint32_t millionths);

#endif
