/* SPDX-License-Identifier: MIT */
/*
 * The engine's memory. Some is set aside, so that what was begun can be ended: when the machine has none left it is given
 * back to be used. Until as much can be set aside again, requests that need memory are refused. A single request that
 * needs more than all that ends the process: half a change is worse.
 */
#include <stdio.h>

#include "pv_atomic.h"
#include "xs_private.h"

#define RESERVE_BYTES (16 << 20)

static void *reserve; /* for all hubs of the process; nobody writes there, so it costs addresses, no memory */

int xs_memory_is_short(void)
{
	void *made;

	if (pv_load_relaxed(&reserve))
		return 0;
	made = malloc(RESERVE_BYTES);
	if (!made)
		return 1;
	free(pv_exchange(&reserve, made)); /* another thread may have been as fast */
	return 0;
}

static void *ask(void *memory, uint64_t n)
{
	return memory ? realloc(memory, n) : calloc(1, n);
}

void *xs_resize(void *memory, uint64_t n)
{
	void *made = ask(memory, n), *spare;

	if (!made && (spare = pv_exchange(&reserve, NULL))) {
		free(spare);
		made = ask(memory, n);
	}
	if (!made) {
		fputs("xenstored: no memory left\n", stderr);
		abort();
	}
	return made;
}

void *xs_alloc(uint64_t n)
{
	return xs_resize(NULL, n);
}

void *xs_alloc_unset(uint64_t n)
{
	void *made = malloc(n);

	return made ? made : xs_alloc(n);
}

uint8_t *xs_bytes_add(struct xs_bytes *bytes, uint64_t n)
{
	if (bytes->n + n > bytes->room) {
		bytes->room = (bytes->n + n) * 2;
		bytes->data = xs_resize(bytes->data, bytes->room);
	}
	bytes->n += n;
	return bytes->data + bytes->n - n;
}
