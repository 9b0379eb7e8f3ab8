/* SPDX-License-Identifier: MIT */
/*
 * Fuzz target: both halves of a network device's queue, its control ring, offloads and the switch, against a peer that
 * rewrites shared memory before any load of it, and against frames of any content. The input is a list of steps, each a byte
 * and its arguments, and of what the peer writes.
 *
 * What must hold: nothing outside the buffers is touched (sanitizers; buffers are malloc'ed to size); frames lie in their
 * bursts; what waits for a guest is bounded; a queue that is given up stays so; no page stays pinned; a frame's checksum is
 * right once it was filled in, and its segments are what it was; verdicts name ports that there are.
 */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz_input.h"
#include "pv_grant.h"
#include "pv_netback.h"
#include "pv_netctrl.h"
#include "pv_netfront.h"
#include "pv_netgrefs.h"
#include "pv_netif.h"
#include "pv_offload.h"
#include "pv_ring.h"
#include "pv_switch.h"

#define PAGE 4096u
#define SLOTS 8u                 /* of each ring */
#define PAGES (2 * SLOTS)        /* of data: the first SLOTS to send from, the others to receive into */
#define BASE 8u
#define SELF 3
#define TX_AT 0u
#define RX_AT 512u
#define CTRL_AT 1024u
#define ENTRIES_AT 2048u
#define DATA_AT PAGE
#define RING_BYTES(entry) (PV_RING_HEADER_BYTES + SLOTS * (entry))
#define TX_ENTRY 12u
#define RX_ENTRY 8u
#define CTRL_ENTRY 16u
#define MOST_PORTS 6u

static int64_t now_ns;

static uint32_t *word_at(uint32_t at)
{
	return (uint32_t *)(void *)(shared + at);
}

/* The peer, as far as it keeps to the protocol: a message more in a ring; `index` is the place of its producer. */
static void publish(uint32_t ring_at, uint32_t entry_bytes, uint32_t index, const void *message, uint32_t n)
{
	uint32_t *producer = word_at(ring_at + index);

	memcpy(shared + ring_at + PV_RING_HEADER_BYTES + *producer % SLOTS * entry_bytes, message, n);
	++*producer;
}

/* ---- frames ---- */

static void put16(uint8_t *at, uint32_t value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

/* TCP or UDP over IPv4 or IPv6 behind up to two tags, as far as it fits, and then a few bytes of the input anywhere. */
static void make_frame(uint8_t *bytes, uint32_t n)
{
	uint8_t kind = byte(), header[14 + 8 + 40 + 20] = { 2, 0, 0, 0, 0, byte() % 4, 2, 0, 0, 0, 0, byte() % 4 };
	uint32_t at = 12, is_v6 = kind & 1, is_udp = kind >> 1 & 1, l4 = is_udp ? 8 : 20;

	for (uint32_t i = 0; i < (kind >> 2 & 3u) % 3; i++, at += 4) {
		put16(header + at, 0x8100);
		put16(header + at + 2, byte());
	}
	put16(header + at, is_v6 ? 0x86DD : 0x0800);
	at += 2;
	if (is_v6) {
		header[at] = 0x60;
		put16(header + at + 4, n > at + 40 ? n - at - 40 : 0);
		header[at + 6] = is_udp ? 17 : 6;
		at += 40;
	} else {
		header[at] = 0x45;
		put16(header + at + 2, n > at ? n - at : 0);
		header[at + 9] = is_udp ? 17 : 6;
		at += 20;
	}
	if (is_udp)
		put16(header + at + 4, n > at ? n - at : 0);
	else
		header[at + 12] = 0x50;
	at += l4;
	memset(bytes, kind, n);
	memcpy(bytes, header, at < n ? at : n);
	for (uint32_t i = byte() % 4; n && i; i--)
		bytes[byte() % (n < 96 ? n : 96)] = byte();
}

/* Lengths at which something changes, and any other. */
static uint32_t length(void)
{
	static const uint32_t some[] = { 0, 13, 14, 60, 64, 200, 1514, 4095, 4096, 4097, 9000, 20000 };
	uint32_t kind = byte();

	return kind % 16 < 12 ? some[kind % 16] : number() & 0x3FFF;
}

static struct pv_burst make_burst(uint32_t capacity, uint32_t max)
{
	return (struct pv_burst){ .memory = calloc(1, capacity + 1), .capacity = capacity,
				  .frames = calloc(max, sizeof(struct pv_frame)), .max = max };
}

static void free_burst(struct pv_burst *burst)
{
	free(burst->memory);
	free(burst->frames);
}

/* A few frames, with what may be said of them. */
static void fill_burst(struct pv_burst *burst)
{
	pv_burst_clear(burst);
	for (uint32_t i = 1 + byte() % 3; i; i--) {
		uint32_t n = length(), what = byte();
		struct pv_frame *frame = pv_burst_next(burst, n);

		if (!frame)
			return;
		frame->length = n;
		frame->flags = what & 15;
		frame->gso_type = what >> 4 & 3;
		frame->gso_size = frame->gso_type ? (uint16_t)number() : 0;
		make_frame(burst->memory + frame->offset, n);
		pv_burst_keep(burst, frame);
	}
}

static void check_burst(const struct pv_burst *burst)
{
	must(burst->n <= burst->max);
	for (uint32_t i = 0; i < burst->n; i++) {
		const struct pv_frame *frame = &burst->frames[i];

		must(frame->offset <= burst->capacity && frame->length <= burst->capacity - frame->offset);
		must(frame->length >= PV_NETIF_MIN_FRAME && frame->length <= PV_NETIF_MAX_FRAME);
	}
}

/* ---- the backend ---- */

static void check_well(int64_t result)
{
	must(result >= 0 || result == -EPROTO || result == -ENOMEM);
}

static void make_tx_request(void)
{
	struct pv_netif_tx_request request = { .gref = BASE + byte() % (PAGES + 1), .offset = (uint16_t)(byte() % 4 ? 0 : number()),
					       .flags = byte() & 15, .id = byte(), .size = (uint16_t)length() };

	publish(TX_AT, TX_ENTRY, 0, &request, sizeof(request));
}

static void make_extra(void)
{
	struct pv_netif_extra extra = { .type = byte() % 7, .flags = byte() & 1 };

	for (int i = 0; i < 6; i++)
		extra.content[i] = i ? byte() % 4 : 1;
	publish(TX_AT, TX_ENTRY, 0, &extra, sizeof(extra));
}

static struct pv_mapper make_mapper(struct pv_pin *pins, struct pv_pinned *pinned)
{
	struct pv_grant_entry *entries = (struct pv_grant_entry *)(void *)(shared + ENTRIES_AT);

	for (uint32_t i = 0; i < PAGES; i++)
		entries[i] = (struct pv_grant_entry){ i < SLOTS && byte() & 1 ? 5 : 1, SELF, BASE + i };
	return (struct pv_mapper){ .entries = entries, .data = shared + DATA_AT, .pins = pins, .pinned = pinned, .base = BASE,
				   .n_pages = PAGES, .self = SELF };
}

static void check_unpinned(const struct pv_mapper *mapper)
{
	must(mapper->pinned_pages == 0 && mapper->lock == 0);
	for (uint32_t i = 0; i < PAGES; i++)
		must(mapper->pins[i].readers == 0 && mapper->pins[i].writers == 0);
}

static void fuzz_netback(void)
{
	struct pv_pin pins[PAGES] = { 0 };
	struct pv_pinned pinned[PAGES] = { 0 };
	struct pv_mapper mapper = make_mapper(pins, pinned);
	struct pv_netback *back;
	struct pv_burst burst;
	struct pv_ring tx, rx;

	if (pv_ring_attach(&tx, shared + TX_AT, RING_BYTES(TX_ENTRY), TX_ENTRY, TX_ENTRY, 4, NULL, 0) ||
	    pv_ring_attach(&rx, shared + RX_AT, RING_BYTES(RX_ENTRY), RX_ENTRY, RX_ENTRY, RX_ENTRY, NULL, 0))
		return;
	back = malloc(sizeof(*back));
	burst = make_burst(byte() & 1 ? 200000 : 5000, 8);
	pv_netback_init(back, &tx, &rx, &mapper, byte());
	back->headroom = byte() % 4 ? 0 : number() % 2049;
	back->drain_ns = byte() % 2 ? 1000 : 0;
	back->stall_ns = byte() % 2 ? 5000 : 0;
	while (left) {
		uint32_t what = byte(), was_fatal = back->fatal;
		struct pv_netif_rx_request buffer = { .id = byte(), .gref = BASE + SLOTS + what / 16 % (SLOTS + 1) };
		int64_t result = 0;

		switch (what % 16) {
		case 0: case 1: case 2: case 3: make_tx_request(); break;
		case 4: make_extra(); break;
		case 5: case 6: publish(RX_AT, RX_ENTRY, 0, &buffer, sizeof(buffer)); break;
		case 7: case 8: case 9:
			pv_burst_clear(&burst);
			result = pv_netback_take(back, &burst, 1 + what / 16 % 8, now_ns);
			must(result <= burst.n);
			check_burst(&burst);
			must(!was_fatal || result == -EPROTO);
			break;
		case 10: case 11: case 12:
			fill_burst(&burst);
			result = pv_netback_send(back, burst.memory, burst.frames, burst.n, now_ns);
			break;
		case 13: result = pv_netback_deliver(back, now_ns); break;
		case 14: now_ns += number() % 8192; must(pv_netback_due(back) >= 0); break;
		default:
			switch (what / 16 % 4) {
			case 0: pv_netback_set_rate(back, number(), number()); break;
			case 1: pv_netback_filter(back, what >> 7); break;
			case 2: pv_netback_forget(back); must(!back->waiting_frames && !back->waiting_bytes); break;
			default: pv_netback_share_groups(back, back); break;
			}
		}
		check_well(result);
		check_unpinned(&mapper);
		must(back->waiting_bytes <= PV_NETBACK_WAITING_BYTES && !back->waiting_bytes == !back->waiting_frames);
		must(back->groups->n <= PV_NETBACK_MCAST && back->fatal <= PV_NETIF_FATAL_GSO_TYPE);
	}
	pv_netback_destroy(back);
	free_burst(&burst);
	free(back);
}

/* ---- the frontend ---- */

static void answer_tx(void)
{
	struct pv_netif_tx_response response = { .id = byte() % 10, .status = (int16_t)(byte() % 4 - 1) };

	publish(TX_AT, TX_ENTRY, 8, &response, sizeof(response));
}

static void answer_rx(void)
{
	struct pv_netif_rx_response response = { .id = byte() % 10, .offset = (uint16_t)(byte() % 4 ? 0 : number()),
						 .flags = byte() & 15, .status = (int16_t)length() };

	if (byte() % 4 == 1)
		memcpy(&response, &(struct pv_netif_extra){ .type = byte() % 6, .flags = byte() & 1, .content = { byte(), byte() } },
		       sizeof(response));
	publish(RX_AT, RX_ENTRY, 8, &response, sizeof(response));
}

static void fuzz_netfront(void)
{
	struct pv_burst burst = make_burst(byte() & 1 ? 200000 : 5000, 8);
	struct pv_netfront *front = malloc(sizeof(*front));
	struct pv_ring tx, rx;

	must(!pv_ring_create(&tx, shared + TX_AT, RING_BYTES(TX_ENTRY), TX_ENTRY, TX_ENTRY, 4, NULL, 0));
	must(!pv_ring_create(&rx, shared + RX_AT, RING_BYTES(RX_ENTRY), RX_ENTRY, RX_ENTRY, RX_ENTRY, NULL, 0));
	must(!pv_netfront_init(front, &tx, &rx, shared + DATA_AT, BASE, shared + DATA_AT + SLOTS * PAGE, BASE + SLOTS));
	front->features = byte();
	check_well(pv_netfront_post_all(front));
	while (left) {
		const uint8_t group[6] = { 1, 0, 0, 0, 0, byte() };
		uint32_t what = byte(), was_broken = front->tx_broken;
		int64_t result = 0;

		switch (what % 8) {
		case 0: case 1:
			fill_burst(&burst);
			result = pv_netfront_send(front, burst.memory, burst.frames, burst.n);
			must(result <= burst.n);
			break;
		case 2: case 3:
			pv_burst_clear(&burst);
			result = pv_netfront_take(front, &burst, 1 + what / 16 % 8);
			must(result <= burst.n);
			check_burst(&burst);
			break;
		case 4: result = pv_netfront_reap(front); break;
		case 5: result = pv_netfront_wish(front, 2 + (what >> 7), group); must(result <= 1); break;
		case 6: answer_tx(); break;
		default: answer_rx(); break;
		}
		check_well(result);
		must(!was_broken || front->tx_broken);
		must(front->n_free <= SLOTS && front->extras_out <= SLOTS && front->wishes_out <= SLOTS);
		must(front->n_responses <= PV_NETFRONT_TAKE && front->n_posts <= PV_NETFRONT_TAKE);
		if (!front->tx_broken)
			for (uint32_t i = 0, n = 0; i <= SLOTS; n += i < SLOTS && front->in_flight[i], i++)
				must(i < SLOTS || n + front->n_free == SLOTS);
	}
	pv_netfront_destroy(front);
	free_burst(&burst);
	free(front);
}

/* ---- the control ring ---- */

static void fuzz_control(void)
{
	struct pv_pin pins[PAGES] = { 0 };
	struct pv_pinned pinned[PAGES] = { 0 };
	struct pv_mapper mapper = make_mapper(pins, pinned);
	struct pv_nethash hash = { .n_queues = 1 + byte() % 4, .algorithm = byte() & 1, .flags = byte() & 15, .mapping_size = byte() % 3 };
	struct pv_ring ring;
	struct pv_netgrefs grefs;
	struct pv_netctrl ctrl = { .ring = &ring, .mapper = &mapper, .hash = &hash, .grefs = &grefs };

	if (pv_ring_attach(&ring, shared + CTRL_AT, RING_BYTES(CTRL_ENTRY), CTRL_ENTRY, CTRL_ENTRY, 12, NULL, 0))
		return;
	pv_netgrefs_init(&grefs, &mapper, hash.n_queues);
	while (left) {
		struct pv_netctrl_request request = { .id = byte(), .type = byte() % 12, .data = { number(), number(), number() } };
		uint32_t n = length();
		uint8_t *bytes = malloc(n + 1);
		struct pv_frame frame = { .length = n };

		if (byte() % 4) {
			request.data[0] = request.type == PV_NETCTRL_SET_HASH_KEY || request.type == PV_NETCTRL_SET_MAPPING ?
						  BASE + byte() % PAGES : byte() % 4;
			request.data[1] = request.type > 8 ? BASE + byte() % PAGES : byte() % 3;
			request.data[2] = byte() % (request.type > 8 ? 8 : 2);
		}
		/* A list of references, where it may look for one. */
		if (byte() & 1)
			for (uint32_t i = 0; i < 4; i++)
				*(struct pv_netgref *)(void *)(shared + DATA_AT + byte() % PAGES * PAGE + 8 * i) =
					(struct pv_netgref){ BASE + byte() % PAGES, byte() & 1, 0 };
		publish(CTRL_AT, CTRL_ENTRY, 0, &request, sizeof(request));
		check_well(pv_netctrl_serve(&ctrl));
		make_frame(bytes, n);
		pv_nethash_of(&hash, bytes, &frame);
		must(pv_nethash_queue(&hash, &frame) < hash.n_queues);
		must(hash.mapping_size <= PV_NETHASH_MAPPING && mapper.lock == 0 && mapper.pinned_pages <= PAGES);
		for (uint32_t i = 0; i < PV_NETGREFS_QUEUES; i++)
			must(grefs.n[i] <= PV_NETGREFS_MAX && (i < hash.n_queues || !grefs.n[i]));
		free(bytes);
	}
	pv_netgrefs_destroy(&grefs);
	check_unpinned(&mapper);
}

/* ---- offloads ---- */

static void check_segments(const uint8_t *bytes, const struct pv_l4 *whole, uint32_t size)
{
	uint32_t n = pv_offload_segments(whole, size), sent = 0;
	uint8_t *out;

	if (!n || n > 64)
		return;
	out = malloc(whole->payload + size);
	for (uint32_t i = 0; i < n; i++) {
		uint32_t n_bytes = pv_offload_segment(bytes, whole, size, i, out);
		struct pv_l4 l4;

		must(n_bytes <= whole->payload + size && n_bytes >= whole->payload);
		must(pv_offload_look(out, n_bytes, &l4) && pv_offload_is_right(out, &l4) && l4.payload == whole->payload);
		must(!memcmp(out + l4.payload, bytes + whole->payload + sent, n_bytes - l4.payload));
		sent += n_bytes - l4.payload;
	}
	must(sent == whole->end - whole->payload);
	free(out);
}

static void fuzz_offload(void)
{
	while (left) {
		uint32_t n = length();
		uint8_t *bytes = malloc(n + !n);
		struct pv_frame frame = { .length = n, .flags = byte() & 3, .gso_type = byte() % 4, .gso_size = (uint16_t)number() };
		struct pv_l4 l4;

		make_frame(bytes, n);
		pv_offload_flow(bytes, n);
		if (pv_offload_look(bytes, n, &l4)) {
			must(l4.l3 < l4.l4 && l4.l4 < l4.checksum && l4.checksum + 2 <= l4.payload && l4.payload <= l4.end && l4.end <= n);
			check_segments(bytes, &l4, number() % 9000);
			pv_offload_prepare(bytes, &l4);
			pv_offload_finish(bytes, &l4);
			must(pv_offload_is_right(bytes, &l4));
		}
		pv_offload_fits(bytes, &frame);
		free(bytes);
	}
}

/* ---- the switch ---- */

static int is_port(const struct pv_switch *sw, uint32_t port)
{
	struct pv_switch_statistics statistics;

	return !pv_switch_statistics(sw, port, &statistics);
}

static void check_verdict(const struct pv_switch *sw, uint32_t from, const struct pv_switch_verdict *verdict)
{
	must(verdict->kind <= PV_SWITCH_FLOOD && verdict->n_ports <= MOST_PORTS);
	must(verdict->kind != PV_SWITCH_DROP || (verdict->n_ports == 0 && verdict->reason < PV_SWITCH_DROPS));
	must(verdict->kind != PV_SWITCH_UNICAST || verdict->n_ports == 1);
	must(verdict->mirror == PV_SWITCH_NO_PORT || is_port(sw, (uint32_t)verdict->mirror));
	for (uint32_t i = 0; i < verdict->n_ports; i++) {
		must(verdict->ports[i].port != from && is_port(sw, verdict->ports[i].port));
		must(verdict->ports[i].tag <= PV_SWITCH_TAG_SET);
		must(!i || verdict->ports[i].port > verdict->ports[i - 1].port);
	}
}

static void configure(struct pv_switch *sw, uint32_t what, uint32_t port)
{
	struct pv_switch_locking locking = { .mode = byte() % 4, .n_ipv4 = byte() % 18, .n_ipv6 = byte() % 18, .mac = { 2, [5] = byte() % 4 } };
	uint8_t vids[PV_SWITCH_MAP_BYTES] = { byte(), byte() }, group[6] = { 1, 0, 0, 0, 0, byte() % 4 };

	switch (what) {
	case 0:
		if (sw->n_ports < MOST_PORTS)
			must(pv_switch_add_port(sw) >= 0);
		break;
	case 1: pv_switch_remove_port(sw, port); break;
	case 2: pv_switch_set_access(sw, port, byte() % 4 ? byte() : number()); break;
	case 3: pv_switch_set_trunk(sw, port, byte() & 1 ? vids : NULL, byte() - 1); break;
	case 4: pv_switch_set_limit(sw, port, byte() % 4, byte(), byte()); break;
	case 5: pv_switch_set_locking(sw, port, &locking); break;
	case 6: pv_switch_set_multicast_filter(sw, port, byte() & 1); break;
	case 7: pv_switch_mcast_add(sw, port, group); break;
	case 8: pv_switch_mcast_del(sw, port, group); break;
	case 9: pv_switch_set_mirror(sw, (int32_t)port - 1); break;
	case 10: pv_switch_set_mirrored(sw, port, byte() & 1); break;
	case 11: pv_switch_set_address_limit(sw, port, byte() % 4); break;
	case 12: pv_switch_set_ageing(sw, (int64_t)number() - 1); break;
	case 13: pv_switch_age(sw, now_ns); break;
	case 14: pv_switch_forget(sw, port); break;
	default: now_ns += number(); break;
	}
}

static void fuzz_switch(void)
{
	struct pv_switch sw;
	struct pv_switch_address addresses[8];

	must(!pv_switch_init(&sw, 8, 1 + byte()));
	must(pv_switch_add_port(&sw) == 0 && pv_switch_add_port(&sw) == 1);
	while (left) {
		static struct pv_switch_verdict verdict;
		uint32_t what = byte(), port = byte() % (MOST_PORTS + 1), n = what & 2 ? 64 : 14 + what / 4, listed;
		uint8_t *header;

		if (what & 1) {
			configure(&sw, what / 2 % 16, port);
		} else {
			header = malloc(n);
			make_frame(header, n);
			must(pv_switch_forward(&sw, port, header, n, n + byte(), now_ns, &verdict) == verdict.kind);
			check_verdict(&sw, port, &verdict);
			free(header);
		}
		listed = pv_switch_list(&sw, addresses, 8, now_ns);
		must(sw.n_addresses <= 8 && listed <= sw.n_addresses);
		for (uint32_t i = 0; i < listed; i++)
			must(is_port(&sw, addresses[i].port) && pv_switch_find(&sw, addresses[i].mac, addresses[i].vid, now_ns) >= 0);
	}
	pv_switch_destroy(&sw);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	static void (*const targets[])(void) = { fuzz_netback, fuzz_netfront, fuzz_control, fuzz_offload, fuzz_switch };

	begin(data, n, DATA_AT + PAGES * PAGE);
	now_ns = 1;
	targets[byte() % (sizeof targets / sizeof *targets)]();
	free(shared);
	return 0;
}
