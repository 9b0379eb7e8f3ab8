/* SPDX-License-Identifier: MIT */
/*
 * What grants cost, in bare C, on one CPU.
 *
 *   grants grant CPU SECONDS PAGES        pages granted a second
 *   grants revoke CPU SECONDS PAGES       pages taken back a second
 *   grants copy CPU SECONDS PAGES         grant copies of 4 KiB a second, out of so many pages in turn
 *   grants copy-into CPU SECONDS PAGES    the same into them
 *   grants memcpy CPU SECONDS PAGES       the same as copy, without grants
 *   grants memcpy-into CPU SECONDS PAGES  the same as copy-into, without grants
 *
 * Prints one number. Granting and revoking is done once more where every system call kills.
 */
#include "pinned.h"

#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
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
static struct pv_grant_copy_op *ops;     /* one for each page */
static uint8_t *local;
static uint32_t n_pages;

static void set_up(void)
{
	granter = (struct pv_granter){
		.entries = share(n_pages * sizeof(struct pv_grant_entry)),
		.granted = share(n_pages * sizeof(struct pv_grant_private)),
		.base = BASE,
		.n_pages = n_pages,
	};
	mapper = (struct pv_mapper){
		.entries = granter.entries,
		.data = share((size_t)n_pages * PAGE),
		.pins = share(n_pages * sizeof(struct pv_pin)),
		.pinned = share(n_pages * sizeof(struct pv_pinned)),
		.base = BASE,
		.n_pages = n_pages,
		.self = DOMID,
	};
	local = share(BATCH * PAGE);
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

/* Both sides go through the same operations, which are made before the time begins. */
static void make_ops(void)
{
	ops = share(n_pages * sizeof *ops);
	for (uint32_t i = 0; i < n_pages; i++)
		ops[i] = (struct pv_grant_copy_op){
			.gref = BASE + i, .length = PAGE, .local_offset = (uint64_t)(i % BATCH) * PAGE};
}

static void copy_batch(struct pv_grant_copy_op *batch, int into)
{
	pv_grant_copy(&mapper, batch, BATCH, local, BATCH * PAGE, into);
	for (uint32_t i = 0; i < BATCH; i++)
		if (batch[i].status)
			abort();
}

static void memcpy_batch(struct pv_grant_copy_op *batch, int into)
{
	for (uint32_t i = 0; i < BATCH; i++) {
		uint8_t *page = mapper.data + (size_t)(batch[i].gref - BASE) * PAGE;
		uint8_t *mine = local + batch[i].local_offset;

		memcpy(into ? page : mine, into ? mine : page, batch[i].length);
		__asm__ volatile("" : : "r"(mine), "r"(page) : "memory");
	}
}

static double copies(double seconds, void (*copy)(struct pv_grant_copy_op *batch, int into), int into)
{
	int64_t start, now, until;
	uint64_t done = 0;
	uint32_t next = 0;

	make_ops();
	grant_all();
	for (uint32_t first = 0; first < n_pages; first += BATCH)
		copy(ops + first, into);
	start = now_ns();
	until = start + (int64_t)(seconds * 1e9);
	do {
		copy(ops + next, into);
		next = next + BATCH < n_pages ? next + BATCH : 0;
		done += BATCH;
	} while ((now = now_ns()) < until);
	return (double)done * 1e9 / (double)(now - start);
}

int main(int argc, char **argv)
{
	double seconds, result;

	if (argc != 5)
		return 2;
	pin(atoi(argv[2]));
	seconds = atof(argv[3]);
	n_pages = (uint32_t)atoi(argv[4]);
	if (n_pages == 0 || n_pages % BATCH || n_pages > MOST_PAGES)
		return 2;
	set_up();
	if (!strcmp(argv[1], "grant") || !strcmp(argv[1], "revoke"))
		result = grants(seconds, !strcmp(argv[1], "revoke"));
	else if (!strcmp(argv[1], "copy") || !strcmp(argv[1], "copy-into"))
		result = copies(seconds, copy_batch, !strcmp(argv[1], "copy-into"));
	else if (!strcmp(argv[1], "memcpy") || !strcmp(argv[1], "memcpy-into"))
		result = copies(seconds, memcpy_batch, !strcmp(argv[1], "memcpy-into"));
	else
		return 2;
	printf("%.1f\n", result);
	return 0;
}
