/* SPDX-License-Identifier: MIT */
/*
 * Both ends of rings at full speed, every byte of every message checked.
 *
 *   stress COUNT SEED [FENCE [PLACE [FRONT]]]
 *
 * FENCE: full, process or host. PLACE: "threads" of one process on one mapping, for the sanitizers: the memory is on the
 * heap with nothing behind the last entry, so that an overrun is seen, and mapped once, so that a race is; "mappings",
 * threads that have the memory mapped at different places; or "processes". FRONT: "two" threads, one that
 * pushes and one that takes, for every size below; or "one" that does both and seldom sleeps, for a very long run of blkif's.
 *
 * Every size runs COUNT requests from an index shortly before 2**32, in random batches, pushed at once, quietly or in
 * place, with random spins before sleeping and both wake-up policies; the front end of two threads pushes from one of its own.
 * Then, in threads, a byte stream does the same.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pv_event.h"
#include "pv_ring.h"
#include "pv_stream.h"

#define MAX_BATCH 70
#define MAX_BYTES 128
#define LOOKS_PER_WAIT 1000
#define TIMEOUT_NS ((int64_t)30 * 1000000000)

static struct end {
	struct pv_waiter waiter;
	struct pv_port port;
	struct pv_inbox *inbox;
	int bell[2];
} front_end, back_end;

static const struct {
	const char *name;
	uint32_t fence;
} fences[] = {{"full", PV_FENCE_FULL}, {"process", PV_FENCE_PROCESS}, {"host", PV_FENCE_HOST}};

static enum place { THREADS, MAPPINGS, PROCESSES } place;
static const char *const places[] = {"threads", "mappings", "processes"};

static struct pv_ring front, back;
static uint32_t count, request_bytes, response_bytes, seed, fence;
static int one_thread;

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

/* The n-th message of a direction is made of words that depend on n alone; the last one may be cut. */
static void fill(uint8_t *message, uint32_t bytes, uint32_t n)
{
	uint64_t word = (n + 1) * 0x9E3779B97F4A7C15u;
	uint32_t i = 0;

	for (; i + 8 <= bytes; i += 8, word += 0x0101010101010101u)
		memcpy(message + i, &word, 8);
	memcpy(message + i, &word, bytes - i);
}

static void check(const uint8_t *message, uint32_t bytes, uint32_t n)
{
	uint8_t right[MAX_BYTES];

	fill(right, bytes, n);
	CHECK(memcmp(message, right, bytes) == 0);
}

/* One of the three ways to push; how many went out. */
static uint32_t push(struct pv_ring *ring, const uint8_t *batch, uint32_t n, uint32_t *state)
{
	struct pv_ring_slots slots;
	int64_t pushed;

	switch (choose(state, 4)) {
	case 0:
		pushed = pv_ring_push_quiet(ring, batch, n);
		CHECK(pv_ring_notify(ring) == 0);
		break;
	case 1:
		CHECK(pv_ring_reserve(ring, n, &slots) == 0);
		for (uint32_t i = 0; i < slots.n; i++)
			memcpy(slots.first + i * ring->entry_bytes, batch + i * ring->out_bytes, ring->out_bytes);
		pushed = pv_ring_commit(ring, slots.n);
		break;
	default:
		pushed = pv_ring_push(ring, batch, n);
	}
	CHECK(pushed >= 0);
	return (uint32_t)pushed;
}

/* The next requests, at most `most` of them: how many went out. */
static uint32_t push_next(uint32_t sent, uint32_t most, uint32_t *state)
{
	uint8_t batch[MAX_BATCH * MAX_BYTES];
	uint32_t n = 1 + choose(state, MAX_BATCH);

	if (n > most)
		n = most;
	for (uint32_t i = 0; i < n; i++)
		fill(batch + i * request_bytes, request_bytes, sent + i);
	return n ? push(&front, batch, n, state) : 0;
}

/* The next responses, as many as there are: how many. */
static uint32_t take_next(uint32_t got, uint32_t *state)
{
	uint8_t batch[MAX_BATCH * MAX_BYTES];
	int64_t n = pv_ring_take(&front, batch, 1 + choose(state, MAX_BATCH));

	CHECK(n >= 0);
	for (uint32_t i = 0; i < n; i++)
		check(batch + i * response_bytes, response_bytes, got + i);
	return (uint32_t)n;
}

static void *push_requests(void *unused)
{
	uint32_t state = seed, sent = 0;

	while (sent < count) {
		uint32_t pushed = push_next(sent, count - sent, &state);

		sent += pushed;
		if (pushed == 0)
			sched_yield();
	}
	return NULL;
}

static void wait_for_work(struct pv_ring *ring, uint32_t *state)
{
	static const int64_t spins_ns[] = {0, 0, 500, 20000, PV_RING_LEARNT_NS};

	/* A run of minutes is to pass messages, not to sleep: look on most times. */
	if (one_thread && choose(state, LOOKS_PER_WAIT))
		return;
	if (ring == &front)
		CHECK(pv_ring_set_event_policy(ring, choose(state, 2) ? PV_EVENT_HALF : PV_EVENT_NEXT, 0, 0) == 0);
	CHECK(pv_ring_wait(ring, spins_ns[choose(state, 5)], TIMEOUT_NS) == PV_WAIT_EVENT);
}

static void *take_responses(void *unused)
{
	uint32_t state = seed + 1, got = 0;

	while (got < count) {
		uint32_t n = take_next(got, &state);

		got += n;
		if (n == 0)
			wait_for_work(&front, &state);
	}
	return NULL;
}

static void *push_and_take(void *unused)
{
	uint32_t state = seed, sent = 0, got = 0;

	while (got < count) {
		uint32_t room = pv_ring_room(&front), left = count - sent, n;

		sent += push_next(sent, left < room ? left : room, &state);
		n = take_next(got, &state);
		got += n;
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
		for (uint32_t sent = 0; sent < n;)
			sent += push(&back, answers + sent * response_bytes, (uint32_t)n - sent, &state);
	}
	return NULL;
}

static void *share(size_t bytes)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	CHECK(memory != MAP_FAILED);
	return memory;
}

/* What both processes need of an end. */
static void make_end(struct end *end)
{
	end->inbox = share(sizeof *end->inbox);
	pv_inbox_init(end->inbox);
	CHECK(pipe(end->bell) == 0);
}

/* What the process of that end needs. */
static void open_end(struct end *end, const struct end *peer)
{
	CHECK(pv_waiter_init(&end->waiter, NULL) == 0);
	CHECK(pv_waiter_add(&end->waiter, end->inbox, end->bell[0]) == 0);
	pv_port_init(&end->port, &end->waiter, end->inbox, 77);
	pv_port_set_peer(&end->port, peer->inbox, 77, peer->bell[1], 0);
}

static void close_end(struct end *end)
{
	CHECK(pv_waiter_remove(&end->waiter, end->inbox, end->bell[0]) == 0);
	pv_waiter_destroy(&end->waiter);
}

static void unmake_end(struct end *end)
{
	close(end->bell[0]);
	close(end->bell[1]);
	munmap(end->inbox, sizeof *end->inbox);
}

static void run(void *(*const bodies[])(void *), int n)
{
	pthread_t threads[3];

	for (int i = 0; i < n; i++)
		CHECK(pthread_create(&threads[i], NULL, bodies[i], NULL) == 0);
	for (int i = 0; i < n; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
}

static void run_front(void *(*back_body)(void *))
{
	if (one_thread)
		run((void *(*const[])(void *)){push_and_take, back_body}, back_body ? 2 : 1);
	else
		run((void *(*const[])(void *)){push_requests, take_responses, back_body}, back_body ? 3 : 2);
}

static void attach(void *memory, uint32_t pages, uint32_t entry)
{
	CHECK(pv_ring_attach(&back, memory, pages * 4096, entry, request_bytes, response_bytes, &back_end.port, 0) == 0);
	CHECK(pv_ring_set_fence(&back, fence) == 0 && back.fence == fence);
}

static void end_of(const struct pv_ring *ring)
{
	CHECK(ring->produced == count && ring->consumed == count);
	CHECK(pv_ring_outstanding(ring) == 0 && pv_ring_room(ring) == (ring->is_front ? ring->size : 0));
}

/* The back end in a process of its own; it has joined the ring when this returns. */
static pid_t start_back(void *memory, uint32_t pages, uint32_t entry)
{
	int ready[2];
	char byte = 0;
	pid_t pid;

	CHECK(pipe(ready) == 0);
	pid = fork();
	if (pid) {
		close(ready[1]);
		CHECK(pid > 0 && read(ready[0], &byte, 1) == 1);
		close(ready[0]);
		return pid;
	}
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	open_end(&back_end, &front_end);
	attach(memory, pages, entry);
	CHECK(write(ready[1], &byte, 1) == 1);
	run((void *(*const[])(void *)){serve}, 1);
	end_of(&back);
	_exit(0);
}

/* The memory of a ring, for both ends. In threads not a byte more than the entries: one past the last is an overrun. */
static void *ring_memory(uint32_t pages, uint32_t entry, uint8_t **for_back)
{
	uint32_t used = PV_RING_HEADER_BYTES + pv_ring_entries(pages * 4096, entry) * entry;
	uint8_t *memory;
	int fd;

	if (place == THREADS)
		return *for_back = aligned_alloc(8, (used + 7) / 8 * 8);
	fd = memfd_create("stress", 0);
	CHECK(fd >= 0 && ftruncate(fd, pages * 4096) == 0);
	memory = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	*for_back = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(memory != MAP_FAILED && *for_back != MAP_FAILED && memory != *for_back);
	close(fd);
	return memory;
}

static void run_ring(uint32_t pages, uint32_t request, uint32_t response)
{
	uint32_t entry = request > response ? request : response;
	uint8_t *for_back, *memory = ring_memory(pages, entry, &for_back);
	int status = 0;

	request_bytes = request;
	response_bytes = response;
	CHECK(pv_ring_create(&front, memory, pages * 4096, entry, request, response, &front_end.port, UINT32_MAX - 500) == 0);
	CHECK(pv_ring_set_fence(&front, fence) == 0 && front.fence == fence);
	if (place == PROCESSES) {
		pid_t pid = start_back(for_back, pages, entry);

		run_front(NULL);
		CHECK(waitpid(pid, &status, 0) == pid && status == 0);
	} else {
		attach(for_back, pages, entry);
		run_front(serve);
		end_of(&back);
	}
	end_of(&front);
	if (place == THREADS) {
		free(memory);
	} else {
		munmap(memory, pages * 4096);
		munmap(for_back, pages * 4096);
	}
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

static uint32_t find_place(const char *name)
{
	uint32_t i = 0;

	while (i < 3 && strcmp(places[i], name))
		i++;
	CHECK(i < 3);
	return i;
}

int main(int argc, char **argv)
{
	static const uint32_t sizes[][3] = {{4, 112, 16}, {1, 8, 8}, {2, 12, 4}, {1, 20, 128}, {1, 126, 126}, {16, 64, 64}};
	size_t n_sizes = sizeof sizes / sizeof *sizes;

	if (argc < 3)
		return 2;
	count = (uint32_t)atoi(argv[1]);
	seed = (uint32_t)atoi(argv[2]);
	for (size_t i = 0; argc > 3 && i < 3; i++)
		if (strcmp(fences[i].name, argv[3]) == 0)
			fence = fences[i].fence;
	if (argc > 5 && strcmp(argv[5], "one") == 0)
		one_thread = 1;
	place = argc > 4 ? (enum place)find_place(argv[4]) : THREADS;
	make_end(&front_end);
	make_end(&back_end);
	open_end(&front_end, &back_end);
	if (place != PROCESSES)
		open_end(&back_end, &front_end);
	for (size_t i = 0; i < (one_thread ? 1 : n_sizes); i++)
		run_ring(sizes[i][0], sizes[i][1], sizes[i][2]);
	if (place == THREADS)
		run_stream();
	close_end(&front_end);
	if (place != PROCESSES)
		close_end(&back_end);
	unmake_end(&front_end);
	unmake_end(&back_end);
	puts("ok");
	return 0;
}
