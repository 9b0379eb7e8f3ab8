/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <string.h>

#include "pv_atomic.h"
#include "pv_home.h"
#include "pv_stream.h"

static int range_fits(uint32_t offset, uint32_t size, uint32_t n_bytes)
{
	return size <= n_bytes && offset <= n_bytes - size;
}

static int word_fits(uint32_t offset, uint32_t n_bytes)
{
	return offset % 4 == 0 && range_fits(offset, 4, n_bytes);
}

static int layout_fits(const struct pv_stream_layout *layout, uint32_t n_bytes)
{
	return layout->out_size && layout->in_size && (layout->out_size & (layout->out_size - 1)) == 0 &&
	       (layout->in_size & (layout->in_size - 1)) == 0 && range_fits(layout->out, layout->out_size, n_bytes) &&
	       range_fits(layout->in, layout->in_size, n_bytes) && word_fits(layout->out_cons, n_bytes) &&
	       word_fits(layout->out_prod, n_bytes) && word_fits(layout->in_cons, n_bytes) &&
	       word_fits(layout->in_prod, n_bytes);
}

int pv_stream_attach(struct pv_stream *stream, void *page, uint32_t n_bytes, const struct pv_stream_layout *layout,
		     struct pv_port *port)
{
	uint8_t *start = page;

	if ((uintptr_t)page % 4 || !layout_fits(layout, n_bytes))
		return -EINVAL;
	*stream = (struct pv_stream){
		.out = start + layout->out,
		.in = start + layout->in,
		.out_prod = (uint32_t *)(start + layout->out_prod),
		.out_cons = (const uint32_t *)(start + layout->out_cons),
		.in_prod = (const uint32_t *)(start + layout->in_prod),
		.in_cons = (uint32_t *)(start + layout->in_cons),
		.port = port,
		.out_size = layout->out_size,
		.in_size = layout->in_size,
		.home = pv_home_mark(),
	};
	/* Our own words, left by whoever was this end before: from here on they are only written. */
	stream->written = pv_load_acquire(stream->out_prod);
	stream->read = pv_load_acquire(stream->in_cons);
	if (pv_stream_readable(stream) < 0 || pv_stream_writable(stream) < 0)
		return -EPROTO;
	return 0;
}

static int check_usable(const struct pv_stream *stream)
{
	if (!pv_home_is_here(stream->home))
		return -ECHILD;
	return pv_load_relaxed(&stream->dead) ? -EPROTO : 0;
}

/* Bytes between two indexes, one of them the peer's. */
static int64_t distance(struct pv_stream *stream, uint32_t prod, uint32_t cons, uint32_t size)
{
	if (prod - cons > size) {
		pv_store_relaxed(&stream->dead, 1);
		return -EPROTO;
	}
	return prod - cons;
}

int64_t pv_stream_readable(struct pv_stream *stream)
{
	int result = check_usable(stream);

	/* Acquire: the bytes before the index, stored with release by the peer's pv_stream_write. */
	return result ? result : distance(stream, pv_load_acquire(stream->in_prod), stream->read, stream->in_size);
}

int64_t pv_stream_writable(struct pv_stream *stream)
{
	int result = check_usable(stream);
	int64_t queued;

	if (result)
		return result;
	/* Acquire: licence to overwrite what the peer's pv_stream_read has copied out before its release. */
	queued = distance(stream, stream->written, pv_load_acquire(stream->out_cons), stream->out_size);
	return queued < 0 ? queued : stream->out_size - queued;
}

static int64_t notify(struct pv_stream *stream)
{
	if (!stream->port)
		return 0;
	return pv_notify(stream->port) == PV_NOTIFY_STALE ? (int64_t)PV_STREAM_STALE << 32 : 0;
}

int64_t pv_stream_read(struct pv_stream *stream, uint8_t *data, uint32_t n)
{
	int64_t available = pv_stream_readable(stream);
	uint32_t from, till_end;

	if (available <= 0 || n == 0)
		return available < 0 ? available : 0;
	if (n > available)
		n = (uint32_t)available;
	from = stream->read & (stream->in_size - 1);
	till_end = stream->in_size - from < n ? stream->in_size - from : n;
	memcpy(data, stream->in + from, till_end);
	memcpy(data + till_end, stream->in, n - till_end);
	pv_fence_compiler();
	stream->read += n;
	/* Release: the copy, before the peer may overwrite the bytes. */
	pv_store_release(stream->in_cons, stream->read);
	stream->bytes_read += n;
	stream->reads++;
	return n | notify(stream);
}

int64_t pv_stream_write(struct pv_stream *stream, const uint8_t *data, uint32_t n)
{
	int64_t room = pv_stream_writable(stream);
	uint32_t to, till_end;

	if (room <= 0 || n == 0)
		return room < 0 ? room : 0;
	if (n > room)
		n = (uint32_t)room;
	to = stream->written & (stream->out_size - 1);
	till_end = stream->out_size - to < n ? stream->out_size - to : n;
	memcpy(stream->out + to, data, till_end);
	memcpy(stream->out, data + till_end, n - till_end);
	stream->written += n;
	/* Release: the bytes. */
	pv_store_release(stream->out_prod, stream->written);
	stream->bytes_written += n;
	stream->writes++;
	return n | notify(stream);
}
