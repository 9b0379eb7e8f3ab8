/* SPDX-License-Identifier: MIT */
/*
 * The explorer's system calls: signals, descriptors and time.
 *
 * A descriptor that was written makes the epoll descriptor it belongs to ready. A doorbell orders no memory, which asks
 * more of the code than a kernel does; an eventfd of this process does, by the lock in it. Time goes on whenever somebody
 * looks at it, by more than a delay of an EOI takes, so a timer rings as soon as it is set.
 */
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>

#include "explore_private.h"

#undef clock_gettime

#define MAX_FDS 16

static int signals[MAX_THREADS], fd_rung[MAX_FDS], fd_of[MAX_FDS], fd_orders[MAX_FDS], n_fds;
static struct view fd_view[MAX_FDS], signal_view[MAX_THREADS];
static int64_t now_s;

void system_begin(void)
{
	n_fds = 1;
	now_s = 1;
	memset(signals, 0, sizeof signals);
	memset(signal_view, 0, sizeof signal_view);
	memset(fd_rung, 0, sizeof fd_rung);
	memset(fd_orders, 0, sizeof fd_orders);
	memset(fd_view, 0, sizeof fd_view);
}

int has_signal(int number)
{
	return signals[number];
}

int has_bell(int epoll_fd)
{
	for (int fd = 1; fd < n_fds; fd++)
		if (fd_rung[fd] && fd_of[fd] == epoll_fd)
			return 1;
	return 0;
}

void raise_signal(int number)
{
	point();
	signals[number] = 1;
	threads[running].quiet = 0;
}

void end_process(int number)
{
	raise_signal(number);
	join(&signal_view[number], &threads[running].view);
}

static void sleep_on(enum wait wait, int argument)
{
	threads[running].wait = wait;
	threads[running].argument = argument;
	give_way();
}

void await_signal(int number)
{
	point();
	if (!signals[number])
		sleep_on(WAITS_SIGNAL, number);
	signals[number] = 0;
	threads[running].quiet = 0;
	join(&threads[running].view, &signal_view[number]);
}

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
	if (!has_bell(epoll_fd) && timeout_ms)
		sleep_on(WAITS_BELL, epoll_fd);
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
	threads[running].quiet = 0;
	if (fd_orders[fd])
		join(&threads[running].view, &fd_view[fd]);
	return 8;
}

long explore_write(int fd)
{
	if (running >= 0) {
		point();
		threads[running].quiet = 0;
		if (fd_orders[fd])
			join(&fd_view[fd], &threads[running].view);
	}
	fd_rung[fd] = 1;
	return 8;
}

int explore_clock(struct timespec *now)
{
	*now = (struct timespec){ .tv_sec = now_s++ };
	return 0;
}

int explore_timer_set(int fd, const struct itimerspec *at)
{
	if (running >= 0) {
		point();
		threads[running].quiet = 0;
	}
	fd_rung[fd] = at->it_value.tv_sec || at->it_value.tv_nsec;
	return 0;
}
