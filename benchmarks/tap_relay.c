/* SPDX-License-Identifier: MIT */
/*
 * Two TAP interfaces, and all that comes from one goes to the other, offloads included: what TCP between two domains is
 * measured against.
 *
 *   tap_relay ONE OTHER         says "ready" when both are there
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <unistd.h>

#define VNET_BYTES 12
#define BURST 64

static int open_tap(const char *name)
{
	struct ifreq wanted = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
	int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC), bytes = VNET_BYTES;

	snprintf(wanted.ifr_name, sizeof(wanted.ifr_name), "%s", name);
	if (fd < 0 || ioctl(fd, TUNSETIFF, &wanted) || ioctl(fd, TUNSETVNETHDRSZ, &bytes) ||
	    ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN)) {
		perror(name);
		exit(3);
	}
	return fd;
}

int main(int argc, char **argv)
{
	static unsigned char frame[VNET_BYTES + 65536];
	struct pollfd ends[2];

	if (argc != 3)
		return 2;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (int i = 0; i < 2; i++)
		ends[i] = (struct pollfd){open_tap(argv[1 + i]), POLLIN, 0};
	puts("ready");
	fflush(stdout);
	while (poll(ends, 2, -1) > 0)
		for (int i = 0; i < 2; i++)
			for (int n = 0; n < BURST; n++) {
				ssize_t bytes = read(ends[i].fd, frame, sizeof(frame));

				if (bytes <= 0)
					break;
				/* What the other end does not take is lost, as on any wire. */
				if (write(ends[!i].fd, frame, (size_t)bytes) < 0)
					continue;
			}
	return 1;
}
