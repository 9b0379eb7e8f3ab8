/* SPDX-License-Identifier: MIT */
/*
 * Both ends of rings as threads of one process, for the sanitizers: the memory is on the heap, so that an overrun is seen,
 * and mapped once, so that a race is.
 *
 *   stress COUNT SEED
 *
 * Every combination of entry sizes below runs COUNT requests from an index shortly before 2**32, in random batches, with
 * random spins before sleeping; the front end pushes from a thread of its own. Then a byte stream does the same.
 */
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pv_event.h"
#include "pv_ring.h"
#include "pv_stream.h"

#define MAX_BATCH 70
#define MAX_BYTES 128
#define TIMEOUT_NS ((int64_t)30 * 1000000000)

static struct end {
	struct pv_waiter waiter;
	struct pv_port port;
	struct pv_inbox *inbox;
	int bell[2];
} front_end, back_end;

static struct pv_ring front, back;
static uint32_t count, request_bytes, response_bytes, seed;

#define CHECK(condition)                                                                                       \
	do {                                                                                                   \
		if (!(condition)) {                                                                            \
			fprintf(stderr, "stress: line %d: " #condition "\n", __LINE__);                        \
			exit(1);                                                                               \
		}                                                                                              \
	} while (0)

static uint32_t choose(uint32_t *state, uint32_t below)
{
	*state = *state * 1664525u + 1013904223u;
	return (*state >> 8) % below;
}

/* The n-th message of a direction is made of bytes that depend on n alone. */
static void fill(uint8_t *message, uint32_t bytes, uint32_t n)
{
	for (uint32_t i = 0; i < bytes; i++)
		message[i] = (uint8_t)(n * 31 + i * 7 + (n >> 8));
}

static void check(const uint8_t *message, uint32_t bytes, uint32_t n)
{
	uint8_t right[MAX_BYTES];

	fill(right, bytes, n);
	CHECK(memcmp(message, right, bytes) == 0);
}

static void *push_requests(void *unused)
{
	uint8_t batch[MAX_BATCH * MAX_BYTES];
	uint32_t state = seed, sent = 0;

	while (sent < count) {
		uint32_t n = 1 + choose(&state, MAX_BATCH);
		int64_t pushed;

		if (n > count - sent)
			n = count - sent;
		for (uint32_t i = 0; i < n; i++)
			fill(batch + i * request_bytes, request_bytes, sent + i);
		pushed = pv_ring_push(&front, batch, n);
		CHECK(pushed >= 0);
		sent += (uint32_t)pushed;
		if (pushed == 0)
			sched_yield();
	}
	return NULL;
}

static void wait_for_work(struct pv_ring *ring, uint32_t *state)
{
	static const int64_t spins_ns[] = {0, 0, 500, 20000};

	CHECK(pv_ring_wait(ring, spins_ns[choose(state, 4)], TIMEOUT_NS) == PV_WAIT_EVENT);
}

static void *take_responses(void *unused)
{
	uint8_t batch[MAX_BATCH * MAX_BYTES];
	uint32_t state = seed + 1, got = 0;

	while (got < count) {
		int64_t n = pv_ring_take(&front, batch, 1 + choose(&state, MAX_BATCH));

		CHECK(n >= 0);
		for (uint32_t i = 0; i < n; i++)
			check(batch + i * response_bytes, response_bytes, got + i);
		got += (uint32_t)n;
		if (n == 0)
			wait_for_work(&front, &state);
	}
	return NULL;
}

static void *serve(void *unused)
{
	uint8_t taken[MAX_BATCH * MAX_BYTES], answers[MAX_BATCH * MAX_BYTES];
	uint32_t state = seed + 2, done = 0;

	while (done < count) {
		int64_t n = pv_ring_take(&back, taken, 1 + choose(&state, MAX_BATCH));

		CHECK(n >= 0);
		for (uint32_t i = 0; i < n; i++) {
			check(taken + i * request_bytes, request_bytes, done + i);
			fill(answers + i * response_bytes, response_bytes, done + i);
		}
		done += (uint32_t)n;
		if (n == 0)
			wait_for_work(&back, &state);
		else
			CHECK((uint32_t)pv_ring_push(&back, answers, (uint32_t)n) == n);
	}
	return NULL;
}

static void open_end(struct end *end)
{
	end->inbox = aligned_alloc(64, sizeof *end->inbox);
	memset(end->inbox, 0, sizeof *end->inbox);
	pv_inbox_init(end->inbox);
	CHECK(pipe(end->bell) == 0);
	CHECK(pv_waiter_init(&end->waiter, NULL) == 0);
	CHECK(pv_waiter_add(&end->waiter, end->inbox, end->bell[0]) == 0);
	pv_port_init(&end->port, &end->waiter, end->inbox, 77);
}

static void close_end(struct end *end)
{
	CHECK(pv_waiter_remove(&end->waiter, end->inbox, end->bell[0]) == 0);
	pv_waiter_destroy(&end->waiter);
	close(end->bell[0]);
	close(end->bell[1]);
	free(end->inbox);
}

static void run(void *(*const bodies[])(void *), int n)
{
	pthread_t threads[3];

	for (int i = 0; i < n; i++)
		CHECK(pthread_create(&threads[i], NULL, bodies[i], NULL) == 0);
	for (int i = 0; i < n; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
}

static void run_ring(uint32_t pages, uint32_t request, uint32_t response)
{
	uint32_t entry = request > response ? request : response;
	uint32_t used = PV_RING_HEADER_BYTES + pv_ring_entries(pages * 4096, entry) * entry;
	/* Not a byte more than the entries: one past the last is an overrun. */
	uint8_t *memory = aligned_alloc(8, (used + 7) / 8 * 8);

	request_bytes = request;
	response_bytes = response;
	CHECK(pv_ring_create(&front, memory, pages * 4096, entry, request, response, &front_end.port, UINT32_MAX - 500) == 0);
	CHECK(pv_ring_attach(&back, memory, pages * 4096, entry, request, response, &back_end.port, 0) == 0);
	run((void *(*const[])(void *)){push_requests, take_responses, serve}, 3);
	CHECK(front.produced == count && front.consumed == count && back.produced == count && back.consumed == count);
	CHECK(pv_ring_outstanding(&front) == 0 && pv_ring_room(&front) == front.size);
	free(memory);
}

static struct pv_stream near, far;

static void *write_stream(void *unused)
{
	uint8_t bytes[300];
	uint32_t state = seed, sent = 0;

	while (sent < count) {
		uint32_t n = 1 + choose(&state, sizeof bytes);
		int64_t moved;

		for (uint32_t i = 0; i < n; i++)
			bytes[i] = (uint8_t)((sent + i) * 13);
		moved = pv_stream_write(&near, bytes, n < count - sent ? n : count - sent);
		CHECK(moved >= 0);
		sent += (uint32_t)moved;
		if (moved == 0)
			CHECK(pv_wait(&front_end.waiter, &front_end.port, 0, TIMEOUT_NS) == PV_WAIT_EVENT);
	}
	return NULL;
}

static void *read_stream(void *unused)
{
	uint8_t bytes[300];
	uint32_t state = seed + 1, got = 0;

	while (got < count) {
		int64_t moved = pv_stream_read(&far, bytes, 1 + choose(&state, sizeof bytes));

		CHECK(moved >= 0);
		for (uint32_t i = 0; i < moved; i++)
			CHECK(bytes[i] == (uint8_t)((got + i) * 13));
		got += (uint32_t)moved;
		if (moved == 0 && got < count)
			CHECK(pv_wait(&back_end.waiter, &back_end.port, 0, TIMEOUT_NS) == PV_WAIT_EVENT);
	}
	return NULL;
}

static void run_stream(void)
{
	struct pv_stream_layout layout = {0, 1024, 2048, 2052, 1024, 1024, 2056, 2060};
	struct pv_stream_layout reversed = {1024, 1024, 2056, 2060, 0, 1024, 2048, 2052};
	uint32_t *page = aligned_alloc(8, 2064);

	memset(page, 0, 2064);
	page[512] = page[513] = UINT32_MAX - 300;
	CHECK(pv_stream_attach(&near, page, 2064, &layout, &front_end.port) == 0);
	CHECK(pv_stream_attach(&far, page, 2064, &reversed, &back_end.port) == 0);
	run((void *(*const[])(void *)){write_stream, read_stream}, 2);
	free(page);
}

int main(int argc, char **argv)
{
	static const uint32_t sizes[][3] = {{1, 112, 16}, {1, 8, 8}, {2, 12, 4}, {1, 20, 128}, {1, 126, 126}};

	if (argc != 3)
		return 2;
	count = (uint32_t)atoi(argv[1]);
	seed = (uint32_t)atoi(argv[2]);
	open_end(&front_end);
	open_end(&back_end);
	pv_port_set_peer(&front_end.port, back_end.inbox, 77, back_end.bell[1], 0);
	pv_port_set_peer(&back_end.port, front_end.inbox, 77, front_end.bell[1], 0);
	for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
		run_ring(sizes[i][0], sizes[i][1], sizes[i][2]);
	run_stream();
	close_end(&front_end);
	close_end(&back_end);
	puts("ok");
	return 0;
}
