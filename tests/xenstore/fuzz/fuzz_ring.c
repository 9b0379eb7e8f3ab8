/* SPDX-License-Identifier: MIT */
/*
 * Fuzz target: guests that write their ring pages while the store reads them. Built with fuzz_ring_shim.h, which calls
 * `interrupt` at each access of a shared word.
 *
 * What must hold: nothing outside a page is touched, a bad guest is only ignored, and one that starts anew is served.
 */
#include "fuzz.h"
#include "pv_xs.h"

#define N_GUESTS 2
#define N_STEPS 100

#define REQ_CONS 512           /* as words of the page */
#define REQ_PROD 513
#define RSP_CONS 514
#define RSP_PROD 515
#define CONNECTION 517

enum step { ASK, ASK2, ASK3, TAKE, WORD, BYTES, RECONNECT, LOOK, POLL, POLL2, HOSTILE, SERVE, STOP, DOM0, DOM0_2, FEATURES,
	    FORGET, N_KINDS };

static struct world {
	struct pv_xs *hub;
	struct pv_xs_conn *dom0;
	uint32_t *pages[N_GUESTS];      /* each by itself on the heap: what is beside it is not to be touched */
	struct input input;
	uint32_t hostile;               /* loads that are preceded by a write of the guest */
} world;

static struct pv_port ports[N_GUESTS];

void interrupt(const void *word)
{
	for (int i = 0; world.hostile && i < N_GUESTS; i++) {
		uint32_t *page = world.pages[i];
		uint32_t how, at;

		if (!page || (const uint8_t *)word < (uint8_t *)page || (const uint8_t *)word >= (uint8_t *)page + 4096)
			continue;
		world.hostile--;
		how = take(&world.input, 1);
		at = how & 1 ? (uint32_t)((const uint32_t *)word - page) : REQ_CONS + (how >> 1 & 7);
		if (how & 16)
			page[at] += (how & 32 ? 1u : 0u) + take(&world.input, 1) - 128u * (how >> 6 & 1);
		else if (how & 8)
			page[at] = take(&world.input, how & 128 ? 4 : 2);
	}
}

static void poll_all(void)
{
	struct pv_xs_event events[64];
	struct pv_xs_request request;
	uint32_t domid;

	for (int i = 0; i < 8; i++) {
		pv_xs_poll(world.hub, 0, events, 64);
		if (pv_xs_unresolved(world.hub, &domid))
			pv_xs_resolve(world.hub, domid < 5);
		else if (pv_xs_parked(world.hub, &request))
			pv_xs_answer(world.hub, 1, (const uint8_t *)"EINVAL", 7);
	}
}

/* A request as a good guest writes it, as far as it has room. */
static void put_request(uint32_t *page, uint32_t op, const char *text, uint32_t n)
{
	uint32_t header[4] = { op, 7, 0, n }, at = page[REQ_PROD];
	uint8_t packet[16 + 256], *bytes = (uint8_t *)page;

	memcpy(packet, header, sizeof header);
	memcpy(packet + 16, text, n);
	for (uint32_t i = 0; i < 16 + n && at - page[REQ_CONS] < 1024; i++)
		bytes[at++ & 1023] = packet[i];
	page[REQ_PROD] = at;
}

static void ask(uint32_t *page)
{
	static const struct {
		uint32_t op;
		const char *text;
		uint32_t n;
	} requests[] = {
		{ 2, "/", 2 }, { 11, "x\0value", 7 }, { 1, "/", 2 }, { 4, "x\0token", 8 }, { 6, "", 1 }, { 13, "x", 2 }, { 12, "y/z", 4 },
		{ 21, "", 1 }, { 14, "x\0n1\0r3", 8 }, { 5, "x\0token", 8 }, { 9, "1", 2 }, { 4, "@releaseDomain\0t", 17 }, { 3, "x", 2 },
	};
	uint32_t which = take(&world.input, 1), n;
	char large[200];

	if (which < 200) {
		which %= sizeof requests / sizeof *requests;
		put_request(page, requests[which].op, requests[which].text, requests[which].n);
	} else {
		n = which - 200;
		memset(large, 'v', sizeof large);
		memcpy(large, "x", 2);
		put_request(page, 11, large, n * 3);
	}
}

/* A good guest takes replies. */
static void take_replies(uint32_t *page, uint32_t n)
{
	uint32_t there = page[RSP_PROD] - page[RSP_CONS];

	page[RSP_CONS] += n < there ? n : there;
}

static void serve(uint32_t guest, int how)
{
	struct pv_xs_conn *connection = pv_xs_ring_of(world.hub, guest + 1);

	if (!connection)
		connection = pv_xs_connect(world.hub, guest + 1);
	pv_xs_serve_ring(connection, world.pages[guest], &ports[guest], how);
}

static void forget(uint32_t guest)
{
	uint32_t domid = guest + 1;
	struct pv_xs_conn *connection = pv_xs_ring_of(world.hub, domid);

	if (connection)
		pv_xs_stop_ring(connection);
	pv_xs_forget(world.hub, &domid, 1);
	if (connection)
		pv_xs_conn_free(connection);
}

static void ask_as_dom0(uint32_t op, const char *text, uint32_t n)
{
	uint32_t header[4] = { op, 1, 0, n };
	uint8_t packet[64], reply[4112];

	memcpy(packet, header, sizeof header);
	memcpy(packet + 16, text, n);
	pv_xs_feed(world.dom0, packet, 16 + n);
	poll_all();
	must(pv_xs_n_output(world.dom0) >= 16);
	while ((n = pv_xs_output(world.dom0, reply, sizeof reply)))
		pv_xs_sent(world.dom0, n);
}

static void set_features(uint32_t guest, uint32_t features)
{
	struct pv_xs_domain domain = { .domid = guest + 1 };

	pv_xs_get_domain(world.hub, domain.domid, &domain);
	domain.features = features;
	pv_xs_set_domain(world.hub, &domain);
}

static void step(void)
{
	struct input *input = &world.input;
	enum step kind = take(input, 1) % N_KINDS;
	uint32_t guest = take(input, 1), at;
	size_t n;
	uint32_t *page = world.pages[guest &= 1];
	struct pv_xs_conn *connection = pv_xs_ring_of(world.hub, guest + 1);

	switch (kind) {
	case ASK: case ASK2: case ASK3: ask(page); break;
	case TAKE: take_replies(page, take(input, 2)); break;
	case WORD: at = REQ_CONS + take(input, 1) % 8; page[at] = take(input, 4); break;
	case BYTES: {
		const uint8_t *bytes;

		n = take(input, 1);
		at = take(input, 2) & 1023;
		bytes = take_bytes(input, &n);
		memcpy((uint8_t *)page + at, bytes, n);
		break;
	}
	case RECONNECT: page[CONNECTION] = 1; break;
	case LOOK: if (connection) pv_xs_ring_look(connection); break;
	case POLL: case POLL2:
		if (connection)
			pv_xs_ring_look(connection);
		poll_all();
		break;
	case HOSTILE: world.hostile = take(input, 1); break;
	case SERVE: serve(guest, (int)(take(input, 1) % 3)); break;
	case STOP: if (connection) pv_xs_stop_ring(connection); break;
	case DOM0: ask_as_dom0(11, "/local/domain/1/x\0v", 19); break;
	case DOM0_2: ask_as_dom0(14, "/local/domain/1\0b1", 19); break;
	case FEATURES: set_features(guest, take(input, 1) & 15); break;
	case FORGET: forget(guest); break;
	default: break;
	}
}

/* Whatever was before: a new domain gets its answer (an old one may have to wait, for its writes). */
static void check_service(uint32_t guest)
{
	uint32_t *page = world.pages[guest];

	forget(guest);
	memset(page, 0, 4096);
	serve(guest, PV_XS_RING_FRESH);
	put_request(page, 10, "1", 2);
	pv_xs_ring_look(pv_xs_ring_of(world.hub, guest + 1));
	poll_all();
	must(page[RSP_PROD] == 16 + sizeof "/local/domain/1");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	world.input = (struct input){ data, n };
	world.hostile = 0;
	world.hub = pv_xs_new(1);
	must(!pv_xs_loop_open(world.hub));
	world.dom0 = pv_xs_connect(world.hub, 0);
	ask_as_dom0(12, "/local/domain/1", 16);
	ask_as_dom0(14, "/local/domain/1\0b0", 19);
	for (uint32_t i = 0; i < N_GUESTS; i++) {
		world.pages[i] = calloc(1, 4096);
		serve(i, PV_XS_RING_FRESH);
	}
	for (int i = 0; i < N_STEPS && world.input.left; i++)
		step();
	world.hostile = 0;
	poll_all();
	must(!pv_xs_check(world.hub));
	for (uint32_t i = 0; i < N_GUESTS; i++) {
		check_service(i);
		forget(i);
	}
	ask_as_dom0(2, "/", 2);
	pv_xs_conn_free(world.dom0);
	must(!pv_xs_check(world.hub));
	pv_xs_free(world.hub);
	for (uint32_t i = 0; i < N_GUESTS; i++) {
		free(world.pages[i]);
		world.pages[i] = NULL;
	}
	return 0;
}
