/* SPDX-License-Identifier: MIT */
/*
 * What the fuzz targets share: bytes of the input, failing, and a driver for compilers without libFuzzer.
 *
 * A target has one function, LLVMFuzzerTestOneInput. Without -fsanitize=fuzzer (FUZZ_STANDALONE) this header's main runs
 * it: `program -runs=N -seed=S FILES AND FOLDERS` plays the files, then N mutations of them. Run i depends on S + i alone.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct input {
	const uint8_t *at;
	size_t left;
};

/* The next n bytes as a number, 0 where there are none. */
static inline uint32_t take(struct input *input, uint32_t n)
{
	uint32_t value = 0;

	for (uint32_t i = 0; i < n && input->left; i++, input->left--)
		value |= (uint32_t)*input->at++ << (8 * i);
	return value;
}

static inline const uint8_t *take_bytes(struct input *input, size_t *n)
{
	const uint8_t *at = input->at;

	if (*n > input->left)
		*n = input->left;
	input->at += *n;
	input->left -= *n;
	return at;
}

#define must(what) ((what) ? (void)0 : fail(#what, __FILE__, __LINE__))

static inline void fail(const char *what, const char *file, int line)
{
	fprintf(stderr, "%s:%d: does not hold: %s\n", file, line, what);
	abort();
}

/* Much memory is taken and given back: remember little of each piece, and not for long. */
const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
	return "malloc_context_size=5:quarantine_size_mb=4";
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

#ifdef FUZZ_STANDALONE
#include <dirent.h>

#define INPUT_MAX 4096
#define CORPUS_MAX 1024

static struct {
	uint8_t data[INPUT_MAX];
	size_t n;
} corpus[CORPUS_MAX];
static uint32_t n_corpus;
static uint64_t dice;

static uint32_t roll(uint32_t n)
{
	dice = dice * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(dice >> 33) % n;
}

static void read_file(const char *path)
{
	FILE *file = fopen(path, "rb");

	if (file && n_corpus < CORPUS_MAX) {
		corpus[n_corpus].n = fread(corpus[n_corpus].data, 1, INPUT_MAX, file);
		n_corpus++;
	}
	if (file)
		fclose(file);
}

static void read_any(const char *path)
{
	DIR *folder = opendir(path);
	char name[4096];

	if (!folder) {
		read_file(path);
		return;
	}
	for (struct dirent *entry; (entry = readdir(folder));) {
		snprintf(name, sizeof name, "%s/%s", path, entry->d_name);
		if (entry->d_name[0] != '.')
			read_file(name);
	}
	closedir(folder);
}

/* Replace n bytes at `at` by m bytes: an insertion, a deletion, or other bytes. */
static size_t splice(uint8_t *data, size_t length, size_t at, size_t n, const uint8_t *with, size_t m)
{
	if (length - n + m > INPUT_MAX)
		return length;
	memmove(data + at + m, data + at + n, length - at - n);
	memcpy(data + at, with, m);
	return length - n + m;
}

static size_t mutate(uint8_t *data, size_t n)
{
	uint8_t piece[64];
	size_t at = roll((uint32_t)n + 1), cut = roll(5), m = roll(9);
	uint32_t other = roll(n_corpus);

	if (cut > n - at)
		cut = n - at;
	switch (roll(6)) {
	case 0: /* a bit */
		if (at < n)
			data[at] ^= (uint8_t)(1 << roll(8));
		return n;
	case 1: /* a byte */
		if (at < n)
			data[at] = (uint8_t)roll(256);
		return n;
	case 2: /* a piece of another file, 3: of this one */
	case 3: {
		const uint8_t *from = roll(2) ? data : corpus[other].data;
		size_t length = from == data ? n : corpus[other].n, start = roll((uint32_t)length + 1);

		m = roll(sizeof piece);
		m = m > length - start ? length - start : m;
		memcpy(piece, from + start, m);
		return splice(data, n, at, 0, piece, m);
	}
	case 4: /* random bytes in place of some */
		for (size_t i = 0; i < m; i++)
			piece[i] = (uint8_t)roll(256);
		return splice(data, n, at, cut, piece, m);
	default: /* less */
		cut = roll(64);
		return splice(data, n, at, cut > n - at ? n - at : cut, piece, 0);
	}
}

int main(int argc, char **argv)
{
	static uint8_t data[INPUT_MAX];
	uint64_t n_runs = 0, seed = 1;

	for (int i = 1; i < argc; i++) {
		if (sscanf(argv[i], "-runs=%lu", &n_runs) == 1 || sscanf(argv[i], "-seed=%lu", &seed) == 1 || argv[i][0] == '-')
			continue;
		read_any(argv[i]);
	}
	for (uint32_t i = 0; i < n_corpus; i++)
		LLVMFuzzerTestOneInput(corpus[i].data, corpus[i].n);
	if (!n_corpus)
		n_corpus = 1; /* an empty one */
	for (uint64_t run = 0; run < n_runs; run++) {
		uint32_t from;
		size_t n;

		if (run % 100000 == 0)
			fprintf(stderr, "#%lu\n", run);
		dice = (seed + run) * 0x9E3779B97F4A7C15u;
		(void)roll(2);
		from = roll(n_corpus);
		n = corpus[from].n;
		memcpy(data, corpus[from].data, n);
		for (uint32_t left = 1 + roll(12); left--;)
			n = mutate(data, n);
		LLVMFuzzerTestOneInput(data, n);
	}
	fprintf(stderr, "Done %lu runs and %u files\n", n_runs, n_corpus);
	return 0;
}
#endif
#endif
