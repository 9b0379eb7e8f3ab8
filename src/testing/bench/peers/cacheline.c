/* SPDX-License-Identifier: MIT */
/* `cacheline CPU CPU SECONDS`: prints the round trip of one cache line between two CPUs, in ns. */
#include "pinned.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define ROUNDS_PER_CLOCK_READ 256

static void wait_for(uint64_t *line, uint64_t value)
{
	while (__atomic_load_n(line, __ATOMIC_ACQUIRE) != value)
		;
}

static void answer(uint64_t *line)
{
	uint64_t value;

	while ((value = __atomic_load_n(line, __ATOMIC_ACQUIRE)) != UINT64_MAX)
		if (value & 1)
			__atomic_store_n(line, value + 1, __ATOMIC_RELEASE);
}

static double ask(uint64_t *line, double seconds)
{
	int64_t start = now_ns(), now;
	uint64_t value = 0;

	do {
		for (int i = 0; i < ROUNDS_PER_CLOCK_READ; i++, value += 2) {
			__atomic_store_n(line, value + 1, __ATOMIC_RELEASE);
			wait_for(line, value + 2);
		}
		now = now_ns();
	} while ((double)(now - start) < seconds * 1e9);
	__atomic_store_n(line, UINT64_MAX, __ATOMIC_RELEASE);
	return (double)(now - start) / ((double)value / 2);
}

int main(int argc, char **argv)
{
	uint64_t *line;

	if (argc != 4)
		return 2;
	line = share(4096);
	*line = 1;
	if (!fork()) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		pin(atoi(argv[2]));
		answer(line);
		_exit(0);
	}
	pin(atoi(argv[1]));
	wait_for(line, 2);
	printf("%.1f\n", ask(line, atof(argv[3])));
	wait(NULL);
	return 0;
}
