/* SPDX-License-Identifier: MIT */
/*
 * Fuzz target: damaged journals and states of live updates. Whatever the bytes are: an error or a store whose books are
 * right, and memory in proportion to them.
 *
 * First byte: what the rest is. 0: a journal as it is. 1: the same, with right lengths and checksums of its frames put in
 * (the input says how long each is). 2: a state. 3: a journal of frames, then a state.
 */
#include <malloc.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fuzz.h"
#include "pv_xs.h"
#include "xs_journal.h"

#define BYTES_MAX (1 << 16)

/* A frame with the right header: how long it is. */
static size_t put_frame(uint8_t *at, const uint8_t *records, size_t n)
{
	struct frame_header header = { .n = (uint32_t)n, .crc = xs_crc(0, records, n) };

	header.n_crc = xs_crc(0, (const uint8_t *)&header.n, sizeof header.n);
	memcpy(at, &header, sizeof header);
	memcpy(at + sizeof header, records, n);
	return sizeof header + n;
}

/* A journal of frames, each with a byte of length before it. The first one ends the snapshot. */
static size_t make_journal(struct input *input, uint8_t *journal)
{
	static const uint8_t complete[] = { COMPLETE };
	uint32_t words[2] = { VERSION };
	size_t n = FILE_HEADER_BYTES;

	xs_crc_init();
	memcpy(journal, magic, sizeof magic);
	memcpy(journal + sizeof magic, words, 4);
	words[1] = xs_crc(0, journal, sizeof magic + 4);
	memcpy(journal + sizeof magic + 4, &words[1], 4);
	n += put_frame(journal + n, complete, sizeof complete);
	while (input->left && n < BYTES_MAX - 300) {
		size_t length = take(input, 1);
		const uint8_t *records;

		if (!length)
			break;
		records = take_bytes(input, &length);
		n += put_frame(journal + n, records, length);
	}
	return n;
}

/* Descriptors that a state names become sockets: those of this process are not the store's to close. */
static void plant_sockets(uint8_t *state, size_t n)
{
	size_t at = 16;

	while (n >= at + 32) {
		uint32_t head[8];
		int pair[2];

		memcpy(head, state + at, sizeof head);
		if ((int32_t)head[1] >= 0) {
			must(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair));
			close(pair[1]);
			head[1] = (uint32_t)pair[0];
		}
		memcpy(state + at, head, sizeof head);
		at += sizeof head;
		if (head[4] > n - at || head[5] > n - at - head[4])
			return;
		at += head[4] + head[5];
		for (uint32_t i = 0; i < head[6]; i++) {
			uint16_t lengths[2];

			if (n < at + 12)
				return;
			memcpy(lengths, state + at, sizeof lengths);
			at += 12u + lengths[0] + lengths[1];
		}
		if (head[7] > n)
			return;
		at += 4 * (size_t)head[7];
	}
}

/* Sockets that the load did not come to are still open; they are told from others by being there. */
static void close_sockets(void)
{
	for (int fd = 3; fd < 256; fd++) {
		int type;
		socklen_t n = sizeof type;

		if (!getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &n))
			close(fd);
	}
}

static size_t load_state(struct pv_xs *hub, struct input *input)
{
	size_t n = 65535;
	const uint8_t *data = take_bytes(input, &n);
	uint8_t *state = malloc(n + 16);
	struct pv_xs_event events[64];

	memcpy(state, "PVXSSTAT\1\0\0\0\7\0\0\0", 16);
	memcpy(state + 16, data, n);
	plant_sockets(state, n + 16);
	if (!pv_xs_state_load(hub, state, n + 16)) {
		must(!pv_xs_check(hub));
		pv_xs_poll(hub, 0, events, 64);
	}
	free(state);
	return n;
}

static void load_journal(struct pv_xs *hub, const uint8_t *data, size_t n)
{
	uint8_t *copy = malloc(n + !n); /* of just its size, so that an overrun is seen */
	uint64_t n_good;

	memcpy(copy, data, n);
	if (!pv_xs_journal_load(hub, copy, n, &n_good))
		must(n_good >= 16 && n_good <= n);
	else
		must(n_good <= n);
	free(copy);
	must(!pv_xs_check(hub));
}

/* What a store may do after a load, and the end of all its domains. */
static void use(struct pv_xs *hub)
{
	struct pv_xs_conn *connection = pv_xs_connect(hub, 0);
	static uint32_t domids[65536];
	uint32_t header[4] = { 13, 1, 0, 3 }, n;
	uint8_t packet[19];

	memcpy(packet, header, sizeof header);
	memcpy(packet + 16, "/a", 3);
	pv_xs_feed(connection, packet, sizeof packet);
	n = pv_xs_domains(hub, domids, 65536);
	must(n && domids[0] == 0);
	for (uint32_t i = 0; i < n; i++) {
		if (pv_xs_ring_of(hub, domids[i]))
			pv_xs_conn_free(pv_xs_ring_of(hub, domids[i]));
	}
	pv_xs_forget(hub, domids, n);
	must(!pv_xs_check(hub));
	pv_xs_conn_free(connection);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
	static uint8_t journal[BYTES_MAX];
	struct input input = { data, n };
	uint32_t what = take(&input, 1) & 3;
	struct pv_xs *hub = pv_xs_new(1);
	struct pv_xs_statistics statistics;

	must(!pv_xs_loop_open(hub));
	if (what == 0)
		load_journal(hub, input.at, input.left);
	if (what & 1)
		load_journal(hub, journal, make_journal(&input, journal));
	if (what & 2)
		load_state(hub, &input);
	pv_xs_get_statistics(hub, &statistics);
	must(statistics.memory_bytes <= 4096 + 64 * n);
	use(hub);
	pv_xs_free(hub);
	if (what & 2)
		close_sockets();
	return 0;
}
