/* SPDX-License-Identifier: MIT */
/*
 * What is written to a disk to be known again: each sector says where it belongs and of which generation it is, and the
 * rest of it follows from these and a seed. So a read finds what was lost, misplaced, torn or changed.
 */
#ifndef PV_PATTERN_H
#define PV_PATTERN_H

#include <stdint.h>

#define PV_PATTERN_SECTOR_BYTES 512

/* What a read found that was not written there. */
struct pv_pattern_mismatch {
	uint64_t offset;         /* bytes on the disk, of the sector */
	uint64_t found_offset;   /* what its pattern says, if it is one */
	uint32_t generation;     /* the one that was written last */
	uint32_t found_generation;
};

/* Fill n_bytes, whole sectors, that belong at `offset` of the disk, a multiple of 512 bytes. */
void pv_pattern_fill(uint8_t *to, uint64_t n_bytes, uint64_t offset, uint32_t generation, uint64_t seed);
/* How many sectors are not as they were filled. *mismatch: the first of these, if there is one. */
uint32_t pv_pattern_check(const uint8_t *from, uint64_t n_bytes, uint64_t offset, uint32_t generation, uint64_t seed,
			  struct pv_pattern_mismatch *mismatch);

#endif
