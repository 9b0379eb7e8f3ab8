/* SPDX-License-Identifier: MIT */
#include <sys/mman.h>
#include <unistd.h>

#include "pv_atomic.h"
#include "pv_home.h"

static uint32_t without_page;
static uint32_t *word = &without_page;

__attribute__((constructor)) static void make_page(void)
{
	void *page = mmap(NULL, (size_t)sysconf(_SC_PAGESIZE), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	/* A kernel before 4.14 has no MADV_WIPEONFORK: the word works, a fork goes unnoticed. */
	if (page != MAP_FAILED && madvise(page, (size_t)sysconf(_SC_PAGESIZE), MADV_WIPEONFORK) == 0)
		word = page;
	pv_store_relaxed(word, (uint32_t)getpid());
}

uint32_t pv_home_mark(void)
{
	/* Zero only in a forked child's first call: threads that meet here all write the same value. */
	if (pv_load_relaxed(word) == 0)
		pv_store_relaxed(word, (uint32_t)getpid());
	return pv_load_relaxed(word);
}

int pv_home_is_here(uint32_t mark)
{
	return pv_load_relaxed(word) == mark;
}

const uint32_t *pv_home_word(void)
{
	return word;
}
