/* SPDX-License-Identifier: MIT */
/*
 * The store's engine when there is no memory: a story is told while malloc, calloc and realloc fail.
 *
 *   once       each allocation in turn fails a single time: what was set aside helps, and nobody notices
 *   little     there is only so much: what needs memory is refused until there is again, what gives some back is done
 *   none       from each allocation on all fail: the process ends, and the journal has what was acknowledged
 */
#define _GNU_SOURCE
#include <malloc.h>
#include <signal.h>
#include <sys/wait.h>

#include "caller.h"

#define RESERVE_BYTES (16 << 20)

/* -- allocations that fail */

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
void *__real_realloc(void *memory, size_t n);
void __real_free(void *memory);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
void *__wrap_realloc(void *memory, size_t n);
void __wrap_free(void *memory);

static struct {
	int64_t until;              /* this one and n_failing - 1 after it fail; counts down */
	int64_t n_failing;
	int64_t budget;             /* bytes that may be held; < 0: as many as one likes */
	int64_t held;
	int64_t n_refused;
	int spares;                 /* the reserve is not counted, and does not fail */
} memory = { .until = INT64_MAX, .budget = -1 };

static int refuses(size_t n)
{
	if (memory.spares && n == RESERVE_BYTES)
		return 0;
	if (memory.until <= 0 && memory.until > -memory.n_failing) {
		memory.until--;
		memory.n_refused++;
		return 1;
	}
	memory.until--;
	if (memory.budget < 0 || memory.held + (int64_t)n <= memory.budget)
		return 0;
	memory.n_refused++;
	return 1;
}

static void *count(void *made)
{
	memory.held += made ? (int64_t)malloc_usable_size(made) : 0;
	return made;
}

void *__wrap_malloc(size_t n)
{
	return refuses(n) ? NULL : count(__real_malloc(n));
}

void *__wrap_calloc(size_t n, size_t size)
{
	return refuses(n * size) ? NULL : count(__real_calloc(n, size));
}

void *__wrap_realloc(void *former, size_t n)
{
	int64_t before = former ? (int64_t)malloc_usable_size(former) : 0;
	void *made = refuses(n) ? NULL : __real_realloc(former, n);

	if (made) {
		memory.held -= before;
		count(made);
	}
	return made;
}

void __wrap_free(void *former)
{
	memory.held -= former ? (int64_t)malloc_usable_size(former) : 0;
	__real_free(former);
}

/* -- the story */

enum who { DOM0, WATCHER, GUEST, OTHER, N_CLIENTS };

static const uint32_t domids[N_CLIENTS] = { 0, 0, 5, 6 };

struct line {
	enum who who;
	uint32_t op, transaction;
	const char *payload;        /* "|" stands for a NUL */
};

#define TEN "/0/1/2/3/4/5/6/7/8/9"
#define LONG_VALUE "vvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvv"

static const struct line story[] = {
	{ DOM0, WRITE, 0, "/local/domain/5|home" }, { DOM0, SET_PERMS, 0, "/local/domain/5|n5|" },
	{ DOM0, WRITE, 0, "/shared|x" }, { DOM0, SET_PERMS, 0, "/shared|b0|w5|r6|" },
	{ WATCHER, WATCH, 0, "/|all|" }, { WATCHER, WATCH, 0, "/shared|one|" }, { WATCHER, WATCH, 0, "@releaseDomain|special|" },
	{ OTHER, WATCH, 0, "/shared|theirs|" }, { GUEST, WATCH, 0, "data|mine|" },
	{ GUEST, WRITE, 0, "data|1" }, { GUEST, WRITE, 0, "data|" LONG_VALUE }, { GUEST, MKDIR, 0, "deep" TEN "|" },
	{ GUEST, READ, 0, "data|" }, { GUEST, DIRECTORY, 0, "deep|" }, { GUEST, SET_PERMS, 0, "data|n5|r6|" },
	{ OTHER, READ, 0, "/local/domain/5/data|" }, { OTHER, WRITE, 0, "/local/domain/5/data|no" },
	{ GUEST, START, 0, "|" }, { GUEST, WRITE, 1, "in/a/b|1" }, { GUEST, READ, 1, "data|" }, { GUEST, MKDIR, 1, "in/a/c|" },
	{ GUEST, SET_PERMS, 1, "in/a/c|n5|b6|" }, { GUEST, RM, 1, "deep/0/1|" }, { GUEST, WRITE, 1, "deep/0/1|again" },
	{ GUEST, END, 1, "T|" }, { DOM0, START, 0, "|" }, { DOM0, RM, 1, "/local/domain/5/in|" },
	{ DOM0, WRITE, 1, "/other/a|1" }, { DOM0, END, 1, "F|" }, { DOM0, WRITE, 0, "/other/a|2" },
	{ DOM0, RM, 0, "/local/domain/5/in/a|" }, { WATCHER, UNWATCH, 0, "/shared|one|" }, { GUEST, GET_PERMS, 0, "in|" },
	{ OTHER, RESET, 0, "|" }, { GUEST, RM, 0, "deep|" },
};

#define N_LINES (sizeof story / sizeof *story)

struct world {
	struct pv_xs *hub;
	struct pv_xs_conn *clients[N_CLIENTS];
	struct heard heard[N_CLIENTS];
};

static uint32_t bytes_of(const char *payload, char *bytes)
{
	uint32_t n = (uint32_t)strlen(payload);

	for (uint32_t i = 0; i < n; i++)
		bytes[i] = payload[i] == '|' ? 0 : payload[i];
	return n;
}

static void begin(struct world *world)
{
	memset(world, 0, sizeof *world);
	world->hub = pv_xs_new(1);
	for (int i = 0; i < N_CLIENTS; i++)
		world->clients[i] = pv_xs_connect(world->hub, domids[i]);
}

static int tell(struct world *world, const struct line *line)
{
	char payload[PV_XS_PAYLOAD_MAX];
	int done = ask(world->clients[line->who], &world->heard[line->who], line->op, line->transaction, payload,
		       bytes_of(line->payload, payload));

	for (int i = 0; i < N_CLIENTS; i++)
		collect(world->clients[i], &world->heard[i]);
	return done;
}

/* Everybody leaves, a domain ends: nothing is held for guests. */
static void end(struct world *world)
{
	static const uint32_t gone[] = { 5, 6 };
	struct pv_xs_domain domain;

	must(!pv_xs_check(world->hub));
	for (int i = 1; i < N_CLIENTS; i++)
		pv_xs_conn_free(world->clients[i]);
	pv_xs_forget(world->hub, gone, 2);
	must(!pv_xs_check(world->hub));
	for (int i = 0; i < 2; i++)
		must(!pv_xs_get_domain(world->hub, gone[i], &domain) || (!domain.memory_bytes && !domain.n_nodes));
	pv_xs_conn_free(world->clients[DOM0]);
	pv_xs_free(world->hub);
}

static uint64_t told(const struct world *world)
{
	uint64_t hash = 0;

	for (int i = 0; i < N_CLIENTS; i++)
		hash = hash * 31 + world->heard[i].hash;
	return hash;
}

/* -- once */

static void once(void)
{
	uint64_t right = 0;
	int64_t n_allocations = INT64_MAX;

	for (int64_t k = -1; k < n_allocations; k++) {
		struct world world;

		begin(&world);
		memory.spares = 1;
		memory.until = k < 0 ? INT64_MAX : k;
		memory.n_failing = 1;
		for (uint32_t i = 0; i < N_LINES; i++)
			tell(&world, &story[i]);
		if (k < 0)
			right = told(&world);
		must(told(&world) == right);
		end(&world);
		if (k < 0)
			n_allocations = INT64_MAX - memory.until;
		must(n_allocations > 100 && (k < 0 || memory.until < 0));
		memory.until = INT64_MAX;
		memory.spares = 0;
	}
	printf("once: %ld allocations\n", (long)n_allocations);
}

/* -- little */

/* A guest fills what there is with nodes, until it is refused; then it gives back what it has taken. */
static void fill(struct world *world, int64_t room)
{
	struct pv_xs_conn *guest = world->clients[GUEST], *dom0 = world->clients[DOM0];
	struct heard *heard = &world->heard[GUEST];
	char payload[PV_XS_PAYLOAD_MAX];
	uint32_t n_written = 0, quota, n;

	for (quota = 0; quota < PV_XS_N_QUOTAS; quota++)
		pv_xs_set_quota(world->hub, 5, quota, 0);
	must(ask(guest, heard, START, 0, "", 1));
	must(ask(guest, heard, WRITE, 1, "never\0x", 7));
	memory.n_refused = 0;
	memory.budget = memory.held + room;
	do {
		pv_xs_set_now(world->hub, n_written * 1000); /* it does not write faster than it may */
		n = (uint32_t)sprintf(payload, "x/%u", n_written++);
		memset(payload + n + 1, 'v', 2000);
		payload[n] = 0;
	} while (ask(guest, heard, WRITE, 0, payload, n + 2000));
	must(has_failed(heard, "ENOMEM") && memory.n_refused);
	memory.budget -= RESERVE_BYTES / 2; /* others are in need, too */
	must(!ask(guest, heard, READ, 0, "x/0", 4) && has_failed(heard, "ENOMEM"));
	must(!ask(dom0, &world->heard[DOM0], MKDIR, 0, "/new", 5) && has_failed(&world->heard[DOM0], "ENOMEM"));
	must(!ask(guest, heard, END, 1, "T", 2) && has_failed(heard, "ENOMEM"));
	must(!pv_xs_check(world->hub));
	/* Who frees memory may. */
	must(ask(guest, heard, UNWATCH, 0, "data\0mine", 10));
	must(ask(guest, heard, RM, 0, "x", 2));
	must(!ask(guest, heard, MKDIR, 0, "y", 2) && has_failed(heard, "ENOMEM"));
	memory.budget = -1;
	must(ask(guest, heard, MKDIR, 0, "y", 2));
	must(ask(dom0, &world->heard[DOM0], MKDIR, 0, "/new", 5));
	must(!ask(guest, heard, READ, 0, "never", 6) && has_failed(heard, "ENOENT"));
}

static void little(void)
{
	for (int64_t room = 0; room < 3 << 20; room += 99991) {
		struct world world;

		begin(&world);
		for (uint32_t i = 0; i < 10; i++)
			must(tell(&world, &story[i]));
		fill(&world, room);
		end(&world);
	}
	puts("little: done");
}

/* -- none */

struct shared {
	volatile uint32_t n_acknowledged;
	volatile int64_t n_allocations;
};

static void tell_all(struct shared *shared, int journal, int64_t k)
{
	struct world world;

	begin(&world);
	keep_journal(world.hub, journal, 0);
	memory.until = k < 0 ? INT64_MAX : k;
	memory.n_failing = INT64_MAX;
	for (uint32_t i = 0; i < N_LINES; i++) {
		tell(&world, &story[i]);
		must(!pv_xs_journal_flush(world.hub));
		shared->n_acknowledged = i + 1;
	}
	shared->n_allocations = INT64_MAX - memory.until;
	memory.until = INT64_MAX;
	end(&world);
}

/* What the store looks like after each line. */
static void look(char **after)
{
	struct world world;

	begin(&world);
	for (uint32_t i = 0; i <= N_LINES; i++) {
		after[i] = dump(world.hub);
		if (i < N_LINES)
			tell(&world, &story[i]);
	}
	end(&world);
}

static void die(struct shared *shared, int64_t k, char **after)
{
	int journal = new_file(), ends[2], status;
	char said[100] = "", *found;
	struct pv_xs *hub;
	pid_t child;

	must(!pipe(ends));
	shared->n_acknowledged = 0;
	child = fork();
	must(child >= 0);
	if (!child) {
		dup2(ends[1], 2);
		tell_all(shared, journal, k);
		_exit(0);
	}
	close(ends[1]);
	must(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
	must(read(ends[0], said, sizeof said - 1) > 0 && !strcmp(said, "xenstored: no memory left\n"));
	close(ends[0]);
	hub = load(journal);
	found = dump(hub);
	must(shared->n_acknowledged < N_LINES);
	must(!strcmp(found, after[shared->n_acknowledged]) || !strcmp(found, after[shared->n_acknowledged + 1]));
	free(found);
	pv_xs_free(hub);
	close(journal);
}

static void none(int64_t step)
{
	struct shared *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	char *after[N_LINES + 1];
	int journal = new_file();
	int64_t n_allocations;

	look(after);
	tell_all(shared, journal, -1);
	close(journal);
	n_allocations = shared->n_allocations;
	for (int64_t k = 0; k < n_allocations; k += step)
		die(shared, k, after);
	for (uint32_t i = 0; i <= N_LINES; i++)
		free(after[i]);
	printf("none: %ld allocations\n", (long)n_allocations);
}

int main(int argc, char **argv)
{
	once();
	little();
	none(argc > 1 ? atol(argv[1]) : 1);
	return 0;
}
