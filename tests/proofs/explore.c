/* SPDX-License-Identifier: MIT */
/*
 * Runs the real C code in every schedule up to a bound of preemptions, with every stale read that C11 allows.
 *
 * Memory is a list of stores for each word. A thread has a view: of each word, the oldest store it may still read. A load
 * may read any store that is not older; a release store carries the thread's view, an acquire load of it takes that over;
 * sequentially consistent fences and accesses exchange views with one global view. (That is RC11: no load reads what is
 * stored later in the schedule. Words are written by one thread, or by read-modify-writes, so the order of stores is the
 * order of the schedule.) membarrier is a fence here, one in every other thread, and one here again.
 *
 * Plain accesses come in through the compiler's ThreadSanitizer calls; two of them that nothing orders are a violation.
 * So is an execution in which nobody can go on.
 *
 * explore BOUND [SITE LEVEL]: LEVEL 1, 2 weaken the access SITE by one or two steps. Exits with 1 at a violation.
 */
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <ucontext.h>

#include "explore.h"
#include "explore_shim.h"

#undef memcpy

#define MAX_WORDS 60
#define MAX_STORES 96
#define MAX_CHOICES 4000
#define STACK_BYTES 65536
#define N_SHADOW 8192
#define MAX_FDS 16
#define N_SITES 4096

struct view {
	uint16_t of[MAX_WORDS];       /* the oldest store that may be read */
	uint16_t clock[MAX_THREADS + 1];
};

struct store {
	uint64_t value;
	struct view view;
};

struct word {
	void *at;
	uint32_t bytes, threads, n;   /* threads: bits of who has used it in any execution */
	struct store stores[MAX_STORES];
};

struct shadow {
	uintptr_t at;
	uint64_t execution;
	uint16_t wrote, read[MAX_THREADS];
	uint8_t writer;
};

enum wait { RUNS, ENDED, WAITS_SIGNAL, WAITS_BELL, WAITS_CHANGE };

struct thread {
	struct view view, acquired, released;
	jmp_buf here;
	enum wait wait;
	int argument;                 /* the signal or epoll descriptor that it waits for */
	uint64_t changes;             /* stores it knew of when it began to wait for a change */
	int fresh;                    /* reads the newest: it has waited for a change in vain */
	void (*body)(void);
};

static struct word words[MAX_WORDS];
static void *word_at[MAX_WORDS];
static struct thread threads[MAX_THREADS];
static struct view global;            /* of everything sequentially consistent */
static struct shadow shadows[N_SHADOW];
static uint8_t stacks[MAX_THREADS][STACK_BYTES] __attribute__((aligned(64)));
static uint8_t reached[N_SITES];
static int n_words, n_threads, running = -1, preemptions, bound, weak_site = -1, weak_level, discovered, aborted;
static int signals[MAX_THREADS], fd_rung[MAX_FDS], fd_of[MAX_FDS], fd_orders[MAX_FDS], n_fds;
static struct view fd_view[MAX_FDS], signal_view[MAX_THREADS];
static uint64_t executions, all_executions, changes;
static jmp_buf scheduler;
static const char *scenario_name;

/* -- choices: depth first */

static uint8_t chosen[MAX_CHOICES], of_n[MAX_CHOICES];
static int depth, n_chosen;

static int choose(int n)
{
	if (n == 1)
		return 0;
	if (depth == MAX_CHOICES)
		violation("too long");
	if (depth == n_chosen) {
		chosen[n_chosen] = 0;
		of_n[n_chosen++] = (uint8_t)n;
	} else if (of_n[depth] != n) {
		violation("not deterministic");
	}
	return chosen[depth++];
}

static int next_choice(void)
{
	while (n_chosen && chosen[n_chosen - 1] + 1 == of_n[n_chosen - 1])
		n_chosen--;
	if (n_chosen)
		chosen[n_chosen - 1]++;
	return n_chosen;
}

void violation(const char *what)
{
	/* Until every shared word is known as one, executions mean nothing. */
	if (discovered && running >= 0) {
		aborted = 1;
		running = -1;
		_longjmp(scheduler, 1);
	}
	printf("%s: %s (execution %lu, thread %d)\n", scenario_name, what, (unsigned long)executions, running);
	exit(1);
}

static void join(struct view *into, const struct view *other);

/* -- threads */

static int bell_of(int epoll_fd)
{
	for (int fd = 1; fd < n_fds; fd++)
		if (fd_rung[fd] && fd_of[fd] == epoll_fd)
			return fd;
	return 0;
}

static int can_run(const struct thread *thread)
{
	switch (thread->wait) {
	case RUNS: return 1;
	case WAITS_SIGNAL: return signals[thread->argument];
	case WAITS_BELL: return bell_of(thread->argument);
	case WAITS_CHANGE: return thread->changes != changes;
	default: return 0;
	}
}

static void go_to(int number)
{
	int from = running;

	if (number == from)
		return;
	running = number;
	threads[number].wait = RUNS;
	if (!_setjmp(from < 0 ? scheduler : threads[from].here))
		_longjmp(threads[number].here, 1);
}

/* Nobody can run: who waits for a change reads the newest now; if that was the newest, everything stands still. */
static int last_resort(void)
{
	for (int i = 0; i < n_threads; i++) {
		if (threads[i].wait == WAITS_CHANGE && !threads[i].fresh) {
			threads[i].fresh = 1;
			return i;
		}
	}
	return -1;
}

/* The running thread waits or has ended: somebody else goes on. */
static void give_way(void)
{
	int able[MAX_THREADS], n = 0, ended = 0;

	for (int i = 0; i < n_threads; i++) {
		ended += threads[i].wait == ENDED;
		if (can_run(&threads[i]))
			able[n++] = i;
	}
	if (ended == n_threads) {
		running = -1;
		_longjmp(scheduler, 1);
	}
	if (n == 0 && (able[0] = last_resort()) >= 0)
		n = 1;
	if (n == 0)
		violation("everybody waits");
	go_to(able[choose(n)]);
	threads[running].wait = RUNS;
}

/* Before an access that others can see: another thread may come first. */
static void point(void)
{
	int able[MAX_THREADS] = { running }, n = 1;

	if (preemptions == bound)
		return;
	for (int i = 0; i < n_threads; i++)
		if (i != running && can_run(&threads[i]))
			able[n++] = i;
	n = choose(n);
	if (n) {
		preemptions++;
		go_to(able[n]);
	}
}

static void run_thread(int number)
{
	if (!_setjmp(threads[number].here))
		_longjmp(scheduler, 1);
	for (;;) {
		threads[number].body();
		threads[number].wait = ENDED;
		if (!_setjmp(threads[number].here))
			give_way();
	}
}

static void make_threads(void)
{
	static ucontext_t first;

	volatile int i;

	for (i = 0; i < n_threads; i++) {
		getcontext(&first);
		first.uc_stack.ss_sp = stacks[i];
		first.uc_stack.ss_size = STACK_BYTES;
		makecontext(&first, (void (*)(void))run_thread, 1, i);
		if (!_setjmp(scheduler))
			setcontext(&first);
	}
}

void raise_signal(int number)
{
	point();
	signals[number] = 1;
}

void end_process(int number)
{
	raise_signal(number);
	join(&signal_view[number], &threads[running].view);
}

void await_signal(int number)
{
	point();
	if (!signals[number]) {
		threads[running].wait = WAITS_SIGNAL;
		threads[running].argument = number;
		give_way();
	}
	signals[number] = 0;
	join(&threads[running].view, &signal_view[number]);
}

void await_change(void)
{
	struct thread *me = &threads[running];

	/* It stays fresh when the newest was not enough: it is not asked again. */
	me->fresh &= me->changes == changes;
	me->wait = WAITS_CHANGE;
	me->changes = changes;
	give_way();
}

int explore_yield(void)
{
	await_change();
	return 0;
}

/* -- views */

static void join(struct view *into, const struct view *other)
{
	for (int i = 0; i < MAX_WORDS; i++)
		into->of[i] = into->of[i] > other->of[i] ? into->of[i] : other->of[i];
	for (int i = 0; i < MAX_THREADS; i++)
		into->clock[i] = into->clock[i] > other->clock[i] ? into->clock[i] : other->clock[i];
}

static uint64_t content(const void *at, uint32_t bytes)
{
	uint64_t value = 0;

	memcpy(&value, at, bytes);
	return value;
}

/* NULL: so far nobody else uses it, or no execution runs. */
static struct word *shared_word(void *at, uint32_t bytes)
{
	int i = 0;

	if (running < 0)
		return NULL;
	while (i < n_words && word_at[i] != at)
		i++;
	if (i == n_words) {
		if (n_words++ == MAX_WORDS)
			violation("too many words");
		word_at[i] = at;
		words[i] = (struct word){ .at = at, .bytes = bytes };
	}
	if (!(words[i].threads >> running & 1)) {
		words[i].threads |= 1u << running;
		discovered = 1;
	}
	if (!(words[i].threads & (words[i].threads - 1)))
		return NULL;
	if (words[i].n == 0)
		words[i].stores[words[i].n++] = (struct store){ .value = content(at, bytes) };
	return &words[i];
}

/* What is known of plain accesses to these four bytes; a plain write by another thread has to be ordered before this. */
static struct shadow *check_written(const void *at)
{
	uintptr_t address = (uintptr_t)at & ~(uintptr_t)3;
	struct shadow *shadow = &shadows[(address >> 2) % N_SHADOW];

	while (shadow->execution == all_executions && shadow->at != address)
		shadow = shadow == shadows + N_SHADOW - 1 ? shadows : shadow + 1;
	if (shadow->execution != all_executions)
		*shadow = (struct shadow){ .at = address, .execution = all_executions };
	if (shadow->wrote > threads[running].view.clock[shadow->writer])
		violation("unordered accesses: written and used");
	return shadow;
}

static enum order weaken(enum order order, int site, int is_rmw)
{
	reached[site] = 1;
	if (site != weak_site)
		return order;
	if (order == SEQ_CST && weak_level == 1)
		return is_rmw ? ACQ_REL : ACQUIRE;
	return RELAXED;
}

static int acquires(enum order order)
{
	return order == ACQUIRE || order >= ACQ_REL;
}

static int releases(enum order order)
{
	return order >= RELEASE;
}

static void read_store(struct word *word, uint32_t index, enum order order)
{
	struct thread *me = &threads[running];
	int number = (int)(word - words);

	if (me->view.of[number] < index)
		me->view.of[number] = (uint16_t)index;
	join(acquires(order) ? &me->view : &me->acquired, &word->stores[index].view);
}

static void write_store(struct word *word, uint64_t value, enum order order, const struct view *inherited)
{
	struct thread *me = &threads[running];
	int number = (int)(word - words);
	struct store *store = &word->stores[word->n];

	if (word->n == MAX_STORES)
		violation("too many stores");
	me->view.of[number] = (uint16_t)word->n;
	store->value = value;
	store->view = releases(order) ? me->view : me->released;
	if (inherited)
		join(&store->view, inherited);
	if (order == SEQ_CST)
		global.of[number] = (uint16_t)word->n;
	changes += value != word->stores[word->n - 1].value;
	word->n++;
	me->fresh = 0;
	memcpy(word->at, &value, word->bytes);
}

uint64_t explore_load(const void *at, uint32_t bytes, enum order order, int site)
{
	struct word *word = shared_word((void *)at, bytes);
	uint32_t oldest, newest, index;

	order = weaken(order, site, 0);
	if (running >= 0)
		check_written(at);
	if (!word)
		return content(at, bytes);
	point();
	oldest = threads[running].view.of[word - words];
	if (order == SEQ_CST && global.of[word - words] > oldest)
		oldest = global.of[word - words];
	newest = word->n - 1;
	if (threads[running].fresh)
		oldest = newest;
	index = newest - (uint32_t)choose((int)(newest - oldest + 1));
	read_store(word, index, order);
	return word->stores[index].value;
}

void explore_store(void *at, uint32_t bytes, uint64_t value, enum order order, int site)
{
	struct word *word = shared_word(at, bytes);

	order = weaken(order, site, 0);
	if (!word) {
		memcpy(at, &value, bytes);
		return;
	}
	point();
	write_store(word, value, order, NULL);
}

static uint64_t changed(uint64_t before, enum rmw what, uint64_t value)
{
	switch (what) {
	case OR: return before | value;
	case AND: return before & value;
	case ADD: return before + value;
	default: return value;
	}
}

uint64_t explore_rmw(void *at, uint32_t bytes, enum rmw what, uint64_t value, enum order order, int site)
{
	struct word *word = shared_word(at, bytes);
	uint64_t before;

	order = weaken(order, site, 1);
	if (word) {
		point();
		read_store(word, word->n - 1, order);
	}
	before = content(at, bytes);
	value = changed(before, what, value);
	if (word)
		write_store(word, value, order, &word->stores[word->n - 1].view);
	else
		memcpy(at, &value, bytes);
	return before;
}

int explore_compare_exchange(void *at, uint32_t bytes, void *expected, uint64_t desired, int site)
{
	struct word *word = shared_word(at, bytes);
	enum order order = weaken(SEQ_CST, site, 1);

	if (word) {
		point();
		read_store(word, word->n - 1, order);
	}
	if (memcmp(at, expected, bytes)) {
		memcpy(expected, at, bytes);
		return 0;
	}
	if (word)
		write_store(word, desired, order, &word->stores[word->n - 1].view);
	else
		memcpy(at, &desired, bytes);
	return 1;
}

static void fence(struct thread *thread, int with_global)
{
	join(&thread->view, &thread->acquired);
	if (with_global) {
		join(&thread->view, &global);
		join(&global, &thread->view);
	}
	thread->released = thread->view;
}

/* Level 1: acquire and release only; 2: nothing. */
void explore_fence(int site)
{
	reached[site] = 1;
	if (running < 0 || (site == weak_site && weak_level == 2))
		return;
	point();
	fence(&threads[running], site != weak_site);
}

int explore_membarrier(int site)
{
	reached[site] = 1;
	if (running < 0 || (site == weak_site && weak_level == 2))
		return 0;
	for (int step = 0; step < 3; step++) {
		point();
		if (step != 1)
			fence(&threads[running], 1);
		else if (site != weak_site)
			for (int i = 0; i < n_threads; i++)
				fence(&threads[i], 1);
	}
	return 0;
}

/*
 * -- descriptors: one that was written makes the epoll descriptor it belongs to ready. A doorbell orders no memory, which
 * asks more of the code than a kernel does; an eventfd of this process does, by the lock in it.
 */

int explore_open(void)
{
	if (++n_fds > MAX_FDS)
		violation("too many descriptors");
	return n_fds - 1;
}

int explore_eventfd(void)
{
	int fd = explore_open();

	fd_orders[fd] = 1;
	return fd;
}

int explore_epoll_ctl(int epoll_fd, int operation, int fd)
{
	fd_of[fd] = operation == EPOLL_CTL_ADD ? epoll_fd : 0;
	return 0;
}

int explore_epoll_wait(int epoll_fd, struct epoll_event *events, int max, int timeout_ms)
{
	int n = 0;

	point();
	if (!bell_of(epoll_fd) && timeout_ms) {
		threads[running].wait = WAITS_BELL;
		threads[running].argument = epoll_fd;
		give_way();
	}
	for (int fd = 1; fd < n_fds && n < max; fd++)
		if (fd_rung[fd] && fd_of[fd] == epoll_fd)
			events[n++].data.fd = fd;
	return n;
}

long explore_read(int fd)
{
	point();
	if (!fd_rung[fd])
		return -1;
	fd_rung[fd] = 0;
	if (fd_orders[fd])
		join(&threads[running].view, &fd_view[fd]);
	return 8;
}

long explore_write(int fd)
{
	if (running >= 0) {
		point();
		if (fd_orders[fd])
			join(&fd_view[fd], &threads[running].view);
	}
	fd_rung[fd] = 1;
	return 8;
}

/* -- plain accesses, noticed by their TSan calls */

static void plain(const void *at, int is_write)
{
	struct thread *me = &threads[running];
	struct shadow *shadow;

	if ((uintptr_t)at - (uintptr_t)stacks < sizeof stacks)
		return;
	shadow = check_written(at);
	if (!is_write) {
		shadow->read[running] = ++me->view.clock[running];
		return;
	}
	for (int i = 0; i < n_threads; i++)
		if (shadow->read[i] > me->view.clock[i])
			violation("unordered accesses: read and overwritten");
	shadow->wrote = ++me->view.clock[running];
	shadow->writer = (uint8_t)running;
}

static void plain_range(const void *at, uint64_t n, int is_write)
{
	if (running >= 0)
		for (uint64_t i = 0; i < n; i += 4)
			plain((const uint8_t *)at + i, is_write);
}

void explore_copy(void *to, const void *from, uint64_t n)
{
	plain_range(from, n, 0);
	plain_range(to, n, 1);
	memcpy(to, from, n);
}

#define SIZED(bytes)                                                                                    \
	void __tsan_read##bytes(void *at);                                                              \
	void __tsan_write##bytes(void *at);                                                             \
	void __tsan_unaligned_read##bytes(void *at);                                                    \
	void __tsan_unaligned_write##bytes(void *at);                                                   \
	void __tsan_read##bytes(void *at) { plain_range(at, bytes, 0); }                                \
	void __tsan_write##bytes(void *at) { plain_range(at, bytes, 1); }                               \
	void __tsan_unaligned_read##bytes(void *at) { plain_range(at, bytes, 0); }                      \
	void __tsan_unaligned_write##bytes(void *at) { plain_range(at, bytes, 1); }

SIZED(1)
SIZED(2)
SIZED(4)
SIZED(8)
SIZED(16)

void __tsan_init(void);
void __tsan_func_entry(void *caller);
void __tsan_func_exit(void);
void __tsan_read_range(void *at, uint64_t n);
void __tsan_write_range(void *at, uint64_t n);
void __tsan_init(void) {}
void __tsan_func_entry(void *caller) { (void)caller; }
void __tsan_func_exit(void) {}
void __tsan_read_range(void *at, uint64_t n) { plain_range(at, n, 0); }
void __tsan_write_range(void *at, uint64_t n) { plain_range(at, n, 1); }

/* -- executions */

static void execute(const struct scenario *scenario)
{
	depth = preemptions = 0;
	changes = 0;
	executions++;
	all_executions++;
	n_fds = 1;
	memset(signals, 0, sizeof signals);
	memset(signal_view, 0, sizeof signal_view);
	memset(fd_rung, 0, sizeof fd_rung);
	memset(fd_orders, 0, sizeof fd_orders);
	memset(fd_view, 0, sizeof fd_view);
	memset(&global, 0, sizeof global);
	for (int i = 0; i < n_words; i++)
		words[i].n = 0;
	scenario->set_up();
	for (int i = 0; i < n_threads; i++) {
		struct thread *thread = &threads[i];

		memset(&thread->view, 0, sizeof thread->view);
		thread->acquired = thread->released = thread->view;
		thread->wait = RUNS;
		thread->fresh = 0;
		thread->body = scenario->bodies[i];
	}
	go_to(choose(n_threads));
	if (!aborted && !scenario->good())
		violation("did not end well");
}

static void explore(const struct scenario *scenario, int with_bound)
{
	bound = with_bound > scenario->less ? with_bound - scenario->less : 0;
	scenario_name = scenario->name;
	for (n_threads = 0; n_threads < MAX_THREADS && scenario->bodies[n_threads];)
		n_threads++;
	executions = 0;
	n_words = 0;
	make_threads();
	do {
		/* A word that turns out to be shared makes more choices: begin again. */
		if (discovered)
			n_chosen = 0;
		if (aborted)
			make_threads();
		discovered = aborted = 0;
		execute(scenario);
	} while (discovered || next_choice());
	printf("%s: %lu executions\n", scenario->name, (unsigned long)executions);
}

int main(int argc, char **argv)
{
	int with_bound = argc > 1 ? atoi(argv[1]) : 2;

	if (argc > 3) {
		weak_site = atoi(argv[2]);
		weak_level = atoi(argv[3]);
	}
	for (int i = 0; i < n_scenarios; i++)
		explore(&scenarios[i], with_bound);
	for (int site = 0; site < N_SITES; site++)
		if (reached[site])
			printf("reached %d\n", site);
	return 0;
}
