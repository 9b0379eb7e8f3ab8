/* SPDX-License-Identifier: MIT */
/*
 * What grants cost, in bare C, on one CPU.
 *
 *   grants grant CPU SECONDS PAGES        pages granted a second
 *   grants revoke CPU SECONDS PAGES       pages taken back a second
 *   grants copy CPU SECONDS PAGES         grant copies of 4 KiB a second, from so many pages in turn
 *   grants memcpy CPU SECONDS PAGES       the same without grants
 *
 * Prints one number. Granting and revoking is done once more where every system call kills.
 */
#define _GNU_SOURCE
#include <linux/seccomp.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "pv_atomic.h"
#include "pv_grant.h"

#define PAGE 4096u
#define BASE 8u
#define BATCH 32u
#define DOMID 1u
#define MOST_PAGES (1u << 16)

static struct pv_granter granter;
static struct pv_mapper mapper;
static struct pv_grant_copy_op ops[BATCH];
static uint8_t *local;
static uint32_t n_pages;

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void *memory(size_t bytes)
{
	void *made = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (made == MAP_FAILED)
		exit(2);
	return made;
}

static void set_up(void)
{
	granter = (struct pv_granter){
		.entries = memory(n_pages * sizeof(struct pv_grant_entry)),
		.granted = memory(n_pages * sizeof(struct pv_grant_private)),
		.base = BASE,
		.n_pages = n_pages,
	};
	mapper = (struct pv_mapper){
		.entries = granter.entries,
		.data = memory((size_t)n_pages * PAGE),
		.pins = memory(n_pages * sizeof(struct pv_pin)),
		.pinned = memory(n_pages * sizeof(struct pv_pinned)),
		.base = BASE,
		.n_pages = n_pages,
		.self = DOMID,
	};
	local = memory(BATCH * PAGE);
}

static void grant_all(void)
{
	for (uint32_t gref = BASE; gref < BASE + n_pages; gref++)
		if (pv_grant_access(&granter, gref, DOMID, gref, 0))
			abort();
}

static void revoke_all(void)
{
	for (uint32_t gref = BASE; gref < BASE + n_pages; gref++)
		if (pv_grant_revoke(&granter, gref))
			abort();
}

/* A kernel that lets nothing through but the end. */
static void without_system_calls(void)
{
	pid_t child = fork();
	int status;

	if (child == 0) {
		if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT))
			_exit(0);
		grant_all();
		revoke_all();
		syscall(SYS_exit, 0);
	}
	if (waitpid(child, &status, 0) != child || status)
		exit(4);
}

/* Both, and what `timed` of them took: pages a second. */
static double grants(double seconds, int revokes)
{
	int64_t until = now_ns() + (int64_t)(seconds * 1e9), took_ns = 0;
	uint64_t done = 0;

	without_system_calls();
	do {
		int64_t start = now_ns(), between, end;

		grant_all();
		between = now_ns();
		revoke_all();
		end = now_ns();
		took_ns += revokes ? end - between : between - start;
		done += n_pages;
	} while (now_ns() < until);
	return (double)done * 1e9 / (double)took_ns;
}

static void copy_batch(uint32_t first)
{
	for (uint32_t i = 0; i < BATCH; i++)
		ops[i] = (struct pv_grant_copy_op){
			.gref = BASE + (first + i) % n_pages, .length = PAGE, .local_offset = (uint64_t)i * PAGE};
	pv_grant_copy(&mapper, ops, BATCH, local, BATCH * PAGE, 0);
	for (uint32_t i = 0; i < BATCH; i++)
		if (ops[i].status)
			abort();
}

static void memcpy_batch(uint32_t first)
{
	for (uint32_t i = 0; i < BATCH; i++) {
		memcpy(local + i * PAGE, mapper.data + (size_t)((first + i) % n_pages) * PAGE, PAGE);
		__asm__ volatile("" : : "r"(local) : "memory");
	}
}

static double copies(double seconds, void (*batch)(uint32_t first))
{
	int64_t start, now, until;
	uint64_t done = 0;

	grant_all();
	for (uint32_t first = 0; first < n_pages; first += BATCH)
		batch(first);
	start = now_ns();
	until = start + (int64_t)(seconds * 1e9);
	do {
		batch((uint32_t)(done % n_pages));
		done += BATCH;
	} while ((now = now_ns()) < until);
	return (double)done * 1e9 / (double)(now - start);
}

int main(int argc, char **argv)
{
	cpu_set_t set;
	double seconds, result;

	if (argc != 5)
		return 2;
	CPU_ZERO(&set);
	CPU_SET(atoi(argv[2]), &set);
	sched_setaffinity(0, sizeof set, &set);
	seconds = atof(argv[3]);
	n_pages = (uint32_t)atoi(argv[4]);
	if (n_pages < BATCH || n_pages > MOST_PAGES)
		return 2;
	set_up();
	if (!strcmp(argv[1], "grant") || !strcmp(argv[1], "revoke"))
		result = grants(seconds, !strcmp(argv[1], "revoke"));
	else if (!strcmp(argv[1], "copy"))
		result = copies(seconds, copy_batch);
	else if (!strcmp(argv[1], "memcpy"))
		result = copies(seconds, memcpy_batch);
	else
		return 2;
	printf("%.1f\n", result);
	return 0;
}
