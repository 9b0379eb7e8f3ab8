/* SPDX-License-Identifier: MIT */
/*
 * What the fuzz targets of the core share: the input, the memory that the peer rewrites out of it (see fuzz_shim.h), and a
 * driver for compilers without libFuzzer. Included once, by the file with LLVMFuzzerTestOneInput.
 */
#ifndef FUZZ_INPUT_H
#define FUZZ_INPUT_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const uint8_t *input;
static size_t left;
static uint8_t *shared;
static size_t shared_bytes;

#define must(what) ((what) ? (void)0 : fail(#what, __FILE__, __LINE__))

static void fail(const char *what, const char *file, int line)
{
	fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, what);
	abort();
}

static uint8_t byte(void)
{
	return left ? left--, *input++ : 0;
}

/* Small numbers and those near a wrap, or any. */
static uint32_t number(void)
{
	uint32_t kind = byte();

	if (kind < 128)
		return kind % 16;
	if (kind < 160)
		return 0u - kind % 16;
	return (uint32_t)byte() | (uint32_t)byte() << 8 | (uint32_t)byte() << 16 | (uint32_t)byte() << 24;
}

/* The peer's turn: 0 in most inputs, so that long runs without it are found as easily. */
void rewrite(const void *at, unsigned long n)
{
	size_t offset = (size_t)((const uint8_t *)at - shared);
	uint32_t value;

	if ((const uint8_t *)at < shared || offset >= shared_bytes || byte() % 4 != 1)
		return;
	/* Of a copy of many words, one near its start. */
	if (n > sizeof value)
		offset += byte() % (n < 64 ? n : 64) / sizeof value * sizeof value;
	value = number();
	/* The word itself, by a value or by a step. */
	if (value & 1)
		value += shared[offset];
	n = n < sizeof value ? n : sizeof value;
	memcpy(shared + offset, &value, offset + n > shared_bytes ? shared_bytes - offset : n);
}

/* Memory of both sides, zeros, sized to the byte: what lies behind is the sanitizer's. To be freed. */
static void begin(const uint8_t *data, size_t n, size_t n_shared)
{
	input = data;
	left = n;
	shared = aligned_alloc(64, n_shared);
	shared_bytes = n_shared;
	memset(shared, 0, n_shared);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

#ifdef FUZZ_STANDALONE
/* For compilers without libFuzzer: `program -runs=N -seed=S`. Run i depends on S + i alone. */
int main(int argc, char **argv)
{
	uint64_t n_runs = 0, seed = 1;

	for (int i = 1; i < argc; i++)
		if (sscanf(argv[i], "-runs=%lu", &n_runs) != 1)
			(void)!sscanf(argv[i], "-seed=%lu", &seed);
	for (uint64_t run = 0; run < n_runs; run++) {
		uint64_t dice = (seed + run) * 0x9E3779B97F4A7C15u;
		uint8_t data[256];

		for (size_t i = 0; i < sizeof data; i++) {
			dice = dice * 6364136223846793005u + 1442695040888963407u;
			data[i] = (uint8_t)(dice >> 33);
		}
		LLVMFuzzerTestOneInput(data, 1 + run % sizeof data);
	}
	fprintf(stderr, "Done %lu runs\n", n_runs);
	return 0;
}
#endif

#endif
