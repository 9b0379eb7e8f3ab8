/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <stddef.h>
#include <string.h>

#include "pv_atomic.h"
#include "pv_flex.h"
#include "pv_home.h"

_Static_assert(offsetof(struct pv_flex_indexes, in_prod) == 4 && offsetof(struct pv_flex_indexes, out_cons) == 64 &&
		       offsetof(struct pv_flex_indexes, out_prod) == 68 &&
		       offsetof(struct pv_flex_indexes, ring_order) == 128 && offsetof(struct pv_flex_indexes, ref) == 132,
	       "as Xen's header lays it out");
_Static_assert(offsetof(struct pv_flex_indexes, in_error) == 8 && offsetof(struct pv_flex_indexes, out_error) == 72 &&
		       sizeof(struct pv_flex_indexes) <= PV_PAGE_BYTES,
	       "as pvcalls does, in a page");

uint32_t pv_flex_bytes(uint32_t order)
{
	return order > PV_FLEX_MAX_ORDER ? 0 : (uint32_t)PV_PAGE_BYTES / 2 << order;
}

static int join(struct pv_flex *flex, struct pv_flex_indexes *indexes, uint8_t *data, uint32_t order,
		struct pv_port *port, int is_front)
{
	uint32_t size = pv_flex_bytes(order);
	uint8_t *in = data, *out = data + size;

	*flex = (struct pv_flex){.indexes = indexes, .order = order, .is_front = is_front != 0};
	flex->stream = (struct pv_stream){
		.out = is_front ? out : in,
		.in = is_front ? in : out,
		.out_prod = is_front ? &indexes->out_prod : &indexes->in_prod,
		.out_cons = is_front ? &indexes->out_cons : &indexes->in_cons,
		.in_prod = is_front ? &indexes->in_prod : &indexes->out_prod,
		.in_cons = is_front ? &indexes->in_cons : &indexes->out_cons,
		.port = port,
		.out_size = size,
		.in_size = size,
		.home = pv_home_mark(),
	};
	/* Our own words, left by whoever was this end before: from here on they are only written. */
	flex->stream.written = pv_load_acquire(flex->stream.out_prod);
	flex->stream.read = pv_load_acquire(flex->stream.in_cons);
	return pv_flex_queued(flex) < 0 || pv_flex_avail(flex) < 0 ? -EPROTO : 0;
}

int pv_flex_create(struct pv_flex *flex, void *indexes, void *data, uint32_t order, const uint32_t *refs,
		   struct pv_port *port, uint32_t start)
{
	struct pv_flex_indexes *page = indexes;

	if (pv_flex_bytes(order) == 0 || (uintptr_t)indexes % 4)
		return -EINVAL;
	memset(page, 0, sizeof *page);
	page->in_cons = page->in_prod = page->out_cons = page->out_prod = start;
	page->ring_order = order;
	if (refs)
		memcpy(page->ref, refs, sizeof *refs << order);
	return join(flex, page, data, order, port, 1);
}

int pv_flex_look(const void *indexes, uint32_t max_order, uint32_t *refs)
{
	const struct pv_flex_indexes *page = indexes;
	uint32_t order = pv_load_acquire(&page->ring_order);

	if (order > max_order || order > PV_FLEX_MAX_ORDER)
		return -EPROTO;
	for (uint32_t i = 0; i < (uint32_t)1 << order; i++)
		refs[i] = pv_load_relaxed(&page->ref[i]);
	return (int)order;
}

int pv_flex_attach(struct pv_flex *flex, void *indexes, void *data, uint32_t order, struct pv_port *port)
{
	if (pv_flex_bytes(order) == 0 || (uintptr_t)indexes % 4)
		return -EINVAL;
	return join(flex, indexes, data, order, port, 0);
}

int64_t pv_flex_queued(struct pv_flex *flex)
{
	return pv_stream_readable(&flex->stream);
}

int64_t pv_flex_avail(struct pv_flex *flex)
{
	return pv_stream_writable(&flex->stream);
}

/* All of it moved; or the peer took back an index between two looks at it, and the packet is torn. */
static int64_t whole(struct pv_flex *flex, int64_t moved, uint32_t n)
{
	if (moved < 0 || (uint32_t)moved == n)
		return moved;
	pv_store_relaxed(&flex->stream.dead, 1);
	return -EPROTO;
}

int64_t pv_flex_read(struct pv_flex *flex, uint8_t *data, uint32_t n)
{
	int64_t queued = pv_flex_queued(flex);

	if (queued < 0)
		return queued;
	if (n > flex->stream.in_size)
		return -EMSGSIZE;
	return queued < n || n == 0 ? 0 : whole(flex, pv_stream_read(&flex->stream, data, n), n);
}

int64_t pv_flex_write(struct pv_flex *flex, const uint8_t *data, uint32_t n)
{
	int64_t avail = pv_flex_avail(flex);

	if (avail < 0)
		return avail;
	if (n > flex->stream.out_size)
		return -EMSGSIZE;
	return avail < n || n == 0 ? 0 : whole(flex, pv_stream_write(&flex->stream, data, n), n);
}

int64_t pv_flex_peek(struct pv_flex *flex, uint8_t *data, uint32_t n)
{
	int64_t queued = pv_flex_queued(flex);
	uint32_t from, till_end;

	if (queued < 0)
		return queued;
	if (n > flex->stream.in_size)
		return -EMSGSIZE;
	if (queued < n)
		return 0;
	from = flex->stream.read & (flex->stream.in_size - 1);
	till_end = flex->stream.in_size - from < n ? flex->stream.in_size - from : n;
	memcpy(data, flex->stream.in + from, till_end);
	memcpy(data + till_end, flex->stream.in, n - till_end);
	pv_fence_compiler();
	return n;
}

int32_t pv_flex_error(const struct pv_flex *flex, int in)
{
	return in ? pv_load_acquire(&flex->indexes->in_error) : pv_load_acquire(&flex->indexes->out_error);
}

int64_t pv_flex_set_error(struct pv_flex *flex, int in, int32_t error)
{
	if (!pv_home_is_here(flex->stream.home))
		return -ECHILD;
	if (flex->is_front)
		return -EINVAL;
	/* Release: the bytes before it. Who sees the error reads what is left, and then no more will come. */
	pv_store_release(in ? &flex->indexes->in_error : &flex->indexes->out_error, error);
	return flex->stream.port && pv_notify(flex->stream.port) == PV_NOTIFY_STALE ? PV_STREAM_STALE : 0;
}
