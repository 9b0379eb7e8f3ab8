/* SPDX-License-Identifier: MIT */
/* The waiting side of a ring: who pays for the fence, when to be woken, how long to look before sleeping. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/membarrier.h>
#include <sched.h>

#include "pv_atomic.h"
#include "pv_home.h"
#include "pv_ring.h"

#define LOOKS_PER_CLOCK_READ 64

/* pv_ring_poll's answer is used as a wait's result. */
_Static_assert(PV_WAIT_TIMEOUT == 0 && PV_WAIT_EVENT == 1, "nothing, something");

/* Fences. */

static const struct {
	int registration, barrier;
} membarrier[] = {
	[PV_FENCE_PROCESS] = {MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, MEMBARRIER_CMD_PRIVATE_EXPEDITED},
	[PV_FENCE_HOST] = {MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, MEMBARRIER_CMD_GLOBAL_EXPEDITED},
};

int pv_fence_register(uint32_t fence)
{
	static uint32_t registered[3];

	if (fence == PV_FENCE_FULL)
		return 0;
	if (fence > PV_FENCE_HOST)
		return -EINVAL;
	if (pv_load_relaxed(&registered[fence]) == pv_home_mark())
		return 0;
	if (pv_fence_heavy(membarrier[fence].registration))
		return errno == ENOSYS || errno == EINVAL ? -EOPNOTSUPP : -errno;
	pv_store_relaxed(&registered[fence], pv_home_mark());
	return 0;
}

int pv_ring_set_fence(struct pv_ring *ring, uint32_t fence)
{
	int result = pv_fence_register(fence);

	if (ring->batches || ring->consumed)
		return -EBUSY;
	if (result && fence != PV_FENCE_PROCESS)
		return result;
	ring->fence = result ? PV_FENCE_FULL : fence;
	return 0;
}

/* When to be woken. */

int pv_ring_set_event_policy(struct pv_ring *ring, uint32_t policy, uint64_t threshold, int64_t delay_ns)
{
	if (policy > PV_EVENT_RATE || (policy != PV_EVENT_NEXT && !ring->is_front) ||
	    (policy == PV_EVENT_RATE && (threshold == 0 || delay_ns < 0)))
		return -EINVAL;
	ring->event_policy = policy;
	ring->event_threshold = threshold;
	ring->event_delay_ns = delay_ns;
	ring->event_ahead = 1;
	ring->window_start_ns = pv_now_ns();
	ring->window_consumed = ring->consumed;
	return 0;
}

/* RATE: once a window, how many messages come within the delay that belongs to their rate. */
static void measure_rate(struct pv_ring *ring)
{
	int64_t now_ns = pv_now_ns(), past_ns = now_ns - ring->window_start_ns;
	double rate, delay_s;

	if (past_ns < PV_EVENT_WINDOW_NS)
		return;
	rate = (double)(ring->consumed - ring->window_consumed) * 1e9 / (double)past_ns;
	delay_s = (double)ring->event_delay_ns * 1e-9 * rate / (double)ring->event_threshold;
	ring->event_ahead = rate <= (double)ring->event_threshold || rate * delay_s < 1 ? 1 :
			    rate * delay_s > ring->size ? ring->size : (uint32_t)(rate * delay_s);
	ring->window_start_ns = now_ns;
	ring->window_consumed = ring->consumed;
}

/* How many messages from here the one is that should wake us. Never more than will come: then nothing would. */
static uint32_t messages_to_event(struct pv_ring *ring)
{
	uint32_t outstanding = pv_ring_outstanding(ring);

	if (ring->event_policy == PV_EVENT_NEXT || outstanding < 2)
		return 1;
	if (ring->event_policy == PV_EVENT_HALF)
		return (outstanding >> 1) + 1;
	measure_rate(ring);
	return ring->event_ahead < outstanding ? ring->event_ahead : outstanding;
}

int pv_ring_final_check(struct pv_ring *ring)
{
	int result = pv_ring_poll(ring);

	if (result)
		return result;
	pv_store_relaxed(ring->own_event, ring->cons + messages_to_event(ring));
	/* Ask, then look again: pairs with the fence in is_asked() of the peer, which is a light one if ours is heavy. */
	if (ring->fence == PV_FENCE_FULL) {
		pv_fence_full();
	} else {
		ring->heavy_fences++;
		if (pv_fence_heavy(membarrier[ring->fence].barrier))
			return -errno;
	}
	return pv_ring_poll(ring);
}

/* Spinning. */

static int spin_for_work(struct pv_ring *ring, int64_t until_ns)
{
	do {
		for (int i = 0; i < LOOKS_PER_CLOCK_READ; i++) {
			int n = pv_ring_poll(ring);

			if (n)
				return n;
			pv_pause();
		}
	} while (pv_now_ns() < until_ns);
	return 0;
}

/* How long to spin by what was learnt, if there is an idle CPU for the peer. */
static int64_t learnt_ns(struct pv_ring *ring, int64_t now_ns)
{
	int idle = pv_spin_cpu_is_idle(now_ns);

	if (ring->fence != PV_FENCE_FULL) {
		uint32_t cpu = (uint32_t)sched_getcpu() + 1;

		if (cpu != ring->cpu)
			pv_store_relaxed(ring->own_cpu, cpu);
		ring->cpu = cpu;
		idle = idle && pv_load_relaxed(ring->peer_cpu) != cpu;
	}
	return pv_spin_begin(&ring->spin, now_ns, idle);
}

/* Spin as long as was learnt, and learn from it. */
static int spin_as_learnt(struct pv_ring *ring)
{
	int64_t start_ns = pv_now_ns(), spin_ns = learnt_ns(ring, start_ns);
	int n = 0;

	if (spin_ns > 0) {
		n = spin_for_work(ring, start_ns + (spin_ns < PV_SPIN_SLICE_NS ? spin_ns : PV_SPIN_SLICE_NS));
		pv_spin_end(&ring->spin, pv_now_ns() - start_ns, n != 0);
	}
	ring->empty_since_ns = start_ns;
	ring->empty_cons = ring->cons;
	return n;
}

int64_t pv_ring_take_spin(struct pv_ring *ring, void *messages, uint32_t max, int64_t spin_ns)
{
	int64_t n = pv_ring_take(ring, messages, max);
	int found;

	if (n || max == 0)
		return n;
	if (spin_ns < 0)
		found = spin_as_learnt(ring);
	else
		found = spin_for_work(ring, pv_now_ns() + (spin_ns < PV_SPIN_SLICE_NS ? spin_ns : PV_SPIN_SLICE_NS));
	return found > 0 ? pv_ring_take(ring, messages, max) : found;
}

int64_t pv_ring_exchange(struct pv_ring *ring, const void *request, void *response, int64_t spin_ns)
{
	int64_t pushed;

	if (!ring->is_front)
		return -EINVAL;
	if (pv_ring_outstanding(ring))
		return -EBUSY;
	pushed = pv_ring_push(ring, request, 1);
	/* A peer that could not be told will not answer. */
	if (pushed != 1)
		return pushed < 0 ? pushed : pushed >> 32 << 32;
	return spin_ns == 0 ? pv_ring_take(ring, response, 1) : pv_ring_take_spin(ring, response, 1, spin_ns);
}

/* Wait. */

static void count_event(struct pv_ring *ring, int work)
{
	int spurious = !work && ring->cons == ring->cons_at_event;

	ring->events++;
	ring->spurious += (uint64_t)spurious;
	ring->cons_at_event = ring->cons;
	/* In late-EOI mode: an end that has work is awake, and its next final check asks for an event. */
	if (ring->port->late_eoi)
		pv_port_eoi(ring->port, spurious);
}

/* Spin on the index and on what ends a wait of the waiter; PV_WAIT_TIMEOUT when neither came. */
static int spin_for_anything(struct pv_ring *ring, struct pv_waiter *waiter, int64_t start_ns, int64_t spin_ns)
{
	int64_t until_ns = start_ns + (spin_ns < PV_SPIN_SLICE_NS ? spin_ns : PV_SPIN_SLICE_NS);

	do {
		int n = spin_for_work(ring, 0);
		int result = waiter ? pv_waiter_look(waiter) : PV_WAIT_TIMEOUT;

		if (n)
			return n < 0 ? n : PV_WAIT_EVENT;
		if (result != PV_WAIT_TIMEOUT)
			return result;
	} while (pv_now_ns() < until_ns);
	return spin_ns > PV_SPIN_SLICE_NS ? PV_WAIT_INTERRUPTED : PV_WAIT_TIMEOUT;
}

/* The spin at the start of a wait, of a given or the learnt length. */
static int spin_first(struct pv_ring *ring, struct pv_waiter *waiter, int64_t start_ns, int64_t spin_ns,
		      int64_t timeout_ns)
{
	int64_t most_ns = spin_ns < 0 ? learnt_ns(ring, start_ns) : spin_ns;
	int result;

	if (timeout_ns >= 0 && most_ns > timeout_ns)
		most_ns = timeout_ns;
	if (most_ns <= 0)
		return PV_WAIT_TIMEOUT;
	result = spin_for_anything(ring, waiter, start_ns, most_ns);
	ring->spins += result == PV_WAIT_EVENT;
	if (spin_ns < 0)
		pv_spin_end(&ring->spin, pv_now_ns() - start_ns, result == PV_WAIT_EVENT);
	return result;
}

/* Sleep until the port has an event (1: then look at the ring) or the wait ends otherwise (0: *result). */
static int sleep_for_event(struct pv_ring *ring, struct pv_waiter *waiter, int64_t deadline_ns, int64_t timeout_ns,
			   int *result)
{
	uint64_t sleeps = waiter->sleeps;
	int64_t left_ns = timeout_ns < 0 ? -1 : deadline_ns - pv_now_ns();

	*result = pv_ring_final_check(ring);
	if (*result)
		return 0;
	*result = pv_wait(waiter, ring->port, 0, timeout_ns < 0 || left_ns > 0 ? left_ns : 0);
	ring->sleeps += waiter->sleeps - sleeps;
	return *result == PV_WAIT_EVENT;
}

/* After a look that found nothing: spin, then sleep. */
static int wait_long(struct pv_ring *ring, struct pv_waiter *waiter, int64_t spin_ns, int64_t timeout_ns)
{
	int64_t start_ns = pv_now_ns(), deadline_ns = start_ns + timeout_ns;
	int result = spin_first(ring, waiter, start_ns, waiter ? spin_ns : INT64_MAX, timeout_ns);

	if (result != PV_WAIT_TIMEOUT)
		return result;
	/* A spin in vain may have come first, in pv_ring_take_spin: the gap is as long as both. */
	if (spin_ns < 0 || ring->empty_cons != ring->cons)
		ring->empty_since_ns = start_ns;
	ring->empty_cons = ring->cons - 1;
	while (waiter && result == PV_WAIT_TIMEOUT && sleep_for_event(ring, waiter, deadline_ns, timeout_ns, &result)) {
		result = pv_ring_poll(ring);
		if (result >= 0)
			count_event(ring, result);
	}
	if (result == PV_WAIT_EVENT)
		pv_spin_slept(&ring->spin, pv_now_ns() - ring->empty_since_ns);
	return result;
}

int pv_ring_wait(struct pv_ring *ring, int64_t spin_ns, int64_t timeout_ns)
{
	struct pv_waiter *waiter = ring->port ? ring->port->waiter : NULL;
	int event, result = pv_ring_poll(ring);

	if (result < 0)
		return result;
	if (ring->port && pv_load_relaxed(&ring->port->closed))
		return -EBADF;
	if (waiter && (result = pv_waiter_look(waiter)) != PV_WAIT_TIMEOUT)
		return result;
	event = ring->port ? pv_port_take_pending(ring->port) : 0;
	result = pv_ring_poll(ring);
	if (event && result >= 0)
		count_event(ring, result);
	if (result || timeout_ns == 0)
		return result;
	result = wait_long(ring, waiter, spin_ns, timeout_ns);
	ring->waits += result != PV_WAIT_INTERRUPTED;
	return result;
}

int pv_ring_arm(struct pv_ring *ring)
{
	int result = pv_ring_final_check(ring);

	if (result)
		return result;
	if (pv_load_relaxed(&ring->port->closed))
		return -EBADF;
	result = pv_waiter_arm(ring->port->waiter, ring->port);
	/* The event is taken. */
	if (result == PV_WAIT_EVENT)
		count_event(ring, pv_ring_poll(ring) > 0);
	ring->sleeps += result == PV_WAIT_TIMEOUT;
	return result;
}

int pv_ring_disarm(struct pv_ring *ring, int rung)
{
	int result = rung ? pv_waiter_drain(ring->port->waiter) : 0;

	pv_waiter_disarm(ring->port->waiter, ring->port);
	if (result < 0)
		return result;
	result = pv_ring_wait(ring, 0, 0);
	return result < 0 ? result : 0;
}
