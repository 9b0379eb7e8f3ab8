// SPDX-License-Identifier: MIT
/*
 * Makes calls of one shared object into libc fail. The object's own table of imported functions is pointed at the hooks
 * below; nobody else's calls pass here. Up to HOOKS functions at a time, each with at most six integer or pointer
 * arguments, which are handed on as they came. Some names mean system calls that the object makes by syscall(2).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define HOOKS 4

typedef long function(long, long, long, long, long, long);

struct hook {
	function *real;
	function **entry;
	long first, last, result;        /* calls first..last give `result` and set `error`, without being made */
	const long *numbers;             /* of the system calls that count, NULL for all calls */
	int error;
	atomic_long calls;
};

static struct hook hooks[HOOKS];

/* What is called by its number. */
static const struct by_number {
	const char *name;
	long numbers[2];
} by_numbers[] = {
	{"preadv", {SYS_pread64, SYS_preadv}},
	{"pwritev", {SYS_pwrite64, SYS_pwritev}},
};

static long answer(struct hook *hook, long a, long b, long c, long d, long e, long f)
{
	long call;

	if (hook->numbers && a != hook->numbers[0] && a != hook->numbers[1])
		return hook->real(a, b, c, d, e, f);
	call = atomic_fetch_add(&hook->calls, 1) + 1;
	if (call < hook->first || call > hook->last)
		return hook->real(a, b, c, d, e, f);
	errno = hook->error;
	return hook->result;
}

#define HOOK(n)                                                                \
	static long hook_##n(long a, long b, long c, long d, long e, long f)   \
	{                                                                      \
		return answer(&hooks[n], a, b, c, d, e, f);                    \
	}

HOOK(0)
HOOK(1)
HOOK(2)
HOOK(3)

static function *const hook_functions[HOOKS] = {hook_0, hook_1, hook_2, hook_3};

struct search {
	const char *object, *name;
	function **entry;
};

/* glibc has put the load address on to the pointers of the dynamic section, or not, by architecture. */
static const void *at(const struct dl_phdr_info *info, ElfW(Addr) address)
{
	return (const void *)(address < info->dlpi_addr ? address + info->dlpi_addr : address);
}

static void look_in(struct search *search, const struct dl_phdr_info *info, const ElfW(Rela) *rows, size_t bytes,
		    const ElfW(Sym) *symbols, const char *names)
{
	for (size_t i = 0; i < bytes / sizeof *rows; i++) {
		const ElfW(Sym) *symbol = &symbols[ELF64_R_SYM(rows[i].r_info)];

		if (strcmp(names + symbol->st_name, search->name) == 0 && symbol->st_shndx == SHN_UNDEF)
			search->entry = (function **)(info->dlpi_addr + rows[i].r_offset);
	}
}

static int look_at(struct dl_phdr_info *info, __attribute__((unused)) size_t size, void *data)
{
	struct search *search = data;
	const ElfW(Dyn) *dynamic = NULL;
	const void *calls = NULL, *others = NULL, *symbols = NULL, *names = NULL;
	size_t calls_bytes = 0, others_bytes = 0;

	if (strcmp(info->dlpi_name, search->object) != 0)
		return 0;
	for (int i = 0; i < info->dlpi_phnum; i++)
		if (info->dlpi_phdr[i].p_type == PT_DYNAMIC)
			dynamic = (const void *)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
	for (; dynamic && dynamic->d_tag != DT_NULL; dynamic++) {
		switch (dynamic->d_tag) {
		case DT_JMPREL: calls = at(info, dynamic->d_un.d_ptr); break;
		case DT_PLTRELSZ: calls_bytes = dynamic->d_un.d_val; break;
		case DT_RELA: others = at(info, dynamic->d_un.d_ptr); break;
		case DT_RELASZ: others_bytes = dynamic->d_un.d_val; break;
		case DT_SYMTAB: symbols = at(info, dynamic->d_un.d_ptr); break;
		case DT_STRTAB: names = at(info, dynamic->d_un.d_ptr); break;
		}
	}
	look_in(search, info, others, others_bytes, symbols, names);
	look_in(search, info, calls, calls_bytes, symbols, names);
	return 1;
}

static int point(function **entry, function *target)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);

	if (mprotect((void *)((uintptr_t)entry & ~(page - 1)), page, PROT_READ | PROT_WRITE))
		return -errno;
	__atomic_store_n(entry, target, __ATOMIC_SEQ_CST);
	return 0;
}

static const long *numbers_of(const char *name)
{
	for (size_t i = 0; i < sizeof by_numbers / sizeof *by_numbers; i++)
		if (strcmp(by_numbers[i].name, name) == 0)
			return by_numbers[i].numbers;
	return NULL;
}

/* Whom a hook of that entry hands its calls to: another hook that stands there, which will be unhooked later. */
static function *below(function **entry, function *real)
{
	for (int n = 0; n < HOOKS; n++)
		if (*entry == hook_functions[n])
			return *entry;
	return real;
}

/* A hook's number, -ENOENT when `object` (its path) does not call `name`, -EBUSY when all hooks are in use. */
int faults_hook(const char *object, const char *name, long first, long last, long result, int error)
{
	const long *numbers = numbers_of(name);
	struct search search = {.object = object, .name = numbers ? "syscall" : name};
	function *real;
	int n = 0, failed;

	dl_iterate_phdr(look_at, &search);
	if (!search.entry)
		return -ENOENT;
	while (n < HOOKS && hooks[n].entry)
		n++;
	if (n == HOOKS)
		return -EBUSY;
	real = (function *)dlsym(RTLD_DEFAULT, search.name);
	hooks[n] = (struct hook){.real = below(search.entry, real), .entry = search.entry, .first = first, .last = last,
				 .result = result, .numbers = numbers, .error = error};
	failed = point(search.entry, hook_functions[n]);
	if (failed)
		hooks[n].entry = NULL;
	return failed ? failed : n;
}

void faults_unhook(int n)
{
	point(hooks[n].entry, hooks[n].real);
	hooks[n].entry = NULL;
}

long faults_calls(int n)
{
	return atomic_load(&hooks[n].calls);
}
