/* SPDX-License-Identifier: MIT */
/*
 * What the measured programs in C share: two pinned ends, three ways to drive them, one line of JSON.
 *
 *   PROGRAM MODE CPU CPU SECONDS BATCH REQUEST_BYTES RESPONSE_BYTES SLOTS IN_FLIGHT [verify]
 *
 * MODE: "echo", pairs of request and response, at most IN_FLIGHT requests without a response; "oneway", requests alone;
 * "pingpong", one batch alone and back. With "verify" all bytes of all messages are compared on arrival (exit code 4).
 *
 * The sizes of messages and of the ring are the compiler's to know, as in a driver: -DREQUEST_BYTES=, -DRESPONSE_BYTES=,
 * -DSLOTS=. With -DTHREADS=1 the ends are two threads, otherwise two processes.
 *
 * A program is this header and what is declared in "What a peer is" below. Front sends requests, back responses.
 */
#ifndef PEER_H
#define PEER_H

#include "pinned.h"

#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef THREADS
#define THREADS 0
#endif
#define ROUNDS_PER_CLOCK_READ 256
#define HISTOGRAM_NS 1000000
#define INLINE static inline __attribute__((always_inline))

/* Force the whole copy of a message, or of all: the compiler was seen to leave out parts that nobody reads. */
#define FORCE(message) __asm__ volatile("" : : "m"(message))
#define FORCE_ALL(messages) __asm__ volatile("" : : "r"(messages) : "memory")

struct request {
	uint8_t bytes[REQUEST_BYTES];
};

struct response {
	uint8_t bytes[RESPONSE_BYTES];
};

/* What a peer is. An end is private to its process or thread; `peer_bytes` of zeroed memory is shared. */
struct end;
static size_t peer_bytes(void);
static void peer_prepare(void *memory);                     /* once, before there are two ends */
static struct end *peer_open(void *memory, int is_front);   /* the front first; its messages are to be taken by the other */
INLINE uint32_t send_requests(struct end *end, const struct request *requests, uint32_t n);
INLINE uint32_t take_requests(struct end *end, struct request *requests, uint32_t n);
INLINE uint32_t send_responses(struct end *end, const struct response *responses, uint32_t n);
INLINE uint32_t take_responses(struct end *end, struct response *responses, uint32_t n);
INLINE void pause_empty(struct end *end);                   /* nothing was there to take, or no room */
/* One way, where it takes responses to hand slots back: n requests were taken; how many slots have come back. */
INLINE void hand_back(struct end *end, uint32_t n);
INLINE uint32_t make_room(struct end *end);

/* Shared by both ends. */
static struct control {
	uint32_t ready;
	uint32_t pad0[31];
	uint32_t stop;
	uint32_t wrong;
	uint64_t sent;          /* one way: requests in all, before `stop` */
} *control;

static uint32_t batch, in_flight;
static int64_t length_ns;
static int verify;
static void *memory;
static int cpus[2];
static uint32_t histogram[HISTOGRAM_NS + 1];
static struct request *front_requests, *back_requests;
static struct response *front_responses, *back_responses;

#define load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)

/* Message number `first` and the n - 1 after it, so that no two near each other and no two places in one are alike. */
static void fill(void *messages, uint32_t bytes, uint64_t first, uint32_t n)
{
	uint8_t *byte = (uint8_t *)messages;

	for (uint32_t i = 0; i < n; i++)
		for (uint32_t place = 0; place < bytes; place++)
			*byte++ = (uint8_t)((first + i) * 31 + place);
}

static void compare(const void *messages, uint32_t bytes, uint64_t first, uint32_t n)
{
	const uint8_t *byte = (const uint8_t *)messages;

	for (uint32_t i = 0; i < n; i++)
		for (uint32_t place = 0; place < bytes; place++)
			if (*byte++ != (uint8_t)((first + i) * 31 + place))
				store_release(&control->wrong, 1);
}

static uint64_t echo_front(struct end *end, int64_t *took_ns)
{
	int64_t start = now_ns(), now;
	uint64_t sent = 0, done = 0, counted;

	do {
		for (int i = 0; i < ROUNDS_PER_CLOCK_READ; i++) {
			uint32_t n;

			while (sent - done + batch <= in_flight) {
				if (verify)
					fill(front_requests, REQUEST_BYTES, sent, batch);
				sent += n = send_requests(end, front_requests, batch);
				if (n < batch)
					break;
			}
			n = take_responses(end, front_responses, batch);
			if (verify)
				compare(front_responses, RESPONSE_BYTES, done, n);
			if (!n)
				pause_empty(end);
			done += n;
		}
		now = now_ns();
	} while (now - start < length_ns || !done);
	*took_ns = now - start;
	for (counted = done; done < sent;) {
		uint32_t n = take_responses(end, front_responses, batch);

		if (verify)
			compare(front_responses, RESPONSE_BYTES, done, n);
		done += n;
	}
	store_release(&control->stop, 1);
	return counted;
}

static void echo_back(struct end *end)
{
	uint64_t taken = 0;

	for (;;) {
		uint32_t n = take_requests(end, back_requests, batch);

		if (!n) {
			if (load_acquire(&control->stop))
				return;
			pause_empty(end);
			continue;
		}
		if (verify) {
			compare(back_requests, REQUEST_BYTES, taken, n);
			fill(back_responses, RESPONSE_BYTES, taken, n);
		}
		taken += n;
		for (uint32_t sent = 0; sent < n;)
			sent += send_responses(end, back_responses + sent, n - sent);
	}
}

static uint64_t oneway_front(struct end *end, int64_t *took_ns)
{
	int64_t start = now_ns(), now;
	uint64_t sent = 0;

	do {
		for (int i = 0; i < ROUNDS_PER_CLOCK_READ; i++) {
			uint32_t n;

			if (verify)
				fill(front_requests, REQUEST_BYTES, sent, batch);
			sent += n = send_requests(end, front_requests, batch);
			if (n < batch && !make_room(end))
				pause_empty(end);
		}
		now = now_ns();
	} while (now - start < length_ns);
	*took_ns = now - start;
	control->sent = sent;
	store_release(&control->stop, 1);
	return sent;
}

static void oneway_back(struct end *end)
{
	uint64_t taken = 0;

	for (;;) {
		uint32_t n = take_requests(end, back_requests, batch);

		if (!n) {
			if (load_acquire(&control->stop) && taken == control->sent)
				return;
			pause_empty(end);
			continue;
		}
		if (verify)
			compare(back_requests, REQUEST_BYTES, taken, n);
		taken += n;
		hand_back(end, n);
	}
}

static uint64_t pingpong_front(struct end *end, int64_t *took_ns)
{
	int64_t start = now_ns(), before = start, now, trip_ns;
	uint64_t done = 0;

	do {
		uint32_t n;

		if (verify)
			fill(front_requests, REQUEST_BYTES, done, batch);
		for (uint32_t sent = 0; sent < batch;)
			sent += send_requests(end, front_requests + sent, batch - sent);
		for (uint32_t got = 0; got < batch; got += n) {
			n = take_responses(end, front_responses + got, batch - got);
			if (!n)
				pause_empty(end);
		}
		if (verify)
			compare(front_responses, RESPONSE_BYTES, done, batch);
		done += batch;
		now = now_ns();
		trip_ns = now - before;
		histogram[trip_ns < HISTOGRAM_NS ? trip_ns : HISTOGRAM_NS]++;
		before = now;
	} while (now - start < length_ns);
	*took_ns = now - start;
	store_release(&control->stop, 1);
	return done;
}

static const struct mode {
	const char *name;
	uint64_t (*front)(struct end *end, int64_t *took_ns);
	void (*back)(struct end *end);
} modes[] = {
	{"echo", echo_front, echo_back},
	{"oneway", oneway_front, oneway_back},
	{"pingpong", pingpong_front, echo_back},
};

static void *private_array(size_t bytes)
{
	void *array = aligned_alloc(64, (bytes + 63) / 64 * 64);

	if (!array)
		exit(3);
	memset(array, 0, bytes);
	return array;
}

static void *run_back(void *mode)
{
	struct end *end;

	pin(cpus[1]);
	end = peer_open(memory, 0);
	store_release(&control->ready, 1);
	((const struct mode *)mode)->back(end);
	return NULL;
}

static uint64_t run(const struct mode *mode, int64_t *took_ns)
{
	pthread_t thread;
	struct end *front;
	uint64_t messages;
	pid_t child = 0, parent = getpid();

	pin(cpus[0]);
	peer_prepare(memory);
	front = peer_open(memory, 1);
	if (THREADS) {
		if (pthread_create(&thread, NULL, run_back, (void *)mode))
			exit(3);
	} else if (!(child = fork())) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (getppid() == parent)
			run_back((void *)mode);
		_exit(0);
	}
	while (!load_acquire(&control->ready))
		if (!THREADS && waitpid(child, NULL, WNOHANG))
			exit(3);
	messages = mode->front(front, took_ns);
	if (THREADS)
		pthread_join(thread, NULL);
	else
		waitpid(child, NULL, 0);
	return messages;
}

static double percentile_ns(uint64_t trips, double share)
{
	uint64_t seen = 0;

	for (uint32_t ns = 0; ns < HISTOGRAM_NS; ns++) {
		seen += histogram[ns];
		if ((double)seen >= (double)trips * share)
			return ns;
	}
	return HISTOGRAM_NS;
}

static double cpu_s(void)
{
	struct rusage usage[2];
	double sum = 0;

	getrusage(RUSAGE_SELF, &usage[0]);
	getrusage(RUSAGE_CHILDREN, &usage[1]);
	for (int i = 0; i < 2; i++) {
		sum += (double)(usage[i].ru_utime.tv_sec + usage[i].ru_stime.tv_sec);
		sum += (double)(usage[i].ru_utime.tv_usec + usage[i].ru_stime.tv_usec) / 1e6;
	}
	return sum;
}

static void report(uint64_t messages, int64_t took_ns, int is_pingpong)
{
	printf("{\"messages_per_s\": %.1f, ", (double)messages / ((double)took_ns / 1e9));
	if (is_pingpong)
		printf("\"p50_ns\": %.0f, \"p99_ns\": %.0f, ", percentile_ns(messages / batch, 0.5),
		       percentile_ns(messages / batch, 0.99));
	else
		printf("\"p50_ns\": null, \"p99_ns\": null, ");
	printf("\"cpu_s\": %.6f}\n", cpu_s());
}

int main(int argc, char **argv)
{
	int64_t took_ns;
	uint64_t messages;

	if (argc < 10 || argc > 11)
		return 2;
	cpus[0] = atoi(argv[2]);
	cpus[1] = atoi(argv[3]);
	length_ns = (int64_t)(atof(argv[4]) * 1e9);
	batch = (uint32_t)atoi(argv[5]);
	in_flight = (uint32_t)atoi(argv[9]);
	verify = argc == 11 && !strcmp(argv[10], "verify");
	if (atoi(argv[6]) != REQUEST_BYTES || atoi(argv[7]) != RESPONSE_BYTES || atoi(argv[8]) != SLOTS)
		return 2;
	if (batch < 1 || batch > in_flight || in_flight > SLOTS)
		return 2;
	memory = share(peer_bytes());
	control = (struct control *)share(sizeof *control);
	front_requests = (struct request *)private_array(batch * sizeof *front_requests);
	back_requests = (struct request *)private_array(batch * sizeof *back_requests);
	front_responses = (struct response *)private_array(batch * sizeof *front_responses);
	back_responses = (struct response *)private_array(batch * sizeof *back_responses);
	for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
		if (strcmp(modes[i].name, argv[1]))
			continue;
		messages = run(&modes[i], &took_ns);
		if (control->wrong) {
			fprintf(stderr, "messages arrived changed\n");
			return 4;
		}
		report(messages, took_ns, i == 2);
		return 0;
	}
	return 2;
}

#endif
