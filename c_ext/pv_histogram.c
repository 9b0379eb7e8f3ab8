/* SPDX-License-Identifier: MIT */
#include "pv_histogram.h"

#include <string.h>

#define SHIFT 5
#define EACH (1u << SHIFT)      /* buckets for a power of two */

void pv_histogram_clear(struct pv_histogram *histogram)
{
	memset(histogram, 0, sizeof(*histogram));
}

/* Below EACH a bucket holds one time; from there on the leading bit chooses EACH of them, and the next bits one. */
static uint32_t bucket_of(uint64_t ns)
{
	uint32_t shift, bucket;

	if (ns < EACH)
		return (uint32_t)ns;
	shift = 63 - SHIFT - (uint32_t)__builtin_clzll(ns);
	bucket = shift * EACH + (uint32_t)(ns >> shift);
	return bucket < PV_HISTOGRAM_BUCKETS ? bucket : PV_HISTOGRAM_BUCKETS - 1;
}

uint64_t pv_histogram_bucket_ns(uint32_t bucket)
{
	uint32_t shift = bucket / EACH;

	return shift < 2 ? bucket : (uint64_t)(bucket % EACH + EACH) << (shift - 1);
}

void pv_histogram_add(struct pv_histogram *histogram, int64_t signed_ns)
{
	uint64_t ns = signed_ns < 0 ? 0 : (uint64_t)signed_ns;

	if (!histogram->n || ns < histogram->least_ns)
		histogram->least_ns = ns;
	if (ns > histogram->most_ns)
		histogram->most_ns = ns;
	histogram->n++;
	histogram->sum_ns += ns;
	histogram->buckets[bucket_of(ns)]++;
}

void pv_histogram_merge(struct pv_histogram *histogram, const struct pv_histogram *from)
{
	if (!from->n)
		return;
	if (!histogram->n || from->least_ns < histogram->least_ns)
		histogram->least_ns = from->least_ns;
	if (from->most_ns > histogram->most_ns)
		histogram->most_ns = from->most_ns;
	histogram->n += from->n;
	histogram->sum_ns += from->sum_ns;
	for (uint32_t i = 0; i < PV_HISTOGRAM_BUCKETS; i++)
		histogram->buckets[i] += from->buckets[i];
}

uint64_t pv_histogram_percentile_ns(const struct pv_histogram *histogram, uint32_t millionths)
{
	uint64_t wanted = (histogram->n * (uint64_t)millionths + 999999) / 1000000, seen = 0, ns;
	uint32_t bucket = 0;

	if (!histogram->n)
		return 0;
	for (; bucket < PV_HISTOGRAM_BUCKETS - 1; bucket++) {
		seen += histogram->buckets[bucket];
		if (seen && seen >= wanted)
			break;
	}
	ns = (pv_histogram_bucket_ns(bucket) + pv_histogram_bucket_ns(bucket + 1) - 1) / 2;
	if (ns < histogram->least_ns)
		return histogram->least_ns;
	return ns > histogram->most_ns ? histogram->most_ns : ns;
}
