/* SPDX-License-Identifier: MIT */
/*
 * One end of a flex ring made of Xen's own macros, the other end being under test.
 *
 *   flex_peer front|back COUNT SEED ORDER INDEXES_FD DATA_FD RX_MEMORY_FD TX_MEMORY_FD RX_BELL_FD TX_BELL_FD
 *
 * Packets: 4 bytes of length (of all), 4 of number, then bytes made from the number. front: sends COUNT packets of random
 * length and checks that each comes back. back: sends each packet back. Sleeps on the event channel when it cannot go on.
 * Says "done"; exits with 1 on a wrong byte.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "pv_event.h"

typedef uint32_t grant_ref_t;
#define __XEN_INTERFACE_VERSION__ 0x00040d00
#define xen_mb() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define xen_rmb() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define xen_wmb() __atomic_thread_fence(__ATOMIC_RELEASE)
#include <xen/io/ring.h>

DEFINE_XEN_FLEX_RING_AND_INTF(test);

#define HEADER 8

static struct pv_waiter waiter;
static struct pv_port port;
static struct test_data_intf *indexes;
static unsigned char *mine, *theirs;    /* what this end writes, reads */
static RING_IDX size, *my_prod, *my_cons, *their_prod, *their_cons;
static unsigned char packet[1 << 21];
static uint64_t state;

static void fail(const char *what)
{
	fprintf(stderr, "flex_peer: %s\n", what);
	exit(1);
}

static uint32_t choose(uint32_t below)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (uint32_t)(state >> 32) % below;
}

static void sleep_for_event(void)
{
	if (pv_wait(&waiter, &port, 0, (int64_t)60 * 1000000000) != PV_WAIT_EVENT)
		fail("no event");
}

static int has_room(uint32_t n)
{
	RING_IDX cons = *(volatile RING_IDX *)their_cons;

	xen_mb();
	return size - test_queued(*my_prod, cons, size) >= n;
}

static void write_packet(const unsigned char *bytes, uint32_t n)
{
	RING_IDX masked_prod = test_mask(*my_prod, size), masked_cons = test_mask(*(volatile RING_IDX *)their_cons, size);

	test_write_packet(mine, bytes, n, &masked_prod, masked_cons, size);
	xen_wmb();
	*(volatile RING_IDX *)my_prod += n;
	pv_notify(&port);
}

/* A whole packet to `packet`, and its length; 0 when there is none. */
static uint32_t read_packet(void)
{
	RING_IDX prod = *(volatile RING_IDX *)their_prod, cons = test_mask(*my_cons, size);
	uint32_t n, queued = test_queued(prod, *my_cons, size);

	xen_rmb();
	if (queued < HEADER)
		return 0;
	test_read_packet(&n, theirs, 4, test_mask(prod, size), &cons, size);
	if (n < HEADER || n > size)
		fail("length");
	if (queued < n)
		return 0;
	cons = test_mask(*my_cons, size);
	test_read_packet(packet, theirs, n, test_mask(prod, size), &cons, size);
	xen_mb();
	*(volatile RING_IDX *)my_cons += n;
	pv_notify(&port);
	return n;
}

static void fill(unsigned char *bytes, uint32_t n, uint32_t number)
{
	memcpy(bytes, &n, 4);
	memcpy(bytes + 4, &number, 4);
	for (uint32_t i = HEADER; i < n; i++)
		bytes[i] = (unsigned char)(number * 7 + i * 13);
}

static void run_front(uint32_t count)
{
	unsigned char *next = malloc(size), *right = malloc(size);
	uint32_t sent = 0, got = 0, n = 0;

	while (got < count) {
		int moved = 0;

		if (n == 0 && sent < count)
			fill(next, n = HEADER + choose(choose(8) ? 200 : size - HEADER + 1), sent);
		if (n && has_room(n)) {
			write_packet(next, n);
			sent++;
			n = 0;
			moved = 1;
		}
		for (uint32_t came; (came = read_packet()); got++, moved = 1) {
			fill(right, came, got);
			if (memcmp(packet, right, came))
				fail("bytes");
		}
		if (!moved)
			sleep_for_event();
	}
	free(next);
	free(right);
}

static void run_back(uint32_t count)
{
	for (uint32_t done = 0; done < count;) {
		uint32_t n = read_packet();

		if (n == 0) {
			sleep_for_event();
			continue;
		}
		while (!has_room(n))
			sleep_for_event();
		write_packet(packet, n);
		done++;
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
	unsigned char *data;
	int front, order;

	if (argc != 11)
		return 2;
	front = strcmp(argv[1], "back") != 0;
	state = strtoull(argv[3], NULL, 10) * 2 + 1;
	order = atoi(argv[4]);
	size = XEN_FLEX_RING_SIZE(order);
	indexes = map(argv[5], 4096);
	data = map(argv[6], (size_t)4096 << order);
	inbox = map(argv[7], 4096);
	if (pv_waiter_init(&waiter, NULL) || pv_waiter_add(&waiter, inbox, atoi(argv[9])))
		return 2;
	pv_port_init(&port, &waiter, inbox, 0);
	pv_port_set_peer(&port, map(argv[8], 4096), 0, atoi(argv[10]), 0);
	mine = front ? data + size : data;
	theirs = front ? data : data + size;
	my_prod = front ? &indexes->out_prod : &indexes->in_prod;
	their_cons = front ? &indexes->out_cons : &indexes->in_cons;
	their_prod = front ? &indexes->in_prod : &indexes->out_prod;
	my_cons = front ? &indexes->in_cons : &indexes->out_cons;
	if (!front && indexes->ring_order != (RING_IDX)order)
		fail("order");
	if (front)
		indexes->ring_order = (RING_IDX)order;
	puts("ready");
	fflush(stdout);
	if (front && getchar() == EOF)
		exit(1);
	(front ? run_front : run_back)((uint32_t)atoi(argv[2]));
	puts("done");
	return 0;
}
