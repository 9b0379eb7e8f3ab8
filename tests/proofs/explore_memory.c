/* SPDX-License-Identifier: MIT */
/* The explorer's memory: words with all their stores, what each thread may read of them, and races of plain accesses. */
#include <stdio.h>
#include <string.h>

#include "explore_private.h"

#define MAX_STORES 250
#define N_SHADOW 8192
#define N_SITES 4096

struct store {
	uint64_t value;
	struct view view;
};

struct word {
	void *at;
	uint32_t bytes, n;
	uint32_t users, writers;      /* threads, as bits, in any execution */
	struct store stores[MAX_STORES];
};

struct shadow {
	uintptr_t at;
	uint64_t execution;
	int16_t wrote, read[MAX_THREADS];
	uint8_t writer;
};

static struct word words[MAX_WORDS];
static void *word_at[MAX_WORDS];
static struct view global;            /* of everything sequentially consistent */
static struct shadow shadows[N_SHADOW];
static uint8_t reached[N_SITES];
static int n_words, weak_site = -1, weak_level;
static uint64_t execution;            /* over all scenarios */

void weaken_site(int site, int level)
{
	weak_site = site;
	weak_level = level;
}

void memory_begin(int is_new_scenario)
{
	if (is_new_scenario)
		n_words = 0;
	execution++;
	memset(&global, 0, sizeof global);
	for (int i = 0; i < n_words; i++)
		words[i].n = 0;
}

void memory_report_sites(void)
{
	for (int site = 0; site < N_SITES; site++)
		if (reached[site])
			printf("reached %d\n", site);
	memset(reached, 0, sizeof reached);
}

void join(struct view *into, const struct view *other)
{
	for (unsigned i = 0; i < sizeof into->of; i++)
		into->of[i] = into->of[i] > other->of[i] ? into->of[i] : other->of[i];
	for (int i = 0; i <= MAX_THREADS; i++)
		into->clock[i] = into->clock[i] > other->clock[i] ? into->clock[i] : other->clock[i];
}

static uint64_t content(const void *at, uint32_t bytes)
{
	uint64_t value = 0;

	memcpy(&value, at, bytes);
	return value;
}

static int is_several(uint32_t bits)
{
	return (bits & (bits - 1)) != 0;
}

/* Of several users, or several writers, is news that makes more choices. */
static void note_user(uint32_t *bits)
{
	if (*bits >> running & 1)
		return;
	*bits |= 1u << running;
	discovered = 1;
}

/* NULL: so far nobody else uses it, or no execution runs. */
static struct word *shared_word(void *at, uint32_t bytes, int writes)
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
	note_user(&words[i].users);
	if (writes)
		note_user(&words[i].writers);
	if (!is_several(words[i].users))
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

	while (shadow->execution == execution && shadow->at != address)
		shadow = shadow == shadows + N_SHADOW - 1 ? shadows : shadow + 1;
	if (shadow->execution != execution)
		*shadow = (struct shadow){ .at = address, .execution = execution };
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
		me->view.of[number] = (uint8_t)index;
	join(acquires(order) ? &me->view : &me->acquired, &word->stores[index].view);
}

static void write_store(struct word *word, uint64_t value, enum order order, const struct view *inherited)
{
	struct thread *me = &threads[running];
	int number = (int)(word - words);
	struct store *store = &word->stores[word->n];

	if (word->n == MAX_STORES)
		violation("too many stores");
	me->view.of[number] = (uint8_t)word->n;
	store->value = value;
	store->view = releases(order) ? me->view : me->released;
	if (inherited)
		join(&store->view, inherited);
	if (order == SEQ_CST)
		global.of[number] = (uint8_t)word->n;
	changes += value != word->stores[word->n - 1].value;
	word->n++;
	me->fresh = 0;
	me->quiet = 0;
	memcpy(word->at, &value, word->bytes);
}

uint64_t explore_load(const void *at, uint32_t bytes, enum order order, int site)
{
	struct word *word = shared_word((void *)at, bytes, 0);
	uint32_t oldest, newest, index;

	order = weaken(order, site, 0);
	if (running >= 0)
		check_written(at);
	if (!word)
		return content(at, bytes);
	if (order == SEQ_CST)
		point();
	else
		point_before_load();
	oldest = threads[running].view.of[word - words];
	if (order == SEQ_CST && global.of[word - words] > oldest)
		oldest = global.of[word - words];
	newest = word->n - 1;
	if (threads[running].fresh == changes + 1)
		oldest = newest;
	index = newest - (uint32_t)choose((int)(newest - oldest + 1));
	read_store(word, index, order);
	return word->stores[index].value;
}

/* Nobody has to come between this store, if it is the only writer's, and what its thread does before it: others may still
 * read the store before. They come before the next load. */
void explore_store(void *at, uint32_t bytes, uint64_t value, enum order order, int site)
{
	struct word *word = shared_word(at, bytes, 1);

	order = weaken(order, site, 0);
	if (!word) {
		memcpy(at, &value, bytes);
		return;
	}
	if (is_several(word->writers))
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
	struct word *word = shared_word(at, bytes, 1);
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
	struct word *word = shared_word(at, bytes, 1);
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

void explore_fence_one_way(int is_acquire, int site)
{
	struct thread *me = &threads[running];

	reached[site] = 1;
	if (running < 0 || site == weak_site)
		return;
	if (is_acquire)
		join(&me->view, &me->acquired);
	else
		me->released = me->view;
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

/* -- plain accesses, noticed by their TSan calls */

static void plain(const void *at, int is_write)
{
	struct thread *me = &threads[running];
	struct shadow *shadow;

	if (is_on_a_stack(at))
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

/* Out of words that their owner writes by relaxed stores: any that may be read, each for itself. */
void explore_copy_racing(void *to, const void *from, uint64_t n)
{
	for (uint64_t i = 0; i < n; i += sizeof(uint64_t)) {
		uint64_t word = explore_load((const uint8_t *)from + i, sizeof word, RELAXED, NO_SITE);

		memcpy((uint8_t *)to + i, &word, sizeof word);
	}
}

void write_word(uint64_t *at, uint64_t value)
{
	explore_store(at, sizeof *at, value, RELAXED, NO_SITE);
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
