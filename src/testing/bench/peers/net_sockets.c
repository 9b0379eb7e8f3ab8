/* SPDX-License-Identifier: MIT */
/*
 * Frames between two pinned processes over sockets of the kernel, in bursts of one system call.
 *
 *   net_sockets unix SIZE BURST SECONDS CPU CPU             datagrams over a pair of Unix sockets
 *   net_sockets packet SIZE BURST SECONDS CPU CPU ONE OTHER frames from interface ONE to interface OTHER, AF_PACKET
 *
 * Prints what was sent and what arrived, in JSON.
 */
#include "pinned.h"

#include <arpa/inet.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define MOST_BURST 256
#define TYPE 0x88B5
#define WAIT_MS 50

static struct shared {
	uint64_t arrived;
	double cpu_s;
	uint32_t ready, stop;
} *shared;

static uint8_t frame[65536], room[MOST_BURST][65536];

static void fail(const char *what)
{
	perror(what);
	exit(CANNOT_RUN);
}

static double cpu_s(void)
{
	struct rusage used;

	getrusage(RUSAGE_SELF, &used);
	return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) + (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static int open_packet(const char *name, int receives)
{
	struct sockaddr_ll at = {.sll_family = AF_PACKET, .sll_protocol = htons(TYPE), .sll_ifindex = (int)if_nametoindex(name)};
	int fd = socket(AF_PACKET, SOCK_RAW, receives ? htons(TYPE) : 0), bytes = 8 << 20;

	if (fd < 0 || !at.sll_ifindex)
		fail(name);
	if (!receives)
		at.sll_protocol = 0;
	setsockopt(fd, SOL_SOCKET, receives ? SO_RCVBUF : SO_SNDBUF, &bytes, sizeof(bytes));
	if (bind(fd, (struct sockaddr *)&at, sizeof(at)))
		fail("bind");
	return fd;
}

static void take(int fd, unsigned burst, size_t size)
{
	static struct mmsghdr messages[MOST_BURST];
	static struct iovec parts[MOST_BURST];
	double before = cpu_s();
	uint64_t arrived = 0;

	for (unsigned i = 0; i < burst; i++) {
		parts[i] = (struct iovec){room[i], size};
		messages[i].msg_hdr = (struct msghdr){.msg_iov = &parts[i], .msg_iovlen = 1};
	}
	__atomic_store_n(&shared->ready, 1, __ATOMIC_RELEASE);
	for (;;) {
		int n = recvmmsg(fd, messages, burst, MSG_DONTWAIT, NULL);
		struct pollfd wanted = {fd, POLLIN, 0};

		if (n > 0)
			arrived += (uint64_t)n;
		else if (poll(&wanted, 1, WAIT_MS) == 0 && __atomic_load_n(&shared->stop, __ATOMIC_ACQUIRE))
			break;
	}
	shared->arrived = arrived;
	shared->cpu_s = cpu_s() - before;
	_exit(0);
}

int main(int argc, char **argv)
{
	size_t size = argc > 2 ? strtoul(argv[2], NULL, 10) : 0;
	unsigned burst = argc > 3 ? (unsigned)atoi(argv[3]) : 0;
	double seconds = argc > 4 ? atof(argv[4]) : 0;
	static struct mmsghdr messages[MOST_BURST];
	struct iovec part = {frame, size};
	uint64_t sent = 0;
	int64_t start, now;
	double before;
	int fds[2], is_unix = argc == 7 && !strcmp(argv[1], "unix");
	pid_t child;

	if (!(is_unix || argc == 9) || size < 14 || size > 65535 || !burst || burst > MOST_BURST || seconds <= 0)
		return 2;
	shared = share(sizeof(*shared));
	if (is_unix) {
		if (socketpair(AF_UNIX, SOCK_DGRAM, 0, fds))
			fail("socketpair");
	} else {
		fds[0] = open_packet(argv[7], 0);
		fds[1] = open_packet(argv[8], 1);
	}
	memset(frame, 0xFF, 6);
	frame[6] = 2;
	frame[12] = TYPE >> 8;
	frame[13] = TYPE & 0xFF;
	child = fork();
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		pin(atoi(argv[6]));
		take(fds[1], burst, size);
	}
	pin(atoi(argv[5]));
	while (!__atomic_load_n(&shared->ready, __ATOMIC_ACQUIRE))
		;
	for (unsigned i = 0; i < burst; i++)
		messages[i].msg_hdr = (struct msghdr){.msg_iov = &part, .msg_iovlen = 1};
	before = cpu_s();
	start = now_ns();
	do {
		int n = sendmmsg(fds[0], messages, burst, 0);

		if (n > 0)
			sent += (uint64_t)n;
		else if (errno != ENOBUFS && errno != EAGAIN)
			fail("sendmmsg");
		now = now_ns();
	} while ((double)(now - start) < seconds * 1e9);
	before = cpu_s() - before;
	__atomic_store_n(&shared->stop, 1, __ATOMIC_RELEASE);
	waitpid(child, NULL, 0);
	printf("{\"sent\": %llu, \"arrived\": %llu, \"seconds\": %.9f, \"front_cpu_s\": %.6f, \"back_cpu_s\": %.6f}\n",
	       (unsigned long long)sent, (unsigned long long)shared->arrived, (double)(now - start) / 1e9, before, shared->cpu_s);
	return 0;
}
