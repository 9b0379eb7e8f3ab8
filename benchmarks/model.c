/* SPDX-License-Identifier: MIT */
/*
 * What the benchmarks measure against, in bare C: two pinned processes that spin.
 *
 *   model SIDE CPU CPU SECONDS BATCH PAGES        pairs/s of blkif-sized messages
 *
 * SIDE: "xen", Xen's macros with the notify check; "xen-unchecked", without it; "core", our core with the full barrier;
 * "core-light", with the asymmetric fence; "core-inplace", the same with requests and responses written into the slots.
 * Prints one number. Xen's sides exist where Xen's header does; exit code 5 for a side that does not.
 */
#include "pinned.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pv_atomic.h"
#include "pv_ring.h"

#define MAX_BATCH 512
#define ROUNDS_PER_CLOCK_READ 256

struct request {
	uint64_t words[14];
};

struct response {
	uint64_t words[2];
};

static struct request requests[MAX_BATCH];
static struct response responses[MAX_BATCH];
static uint32_t batch;
static size_t ring_bytes;

/* Shared by both processes. */
static struct control {
	uint32_t attached;
	uint32_t pad0[31];
	uint32_t stop;
} *control;

static void use_fence(struct pv_ring *ring, uint32_t fence)
{
	if (pv_ring_set_fence(ring, fence))
		exit(4);
}

/* Fill a batch in the slots themselves: how many. */
static uint32_t fill_slots(struct pv_ring *ring, const void *messages, uint32_t bytes, uint32_t n)
{
	struct pv_ring_slots slots;
	uint32_t filled = 0;

	while (filled < n && pv_ring_reserve(ring, n - filled, &slots) == 0 && slots.n) {
		for (uint32_t i = 0; i < slots.n; i++)
			memcpy(slots.first + i * ring->entry_bytes, (const uint8_t *)messages + (filled + i) * bytes, bytes);
		pv_ring_commit(ring, slots.n);
		filled += slots.n;
	}
	return filled;
}

static inline double core_front(void *memory, double seconds, uint32_t fence, int in_place)
{
	int64_t start = pv_now_ns(), now;
	struct pv_ring ring;
	uint64_t done = 0;

	pv_ring_create(&ring, memory, ring_bytes, 112, 112, 16, NULL, 0);
	use_fence(&ring, fence);
	pv_store_release(&control->attached, 2);
	while (pv_load_acquire(&control->attached) != 1)
		;
	do {
		for (int i = 0; i < ROUNDS_PER_CLOCK_READ; i++) {
			while (pv_ring_room(&ring) >= batch) {
				if (in_place)
					fill_slots(&ring, requests, sizeof *requests, batch);
				else
					pv_ring_push(&ring, requests, batch);
			}
			done += (uint64_t)pv_ring_take(&ring, responses, batch);
		}
		now = pv_now_ns();
	} while ((double)(now - start) < seconds * 1e9);
	pv_store_release(&control->stop, 1);
	return (double)done / ((double)(now - start) / 1e9);
}

static inline void core_back(void *memory, uint32_t fence, int in_place)
{
	struct pv_ring ring;

	while (pv_load_acquire(&control->attached) != 2)
		;
	pv_ring_attach(&ring, memory, ring_bytes, 112, 112, 16, NULL, 0);
	use_fence(&ring, fence);
	pv_store_release(&control->attached, 1);
	for (;;) {
		int64_t n = pv_ring_take(&ring, requests, batch);

		if (n > 0 && in_place)
			fill_slots(&ring, responses, sizeof *responses, (uint32_t)n);
		else if (n > 0)
			pv_ring_push(&ring, responses, (uint32_t)n);
		else if (pv_load_relaxed(&control->stop))
			return;
	}
}

static double full_front(void *memory, double seconds)
{
	return core_front(memory, seconds, PV_FENCE_FULL, 0);
}

static void full_back(void *memory)
{
	core_back(memory, PV_FENCE_FULL, 0);
}

static double light_front(void *memory, double seconds)
{
	return core_front(memory, seconds, PV_FENCE_HOST, 0);
}

static void light_back(void *memory)
{
	core_back(memory, PV_FENCE_HOST, 0);
}

static double inplace_front(void *memory, double seconds)
{
	return core_front(memory, seconds, PV_FENCE_HOST, 1);
}

static void inplace_back(void *memory)
{
	core_back(memory, PV_FENCE_HOST, 1);
}

#if __has_include(<xen/io/ring.h>)
#define __XEN_INTERFACE_VERSION__ 0x00040d00
#define xen_mb() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define xen_rmb() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define xen_wmb() __atomic_thread_fence(__ATOMIC_RELEASE)
#include <xen/io/ring.h>
#define HAVE_XEN 1

DEFINE_RING_TYPES(model, struct request, struct response);

/* Forces the whole copy: the compiler was seen to leave out parts that nobody reads. */
#define FORCE(place) __asm__ volatile("" : : "r"(place) : "memory")

static inline double any_xen_front(void *memory, double seconds, int check)
{
	struct model_sring *shared = memory;
	int64_t start = pv_now_ns(), now;
	model_front_ring_t ring;
	uint64_t done = 0, notified = 0;

	SHARED_RING_INIT(shared);
	FRONT_RING_INIT(&ring, shared, ring_bytes);
	pv_store_release(&control->attached, 2);
	while (pv_load_acquire(&control->attached) != 1)
		;
	do {
		for (int i = 0; i < ROUNDS_PER_CLOCK_READ; i++) {
			uint32_t n = 0;
			RING_IDX last;
			int notify;

			while (RING_FREE_REQUESTS(&ring) >= batch) {
				for (uint32_t j = 0; j < batch; j++)
					memcpy(RING_GET_REQUEST(&ring, ring.req_prod_pvt++), &requests[j], sizeof *requests);
				if (check) {
					RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&ring, notify);
					notified += notify;
				} else {
					RING_PUSH_REQUESTS(&ring);
				}
			}
			last = pv_load_relaxed(&ring.sring->rsp_prod);
			xen_rmb();
			for (; ring.rsp_cons != last && n < batch; ring.rsp_cons++, n++) {
				memcpy(&responses[n], RING_GET_RESPONSE(&ring, ring.rsp_cons), sizeof *responses);
				FORCE(&responses[n]);
			}
			done += n;
		}
		now = pv_now_ns();
	} while ((double)(now - start) < seconds * 1e9);
	pv_store_release(&control->stop, 1);
	FORCE(&notified);
	return (double)done / ((double)(now - start) / 1e9);
}

static inline void any_xen_back(void *memory, int check)
{
	model_back_ring_t ring;
	uint64_t notified = 0;

	while (pv_load_acquire(&control->attached) != 2)
		;
	BACK_RING_INIT(&ring, (struct model_sring *)memory, ring_bytes);
	pv_store_release(&control->attached, 1);
	for (;;) {
		RING_IDX last = pv_load_relaxed(&ring.sring->req_prod);
		uint32_t n = 0;
		int notify;

		xen_rmb();
		if (RING_REQUEST_PROD_OVERFLOW(&ring, last))
			abort();
		for (; ring.req_cons != last && n < batch; ring.req_cons++, n++) {
			memcpy(&requests[n], RING_GET_REQUEST(&ring, ring.req_cons), sizeof *requests);
			FORCE(&requests[n]);
		}
		for (uint32_t j = 0; j < n; j++)
			memcpy(RING_GET_RESPONSE(&ring, ring.rsp_prod_pvt++), &responses[j], sizeof *responses);
		if (n && check) {
			RING_PUSH_RESPONSES_AND_CHECK_NOTIFY(&ring, notify);
			notified += notify;
		} else if (n) {
			RING_PUSH_RESPONSES(&ring);
		} else if (pv_load_relaxed(&control->stop)) {
			FORCE(&notified);
			return;
		}
	}
}

static double xen_front(void *memory, double seconds)
{
	return any_xen_front(memory, seconds, 1);
}

static void xen_back(void *memory)
{
	any_xen_back(memory, 1);
}

static double unchecked_front(void *memory, double seconds)
{
	return any_xen_front(memory, seconds, 0);
}

static void unchecked_back(void *memory)
{
	any_xen_back(memory, 0);
}
#endif

static const struct mode {
	const char *name;
	double (*front)(void *memory, double seconds);
	void (*back)(void *memory);
} modes[] = {
	{"core", full_front, full_back},
	{"core-light", light_front, light_back},
	{"core-inplace", inplace_front, inplace_back},
#ifdef HAVE_XEN
	{"xen", xen_front, xen_back},
	{"xen-unchecked", unchecked_front, unchecked_back},
#endif
};

static double run(const struct mode *mode, int front_cpu, int back_cpu, double seconds)
{
	void *memory = share(ring_bytes);
	double result;
	pid_t back;

	control = share(sizeof *control);
	back = fork();
	if (back == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		pin(back_cpu);
		mode->back(memory);
		_exit(0);
	}
	pin(front_cpu);
	result = mode->front(memory, seconds);
	waitpid(back, NULL, 0);
	return result;
}

int main(int argc, char **argv)
{
	if (argc < 5)
		return 2;
	batch = argc > 5 ? (uint32_t)atoi(argv[5]) : 1;
	ring_bytes = (argc > 6 ? (size_t)atoi(argv[6]) : 1) * 4096;
	if (batch < 1 || batch > MAX_BATCH)
		return 2;
	for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
		if (strcmp(modes[i].name, argv[1]))
			continue;
		printf("%.1f\n", run(&modes[i], atoi(argv[2]), atoi(argv[3]), atof(argv[4])));
		return 0;
	}
	return 5;
}
