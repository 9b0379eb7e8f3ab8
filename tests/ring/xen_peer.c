/* SPDX-License-Identifier: MIT */
/*
 * One end of a ring written with the macros of Xen's own header, the other end being under test.
 *
 *   xen_peer front|back COUNT START SEED PAGES MEMORY_FD RX_MEMORY_FD TX_MEMORY_FD RX_BELL_FD TX_BELL_FD
 *
 * front: makes the ring at index START, says "ready", waits for a line, sends COUNT requests in random batches and checks
 * every response. back: attaches at START, says "ready", answers COUNT requests, those of a batch in random order.
 * Both sleep by RING_FINAL_CHECK whenever there is nothing to do. Says "done NOTIFIED SLEEPS"; exits with 1 on a wrong byte.
 */
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "pv_event.h"

#define __XEN_INTERFACE_VERSION__ 0x00040d00 /* with barriers under their xen_ names */
#define xen_mb() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define xen_rmb() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define xen_wmb() __atomic_thread_fence(__ATOMIC_RELEASE)
#include <xen/io/ring.h>

#define WORDS 13
#define MAX_BATCH 100

struct test_request {
	uint64_t id;
	uint64_t words[WORDS];
};

struct test_response {
	uint64_t id;
	uint64_t sum;
};

DEFINE_RING_TYPES(test, struct test_request, struct test_response);

static struct pv_waiter waiter;
static struct pv_port port;
static uint64_t notified;
static uint64_t choose_state;

static void fail(const char *what, uint64_t got, uint64_t wanted)
{
	fprintf(stderr, "xen_peer: %s: %" PRIu64 ", not %" PRIu64 "\n", what, got, wanted);
	exit(1);
}

static uint32_t choose(uint32_t below)
{
	choose_state ^= choose_state << 13;
	choose_state ^= choose_state >> 7;
	choose_state ^= choose_state << 17;
	return (uint32_t)(choose_state >> 32) % below;
}

static uint64_t word_of(uint64_t id, unsigned int i)
{
	return id * 0x9E3779B97F4A7C15u + i;
}

static uint64_t sum_of(uint64_t id)
{
	uint64_t sum = 0;

	for (unsigned int i = 0; i < WORDS; i++)
		sum += word_of(id, i);
	return sum;
}

static void notify(int needed)
{
	if (!needed)
		return;
	notified++;
	pv_notify(&port);
}

static void sleep_for_event(void)
{
	int result = pv_wait(&waiter, &port, 0, (int64_t)60 * 1000000000);

	if (result != PV_WAIT_EVENT)
		fail("end of the wait", (uint64_t)result, PV_WAIT_EVENT);
}

static uint64_t send_requests(test_front_ring_t *ring, uint64_t sent, uint64_t count)
{
	uint32_t n = 1 + choose(MAX_BATCH);
	int needed;

	for (; n && sent < count && !RING_FULL(ring); n--, sent++) {
		struct test_request *request = RING_GET_REQUEST(ring, ring->req_prod_pvt++);

		request->id = sent;
		for (unsigned int i = 0; i < WORDS; i++)
			request->words[i] = word_of(sent, i);
	}
	RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(ring, needed);
	notify(needed);
	return sent;
}

static uint64_t take_responses(test_front_ring_t *ring, uint64_t got, uint8_t *answered)
{
	RING_IDX last = ring->sring->rsp_prod;

	xen_rmb();
	for (; ring->rsp_cons != last; ring->rsp_cons++, got++) {
		struct test_response response;

		RING_COPY_RESPONSE(ring, ring->rsp_cons, &response);
		if (answered[response.id]++)
			fail("responses to one request", answered[response.id], 1);
		if (response.sum != sum_of(response.id))
			fail("sum", response.sum, sum_of(response.id));
	}
	return got;
}

static void run_front(struct test_sring *shared, size_t bytes, uint64_t count, uint32_t start)
{
	uint8_t *answered = calloc(count, 1);
	test_front_ring_t ring;
	uint64_t sent = 0, got = 0;

	SHARED_RING_INIT(shared);
	shared->req_prod = shared->rsp_prod = start;
	shared->req_event = shared->rsp_event = start + 1;
	FRONT_RING_ATTACH(&ring, shared, start, bytes);
	puts("ready");
	fflush(stdout);
	if (getchar() == EOF)
		exit(1);
	while (got < count) {
		int more;

		sent = send_requests(&ring, sent, count);
		got = take_responses(&ring, got, answered);
		if (got == count || (sent < count && !RING_FULL(&ring)))
			continue;
		RING_FINAL_CHECK_FOR_RESPONSES(&ring, more);
		if (!more)
			sleep_for_event();
	}
	free(answered);
}

static uint32_t take_requests(test_back_ring_t *ring, struct test_response *answers)
{
	uint32_t n = 0, most = 1 + choose(MAX_BATCH);

	while (n < most && RING_HAS_UNCONSUMED_REQUESTS(ring)) {
		struct test_request request;

		xen_rmb();
		RING_COPY_REQUEST(ring, ring->req_cons, &request);
		ring->req_cons++;
		for (unsigned int i = 0; i < WORDS; i++)
			if (request.words[i] != word_of(request.id, i))
				fail("word", request.words[i], word_of(request.id, i));
		answers[n].id = request.id;
		answers[n++].sum = sum_of(request.id);
	}
	return n;
}

static void answer(test_back_ring_t *ring, struct test_response *answers, uint32_t n)
{
	int needed;

	for (; n; n--) {
		uint32_t i = choose(n);

		*RING_GET_RESPONSE(ring, ring->rsp_prod_pvt++) = answers[i];
		answers[i] = answers[n - 1];
	}
	RING_PUSH_RESPONSES_AND_CHECK_NOTIFY(ring, needed);
	notify(needed);
}

static void run_back(struct test_sring *shared, size_t bytes, uint64_t count, uint32_t start)
{
	struct test_response answers[MAX_BATCH];
	test_back_ring_t ring;
	uint64_t done = 0;

	BACK_RING_ATTACH(&ring, shared, start, bytes);
	puts("ready");
	fflush(stdout);
	while (done < count) {
		uint32_t n = take_requests(&ring, answers);
		int more;

		done += n;
		if (n) {
			answer(&ring, answers, n);
			continue;
		}
		RING_FINAL_CHECK_FOR_REQUESTS(&ring, more);
		if (!more)
			sleep_for_event();
	}
}

static void *map(const char *fd, size_t bytes)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(fd), 0);

	if (memory == MAP_FAILED)
		exit(2);
	return memory;
}

int main(int argc, char **argv)
{
	struct pv_inbox *inbox;
	uint64_t count;
	uint32_t start;
	size_t bytes;

	if (argc != 11)
		return 2;
	count = strtoull(argv[2], NULL, 10);
	start = (uint32_t)strtoul(argv[3], NULL, 10);
	choose_state = strtoull(argv[4], NULL, 10) * 2 + 1;
	bytes = (size_t)atoi(argv[5]) * 4096;
	inbox = map(argv[7], 4096);
	if (pv_waiter_init(&waiter, NULL) || pv_waiter_add(&waiter, inbox, atoi(argv[9])))
		return 2;
	pv_port_init(&port, &waiter, inbox, 0);
	pv_port_set_peer(&port, map(argv[8], 4096), 0, atoi(argv[10]), 0);
	(strcmp(argv[1], "front") ? run_back : run_front)(map(argv[6], bytes), bytes, count, start);
	printf("done %" PRIu64 " %" PRIu64 "\n", notified, waiter.sleeps);
	return 0;
}
