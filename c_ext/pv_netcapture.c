/* SPDX-License-Identifier: MIT */
/* Packets as they pass legs, into a ring of bytes that a file is made of. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "netloop_private.h"
#include "pv_atomic.h"
#include "pv_netcapture.h"
#include "pv_offload.h"

#define NS_PER_S 1000000000
#define PACKET_BLOCK 6u
#define OPTION_FLAGS 2u
#define OPTION_DROPPED 4u
#define FIRST_INDEX 0xFFFF0000u    /* so that indexes wrap soon and not after 4 GiB */

struct interface {
	uint64_t seen;
	uint64_t dropped;
	uint64_t untold;           /* of these, since the last packet that was kept */
};

struct pv_netcapture {
	uint8_t *ring;
	uint32_t size;
	uint32_t head;             /* bytes that were written: moved by the loop, a whole packet at a time */
	uint32_t tail;             /* bytes that were read */
	uint32_t asleep;           /* the reader wants to be woken */
	uint32_t finished;
	int fd;
	uint32_t snaplen;
	uint32_t format;
	uint64_t most;             /* that are still to be kept; with is_limited */
	uint32_t is_limited;
	uint32_t n_interfaces;
	struct interface *interfaces;
	uint64_t last_ns;
};

/* One capture of one leg. */
struct pv_nettap {
	struct pv_nettap *next;
	struct pv_netcapture *capture;
	uint32_t interface;
	uint32_t directions;
};

/* What stands before the bytes of a packet. */
struct packet_head {
	uint32_t kind;
	uint32_t n_bytes;
	uint32_t interface;
	uint32_t time_high;
	uint32_t time_low;
	uint32_t captured;
	uint32_t length;
};

struct plain_head {
	uint32_t time_s;
	uint32_t time_ns;
	uint32_t captured;
	uint32_t length;
};

int pv_netcapture_new(uint32_t ring_bytes, uint32_t snaplen, uint32_t format, uint64_t most, struct pv_netcapture **made)
{
	struct pv_netcapture *capture;

	if (ring_bytes < PV_NETCAPTURE_MIN_BYTES || ring_bytes > PV_NETCAPTURE_MAX_BYTES || ring_bytes & (ring_bytes - 1) ||
	    format > PV_NETCAPTURE_PCAP)
		return -EINVAL;
	capture = calloc(1, sizeof(*capture));
	if (!capture)
		return -ENOMEM;
	capture->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	capture->ring = malloc(ring_bytes);
	if (capture->fd < 0 || !capture->ring) {
		int error = capture->fd < 0 ? -errno : -ENOMEM;

		pv_netcapture_free(capture);
		return error;
	}
	capture->size = ring_bytes;
	capture->head = capture->tail = FIRST_INDEX;
	capture->snaplen = snaplen && snaplen < PV_NETIF_MAX_FRAME ? snaplen : PV_NETIF_MAX_FRAME;
	capture->format = format;
	capture->most = most;
	capture->is_limited = most != 0;
	*made = capture;
	return 0;
}

void pv_netcapture_free(struct pv_netcapture *capture)
{
	if (capture->fd >= 0)
		close(capture->fd);
	free(capture->ring);
	free(capture->interfaces);
	free(capture);
}

/* ---- with the loop entered ---- */

int pv_netcapture_add_interface(struct pv_netcapture *capture)
{
	struct interface *interfaces = realloc(capture->interfaces, (capture->n_interfaces + 1) * sizeof(*interfaces));

	if (!interfaces)
		return -ENOMEM;
	capture->interfaces = interfaces;
	interfaces[capture->n_interfaces] = (struct interface){ .seen = 0 };
	return (int)capture->n_interfaces++;
}

int pv_netcapture_attach(struct pv_netcapture *capture, struct pv_netleg *leg, uint32_t interface, uint32_t directions)
{
	struct pv_nettap *tap;

	if (interface >= capture->n_interfaces || !directions || directions > PV_NETCAPTURE_BOTH || !leg->loop)
		return -EINVAL;
	tap = malloc(sizeof(*tap));
	if (!tap)
		return -ENOMEM;
	*tap = (struct pv_nettap){ leg->taps, capture, interface, directions };
	leg->taps = tap;
	return 0;
}

void pv_netcapture_detach(struct pv_netcapture *capture, struct pv_netleg *leg)
{
	struct pv_nettap **at = &leg->taps;

	while (*at) {
		struct pv_nettap *tap = *at;

		if (tap->capture == capture) {
			*at = tap->next;
			free(tap);
		} else {
			at = &tap->next;
		}
	}
}

void netcapture_forget(struct pv_netleg *leg)
{
	while (leg->taps) {
		struct pv_nettap *tap = leg->taps;

		leg->taps = tap->next;
		free(tap);
	}
}

static uint32_t free_bytes(struct pv_netcapture *capture)
{
	return capture->size - (capture->head - pv_load_acquire(&capture->tail));
}

static uint32_t copy_in(struct pv_netcapture *capture, uint32_t at, const void *bytes, uint32_t n)
{
	uint32_t start = at & (capture->size - 1), first = capture->size - start < n ? capture->size - start : n;

	memcpy(capture->ring + start, bytes, first);
	memcpy(capture->ring, (const uint8_t *)bytes + first, n - first);
	return at + n;
}

static void rouse_reader(struct pv_netcapture *capture)
{
	uint64_t one = 1;

	if (!pv_exchange(&capture->asleep, 0))
		return;
	/* It may be full: then it is readable. */
	while (write(capture->fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

static void publish(struct pv_netcapture *capture, uint32_t head)
{
	if (head == capture->head)
		return;
	pv_store_release(&capture->head, head);
	rouse_reader(capture);
}

int pv_netcapture_put(struct pv_netcapture *capture, const uint8_t *bytes, uint32_t n)
{
	if (n > free_bytes(capture))
		return -ENOSPC;
	publish(capture, copy_in(capture, capture->head, bytes, n));
	return 0;
}

int pv_netcapture_count(const struct pv_netcapture *capture, uint32_t interface, uint64_t *seen, uint64_t *dropped)
{
	if (interface >= capture->n_interfaces)
		return -EINVAL;
	*seen = capture->interfaces[interface].seen;
	*dropped = capture->interfaces[interface].dropped;
	return 0;
}

void pv_netcapture_finish(struct pv_netcapture *capture)
{
	pv_store_release(&capture->finished, 1);
	rouse_reader(capture);
}

/* ---- packets ---- */

static uint64_t time_now(struct pv_netcapture *capture)
{
	struct timespec now;
	uint64_t ns;

	clock_gettime(CLOCK_REALTIME, &now);
	ns = (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
	/* The clock may be set back; packets of a file do not go back. */
	if (ns > capture->last_ns)
		capture->last_ns = ns;
	return capture->last_ns;
}

/* The packet's bytes; a checksum that is to be filled in is right in this copy alone. */
static uint32_t copy_frame(struct pv_netcapture *capture, uint32_t at, uint8_t *bytes, const struct pv_frame *frame, uint32_t n)
{
	struct pv_l4 l4;
	uint8_t before[2];

	if (!(frame->flags & PV_FRAME_CSUM_BLANK) || frame->gso_type || !pv_offload_look(bytes, frame->length, &l4))
		return copy_in(capture, at, bytes, n);
	memcpy(before, bytes + l4.checksum, sizeof(before));
	pv_offload_finish(bytes, &l4);
	at = copy_in(capture, at, bytes, n);
	memcpy(bytes + l4.checksum, before, sizeof(before));
	return at;
}

static uint32_t keep_block(struct pv_netcapture *capture, uint32_t at, uint32_t number, uint32_t direction, uint8_t *bytes,
			   const struct pv_frame *frame, uint32_t n, uint64_t now)
{
	struct interface *interface = &capture->interfaces[number];
	uint32_t padding = -n & 3u, told = interface->untold ? 3 : 0;
	uint32_t n_bytes = (uint32_t)sizeof(struct packet_head) + n + padding + 4 * (told + 4);
	struct packet_head head = { PACKET_BLOCK, n_bytes, number, (uint32_t)(now >> 32), (uint32_t)now, n, frame->length };
	uint32_t words[7] = { 4u << 16 | OPTION_FLAGS, direction };
	uint32_t i = 2;

	if (told) {
		words[i++] = 8u << 16 | OPTION_DROPPED;
		words[i++] = (uint32_t)interface->untold;
		words[i++] = (uint32_t)(interface->untold >> 32);
	}
	words[i++] = 0;
	words[i++] = n_bytes;
	at = copy_in(capture, at, &head, sizeof(head));
	at = copy_frame(capture, at, bytes, frame, n);
	at = copy_in(capture, at, "\0\0\0", padding);
	return copy_in(capture, at, words, 4 * i);
}

static uint32_t keep_plain(struct pv_netcapture *capture, uint32_t at, uint8_t *bytes, const struct pv_frame *frame, uint32_t n,
			   uint64_t now)
{
	struct plain_head head = { (uint32_t)(now / NS_PER_S), (uint32_t)(now % NS_PER_S), n, frame->length };

	at = copy_in(capture, at, &head, sizeof(head));
	return copy_frame(capture, at, bytes, frame, n);
}

/* What a block has beside its packet, at most. */
#define BLOCK_BYTES ((uint32_t)sizeof(struct packet_head) + 32u)

static void keep(struct pv_nettap *tap, uint32_t direction, uint8_t *memory, const struct pv_frame *frames, uint32_t n)
{
	struct pv_netcapture *capture = tap->capture;
	struct interface *interface = &capture->interfaces[tap->interface];
	uint32_t at = capture->head, room = free_bytes(capture);
	uint64_t now = time_now(capture);
	uint32_t i;

	for (i = 0; i < n && !capture->finished; i++) {
		uint32_t kept = frames[i].length < capture->snaplen ? frames[i].length : capture->snaplen;
		uint8_t *bytes = memory + frames[i].offset;

		interface->seen++;
		if (room - (at - capture->head) < kept + BLOCK_BYTES + PV_NETCAPTURE_RESERVE) {
			interface->dropped++;
			interface->untold++;
			continue;
		}
		if (capture->format == PV_NETCAPTURE_PCAP)
			at = keep_plain(capture, at, bytes, &frames[i], kept, now);
		else
			at = keep_block(capture, at, tap->interface, direction, bytes, &frames[i], kept, now);
		interface->untold = 0;
		if (capture->is_limited && !--capture->most)
			break;
	}
	publish(capture, at);
	if (capture->is_limited && !capture->most && !capture->finished)
		pv_netcapture_finish(capture);
}

void netcapture_take(struct pv_netleg *leg, uint32_t direction, uint8_t *memory, const struct pv_frame *frames, uint32_t n)
{
	for (struct pv_nettap *tap = leg->taps; tap; tap = tap->next)
		if (tap->directions & direction && !tap->capture->finished)
			keep(tap, direction, memory, frames, n);
}

/* ---- the reader ---- */

uint32_t pv_netcapture_read(struct pv_netcapture *capture, uint8_t *bytes, uint32_t room)
{
	uint32_t tail = capture->tail, n = pv_load_acquire(&capture->head) - tail, start = tail & (capture->size - 1), first;

	if (n > room)
		n = room;
	first = capture->size - start < n ? capture->size - start : n;
	memcpy(bytes, capture->ring + start, first);
	memcpy(bytes + first, capture->ring, n - first);
	pv_store_release(&capture->tail, tail + n);
	return n;
}

int pv_netcapture_is_over(struct pv_netcapture *capture)
{
	/* In this order: what was kept before the end is seen with it. */
	return pv_load_acquire(&capture->finished) && pv_load_acquire(&capture->head) == capture->tail;
}

int pv_netcapture_sleep(struct pv_netcapture *capture)
{
	pv_exchange(&capture->asleep, 1);
	if (!pv_load_ordered(&capture->finished) && pv_load_ordered(&capture->head) == capture->tail)
		return 1;
	pv_exchange(&capture->asleep, 0);
	return 0;
}

void pv_netcapture_awake(struct pv_netcapture *capture)
{
	uint64_t count;

	pv_exchange(&capture->asleep, 0);
	while (read(capture->fd, &count, sizeof(count)) < 0 && errno == EINTR)
		;
}

int pv_netcapture_fd(const struct pv_netcapture *capture)
{
	return capture->fd;
}
