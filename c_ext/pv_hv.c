/* SPDX-License-Identifier: MIT */
#include "pv_hv.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "pv_atomic.h"

_Static_assert(sizeof(struct pv_hv_header) == 16, "header");
_Static_assert(sizeof(struct pv_hv_message) == PV_HV_MESSAGE_BYTES, "message");
_Static_assert(sizeof(struct pv_hv_domain) <= PV_HV_PAYLOAD_BYTES, "largest payload");

union fd_space {
	struct cmsghdr align;
	uint8_t bytes[CMSG_SPACE(PV_HV_MAX_FDS * sizeof(int))];
};

int pv_hv_send(int fd, const struct pv_hv_message *request, int send_fd)
{
	struct iovec part = { .iov_base = (void *)request, .iov_len = sizeof(*request) };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1 };
	union fd_space space = { 0 };
	ssize_t sent;

	if (send_fd >= 0) {
		message.msg_control = space.bytes;
		message.msg_controllen = CMSG_SPACE(sizeof(int));
		space.align.cmsg_level = SOL_SOCKET;
		space.align.cmsg_type = SCM_RIGHTS;
		space.align.cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(&space.align), &send_fd, sizeof(send_fd));
	}
	do
		sent = sendmsg(fd, &message, MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	return sent < 0 ? -errno : 0;
}

static void close_all(const int *fds, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		close(fds[i]);
}

/* The descriptors of a received message, at most PV_HV_MAX_FDS; how many. */
static uint32_t take_fds(struct msghdr *message, int *fds)
{
	uint32_t n = 0;

	for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
		if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
			continue;
		n = (uint32_t)((part->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		memcpy(fds, CMSG_DATA(part), n * sizeof(int));
	}
	return n;
}

int pv_hv_receive(int fd, uint32_t seq, struct pv_hv_message *reply, int *fds, uint32_t max_fds)
{
	for (;;) {
		struct iovec part = { .iov_base = reply, .iov_len = sizeof(*reply) };
		union fd_space space;
		struct msghdr message = {
			.msg_iov = &part, .msg_iovlen = 1, .msg_control = space.bytes, .msg_controllen = sizeof(space.bytes)
		};
		int received[PV_HV_MAX_FDS];
		uint32_t n;
		ssize_t size = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);

		if (size < 0)
			return -errno;
		if (size == 0)
			return -EPIPE;
		n = take_fds(&message, received);
		if (size == sizeof(*reply) && reply->header.seq == seq && !(message.msg_flags & MSG_TRUNC) && n <= max_fds &&
		    n <= reply->header.n_fds) {
			memcpy(fds, received, n * sizeof(int));
			return (int)n;
		}
		close_all(received, n);
		/* An earlier seq is the answer to a call that was given up. */
		if (size != sizeof(*reply) || (int32_t)(reply->header.seq - seq) >= 0)
			return -EPROTO;
	}
}

int pv_hv_call(
	int fd, const struct pv_hv_message *request, int send_fd, struct pv_hv_message *reply, int *fds, uint32_t max_fds)
{
	int result = pv_hv_send(fd, request, send_fd);

	if (result)
		return result;
	do
		result = pv_hv_receive(fd, request->header.seq, reply, fds, max_fds);
	while (result == -EINTR);
	return result;
}

int pv_hv_deliver(int page_fd, uint32_t slot, int bell_fd)
{
	void *page = mmap(NULL, PV_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, page_fd, 0);
	struct pv_port port;

	if (page == MAP_FAILED)
		return -errno;
	pv_port_init(&port, NULL, NULL, 0);
	pv_port_set_peer(&port, page, slot, bell_fd, 0);
	pv_notify(&port);
	munmap(page, PV_PAGE_BYTES);
	return 0;
}

void pv_bindings_set(struct pv_bindings *bindings, uint32_t waiter, uint32_t generation)
{
	/* Pairs with the acquires of the word in pv_notify and pv_wait. */
	pv_store_release(&bindings->generation[waiter % PV_BINDINGS_WAITERS], generation);
}
