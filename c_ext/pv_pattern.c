/* SPDX-License-Identifier: MIT */
#include "pv_pattern.h"

#include <string.h>

#define SECTOR_BYTES PV_PATTERN_SECTOR_BYTES
#define SECTOR_WORDS (SECTOR_BYTES / 8)

static uint64_t mix(uint64_t x)
{
	x ^= x >> 32;
	x *= 0xD6E8FEB86659FD93u;
	return x ^ x >> 32;
}

static uint64_t key_of(uint64_t offset, uint32_t generation, uint64_t seed)
{
	return mix(seed + offset * 0x9E3779B97F4A7C15u) + generation;
}

void pv_pattern_fill(uint8_t *to, uint64_t n_bytes, uint64_t offset, uint32_t generation, uint64_t seed)
{
	for (; n_bytes >= SECTOR_BYTES; n_bytes -= SECTOR_BYTES, to += SECTOR_BYTES, offset += SECTOR_BYTES) {
		uint64_t words[SECTOR_WORDS] = { offset, generation }, key = key_of(offset, generation, seed);

		for (uint32_t i = 2; i < SECTOR_WORDS; i++)
			words[i] = mix(key + i);
		memcpy(to, words, sizeof(words));
	}
}

uint32_t pv_pattern_check(const uint8_t *from, uint64_t n_bytes, uint64_t offset, uint32_t generation, uint64_t seed,
			  struct pv_pattern_mismatch *mismatch)
{
	uint32_t wrong = 0;

	for (; n_bytes >= SECTOR_BYTES; n_bytes -= SECTOR_BYTES, from += SECTOR_BYTES, offset += SECTOR_BYTES) {
		uint64_t words[SECTOR_WORDS], key = key_of(offset, generation, seed), differ;

		memcpy(words, from, sizeof(words));
		differ = (words[0] ^ offset) | (words[1] ^ generation);
		for (uint32_t i = 2; i < SECTOR_WORDS; i++)
			differ |= words[i] ^ mix(key + i);
		if (differ && !wrong++)
			*mismatch = (struct pv_pattern_mismatch){ .offset = offset, .found_offset = words[0],
								  .generation = generation,
								  .found_generation = (uint32_t)words[1] };
	}
	return wrong;
}
