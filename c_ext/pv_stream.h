/* SPDX-License-Identifier: MIT */
/*
 * A pair of byte streams in one shared page: xenstore's ring and the console's.
 *
 * Each direction is a power of two of bytes with a producer and a consumer index that run freely over 32 bits; the four
 * indexes stand anywhere in the page (Xen public/io/xs_wire.h, console.h). There is no event index: an end notifies
 * after each read or write that moved bytes.
 *
 * Trust: the peer may write anything at any time; each of its indexes is read once a call and checked (-EPROTO, and the
 * stream is dead from then on). Bytes are copied out before anybody looks at them.
 *
 * Threads: one thread reads, one writes; they may be two. Fork: a child's calls get -ECHILD.
 */
#ifndef PV_STREAM_H
#define PV_STREAM_H

#include <stdint.h>

#include "pv_event.h"

/* Private: one end. */
struct pv_stream {
	uint8_t *out;               /* shared, out_size bytes */
	const uint8_t *in;          /* shared, in_size bytes */
	uint32_t *out_prod;         /* shared, written here */
	const uint32_t *out_cons;   /* shared, written by the peer */
	const uint32_t *in_prod;    /* shared, written by the peer */
	uint32_t *in_cons;          /* shared, written here */
	struct pv_port *port;       /* where to notify; NULL: nowhere */
	uint32_t out_size;          /* bytes, a power of two */
	uint32_t in_size;
	uint32_t home;              /* pv_home_mark */
	uint32_t dead;              /* 1: the peer broke the protocol */
	uint32_t written;           /* our out_prod */
	uint32_t read;              /* our in_cons */
	uint64_t bytes_written;
	uint64_t bytes_read;
	uint64_t writes;            /* that moved bytes */
	uint64_t reads;
};

/* Where one end finds things, as offsets in bytes from the start of the page. */
struct pv_stream_layout {
	uint32_t out;
	uint32_t out_size;
	uint32_t out_cons;
	uint32_t out_prod;
	uint32_t in;
	uint32_t in_size;
	uint32_t in_cons;
	uint32_t in_prod;
};

#define PV_STREAM_STALE 1   /* the peer was not notified: the port's binding changed (PV_NOTIFY_STALE) */

/*
 * Join at the indexes that stand in the page (zeroed memory is an empty stream). `page`: n_bytes, aligned to 4. A byte
 * stream, unlike a ring of requests, may be joined when it is not empty: what was written is read. 0; -EINVAL a layout that
 * does not fit; -EPROTO indexes that cannot be.
 */
int pv_stream_attach(struct pv_stream *stream, void *page, uint32_t n_bytes, const struct pv_stream_layout *layout,
		     struct pv_port *port);
/* Bytes that can be read or written now; -EPROTO dead; -ECHILD. */
int64_t pv_stream_readable(struct pv_stream *stream);
int64_t pv_stream_writable(struct pv_stream *stream);
/* Move up to n bytes: how many | PV_STREAM_* << 32; 0 when there are none or there is no room; -EPROTO dead; -ECHILD. */
int64_t pv_stream_read(struct pv_stream *stream, uint8_t *data, uint32_t n);
int64_t pv_stream_write(struct pv_stream *stream, const uint8_t *data, uint32_t n);

#endif
