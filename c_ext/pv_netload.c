/* SPDX-License-Identifier: MIT */
#include "pv_netload.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "pv_atomic.h"

#define TYPE_AT 12
#define NUMBER_AT 14
#define TIME_AT 22
#define STEP 0x9E3779B97F4A7C15u
#define TIMEOUT_NS 1000000000
#define LOOKS_A_CLOCK 16
#define SLEEP_NS 1000000           /* at most, before it looks at `stop` */

void pv_netload_stop(struct pv_netload *load)
{
	pv_store_relaxed(&load->stop, 1);
}

static int64_t cpu_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
	return now.tv_sec * 1000000000 + now.tv_nsec;
}

/* ---- frames ---- */

/* Bytes that follow from a frame's number. */
static void fill(uint8_t *bytes, uint32_t n, uint64_t number)
{
	uint64_t word = number * STEP + 1;

	for (uint32_t at = PV_NETLOAD_HEADER; at < n; at += 8, word += STEP)
		memcpy(bytes + at, &word, n - at < 8 ? n - at : 8);
}

static int is_filled(const uint8_t *bytes, uint32_t n, uint64_t number)
{
	uint64_t word = number * STEP + 1;

	for (uint32_t at = PV_NETLOAD_HEADER; at < n; at += 8, word += STEP)
		if (memcmp(bytes + at, &word, n - at < 8 ? n - at : 8))
			return 0;
	return 1;
}

static int64_t make_frames(struct pv_netload *load)
{
	pv_burst_clear(load->out);
	for (uint32_t i = 0; i < load->burst; i++) {
		uint32_t n = load->sizes[i % load->n_sizes];
		struct pv_frame *frame = pv_burst_next(load->out, n);
		uint8_t *bytes;

		if (!frame)
			return -EINVAL;
		bytes = load->out->memory + frame->offset;
		memset(bytes, 0, n);
		memcpy(bytes, load->to, 6);
		memcpy(bytes + 6, load->from, 6);
		bytes[TYPE_AT] = 0x88;
		bytes[TYPE_AT + 1] = 0xB5;
		pv_burst_keep(load->out, frame);
	}
	return 0;
}

static void number_frames(struct pv_netload *load)
{
	int64_t now_ns = load->way == PV_NETLOAD_TRIP ? pv_now_ns() : 0;

	for (uint32_t i = 0; i < load->out->n; i++) {
		uint8_t *bytes = load->out->memory + load->out->frames[i].offset;
		uint64_t number = load->next_number++;

		memcpy(bytes + NUMBER_AT, &number, sizeof(number));
		memcpy(bytes + TIME_AT, &now_ns, sizeof(now_ns));
		if (load->verify)
			fill(bytes, load->out->frames[i].length, number);
	}
}

/* What was taken: count it, check it. How many were of a load. */
static uint32_t look(struct pv_netload *load, int64_t now_ns)
{
	uint32_t ours = 0;

	for (uint32_t i = 0; i < load->in->n; i++) {
		const struct pv_frame *frame = &load->in->frames[i];
		const uint8_t *bytes = load->in->memory + frame->offset;
		uint64_t number;
		int64_t sent_ns;

		if (frame->length < PV_NETLOAD_HEADER || bytes[TYPE_AT] != 0x88 || bytes[TYPE_AT + 1] != 0xB5) {
			load->foreign++;
			continue;
		}
		ours++;
		memcpy(&number, bytes + NUMBER_AT, sizeof(number));
		load->taken_bytes += frame->length;
		if (number < load->next_seen) {
			load->misplaced++;
		} else {
			load->missing += number - load->next_seen;
			load->next_seen = number + 1;
		}
		if (load->verify && !is_filled(bytes, frame->length, number))
			load->wrong++;
		if (load->way == PV_NETLOAD_TRIP) {
			memcpy(&sent_ns, bytes + TIME_AT, sizeof(sent_ns));
			pv_histogram_add(load->latency, now_ns - sent_ns);
		}
	}
	load->taken += ours;
	return ours;
}

/* ---- waiting ---- */

static int is_stopped(const struct pv_netload *load)
{
	return pv_load_relaxed(&load->stop) != 0;
}

/* For the other side: 0, or -errno. */
static int64_t wait_for(struct pv_netload *load, struct pv_ring *ring)
{
	int result = pv_ring_wait(ring, load->spin_ns, SLEEP_NS);

	load->waits++;
	return result < 0 ? result : 0;
}

/* All of the burst, however long it takes, unless the load is stopped. */
static int64_t send_all(struct pv_netload *load, struct pv_netfront *front, struct pv_burst *burst)
{
	uint32_t done = 0;

	while (done < burst->n) {
		int64_t sent = pv_netfront_send(front, burst->memory, burst->frames + done, burst->n - done);

		if (sent < 0)
			return sent;
		for (int64_t i = 0; i < sent; i++)
			load->sent_bytes += burst->frames[done + i].length;
		load->sent += (uint64_t)sent;
		done += (uint32_t)sent;
		if (done < burst->n) {
			int64_t result = is_stopped(load) ? -ECANCELED : wait_for(load, front->tx);

			if (result)
				return result;
		}
	}
	load->bursts++;
	return 0;
}

/* What there is, at once. How many, of others too, or -errno. */
static int64_t take(struct pv_netload *load, struct pv_netfront *front)
{
	pv_burst_clear(load->in);
	return pv_netfront_take(front, load->in, load->burst);
}

/* ---- the ways ---- */

static int64_t run_send(struct pv_netload *load, struct pv_netfront *front, int64_t end_ns)
{
	for (uint32_t turn = 0;; turn++) {
		int64_t result;

		if (turn % LOOKS_A_CLOCK == 0 && (pv_now_ns() >= end_ns || is_stopped(load)))
			return 0;
		number_frames(load);
		result = send_all(load, front, load->out);
		if (result)
			return result == -ECANCELED ? 0 : result;
	}
}

static int64_t run_take(struct pv_netload *load, struct pv_netfront *front)
{
	int64_t since_ns = pv_now_ns(), n;

	for (;;) {
		n = take(load, front);
		if (n < 0)
			return n;
		if (n) {
			look(load, 0);
			load->bursts++;
			since_ns = 0;
			continue;
		}
		if (!since_ns)
			since_ns = pv_now_ns();
		if (is_stopped(load) || pv_now_ns() - since_ns >= load->length_ns)
			return 0;
		n = wait_for(load, front->rx);
		if (n)
			return n;
	}
}

static int64_t run_trip(struct pv_netload *load, struct pv_netfront *front, int64_t end_ns)
{
	while (pv_now_ns() < end_ns && !is_stopped(load)) {
		uint32_t back = 0;
		int64_t since_ns, result;

		number_frames(load);
		result = send_all(load, front, load->out);
		since_ns = pv_now_ns();
		while (!result && back < load->burst) {
			int64_t n = take(load, front), now_ns = pv_now_ns();

			if (n < 0)
				return n;
			if (n)
				back += look(load, now_ns);
			else if (now_ns - since_ns >= TIMEOUT_NS)
				return -ETIMEDOUT;
			else
				result = wait_for(load, front->rx);
		}
		if (result)
			return result == -ECANCELED ? 0 : result;
	}
	return 0;
}

static void turn_round(struct pv_burst *burst)
{
	for (uint32_t i = 0; i < burst->n; i++) {
		uint8_t *bytes = burst->memory + burst->frames[i].offset, to[6];

		memcpy(to, bytes, 6);
		memmove(bytes, bytes + 6, 6);
		memcpy(bytes + 6, to, 6);
	}
}

static int64_t run_reflect(struct pv_netload *load, struct pv_netfront *front)
{
	int64_t since_ns = pv_now_ns(), n;

	for (;;) {
		n = take(load, front);
		if (n < 0)
			return n;
		if (n) {
			turn_round(load->in);
			load->taken += (uint64_t)n;
			n = send_all(load, front, load->in);
			if (n)
				return n == -ECANCELED ? 0 : n;
			since_ns = 0;
			continue;
		}
		if (!since_ns)
			since_ns = pv_now_ns();
		if (is_stopped(load) || pv_now_ns() - since_ns >= load->length_ns)
			return 0;
		n = wait_for(load, front->rx);
		if (n)
			return n;
	}
}

static int is_load(const struct pv_netload *load)
{
	if (!load->burst || load->burst > PV_NETLOAD_BURST || load->n_sizes > PV_NETLOAD_SIZES || load->length_ns <= 0)
		return 0;
	for (uint32_t i = 0; i < load->n_sizes; i++)
		if (load->sizes[i] < PV_NETLOAD_HEADER || load->sizes[i] > PV_NETIF_MAX_FRAME)
			return 0;
	if (load->way == PV_NETLOAD_TRIP && !load->latency)
		return 0;
	return load->n_sizes || load->way == PV_NETLOAD_TAKE || load->way == PV_NETLOAD_REFLECT;
}

int64_t pv_netload_run(struct pv_netload *load, struct pv_netfront *front)
{
	int64_t start_ns = pv_now_ns(), cpu_ns = cpu_now_ns(), result;

	if (!is_load(load) || (load->n_sizes && make_frames(load)))
		return -EINVAL;
	switch (load->way) {
	case PV_NETLOAD_SEND:
		result = run_send(load, front, start_ns + load->length_ns);
		break;
	case PV_NETLOAD_TAKE:
		result = run_take(load, front);
		break;
	case PV_NETLOAD_TRIP:
		result = run_trip(load, front, start_ns + load->length_ns);
		break;
	case PV_NETLOAD_REFLECT:
		result = run_reflect(load, front);
		break;
	default:
		return -EINVAL;
	}
	load->seconds_ns += pv_now_ns() - start_ns;
	load->cpu_ns += (uint64_t)(cpu_now_ns() - cpu_ns);
	return result;
}
