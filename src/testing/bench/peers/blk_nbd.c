/* SPDX-License-Identifier: MIT */
/* A bare NBD client on one Unix socket: requests of a batch in one write, answers in large reads. TARGET: the socket. */
#include "blk.h"

#include <arpa/inet.h>
#include <endian.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#define MAGIC UINT64_C(0x4e42444d41474943)
#define OPTION_MAGIC UINT64_C(0x49484156454F5054)
#define REQUEST_MAGIC 0x25609513u
#define REPLY_MAGIC 0x67446698u

struct __attribute__((packed)) request {
	uint32_t magic;
	uint16_t flags;
	uint16_t type;
	uint64_t handle;
	uint64_t offset;
	uint32_t length;
};

struct __attribute__((packed)) reply {
	uint32_t magic;
	uint32_t error;
	uint64_t handle;
};

static int line;
static uint8_t *memory, *out, *in;
static size_t in_bytes, in_room;
static uint8_t *is_write;

static void receive(void *to, size_t n_bytes)
{
	if (recv(line, to, n_bytes, MSG_WAITALL) != (ssize_t)n_bytes)
		not_here("the server has hung up");
}

static void transmit(const uint8_t *from, size_t n_bytes)
{
	while (n_bytes) {
		ssize_t n = send(line, from, n_bytes, MSG_NOSIGNAL);

		if (n < 0)
			not_here("the server has hung up: %s", strerror(errno));
		from += n;
		n_bytes -= (size_t)n;
	}
}

/* Fixed newstyle, the export without a name. */
static void greet(void)
{
	struct __attribute__((packed)) {
		uint64_t magic;
		uint64_t option_magic;
		uint16_t flags;
	} hello;
	struct __attribute__((packed)) {
		uint32_t flags;
		uint64_t magic;
		uint32_t option;
		uint32_t length;
	} wish = { htonl(3), htobe64(OPTION_MAGIC), htonl(1), 0 };
	struct __attribute__((packed)) {
		uint64_t size;
		uint16_t flags;
	} export;

	receive(&hello, sizeof hello);
	if (be64toh(hello.magic) != MAGIC || be64toh(hello.option_magic) != OPTION_MAGIC)
		not_here("that is no NBD server");
	transmit((const uint8_t *)&wish, sizeof wish);
	receive(&export, sizeof export);
	if (!(ntohs(hello.flags) & 2)) {
		uint8_t zeroes[124];

		receive(zeroes, sizeof zeroes);
	}
	if (be64toh(export.size) < job.n_bytes)
		not_here("the export is too small");
}

static uint8_t *disk_open(size_t buffer_bytes)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };

	if (strlen(job.target) >= sizeof address.sun_path)
		not_here("%s is too long for a socket", job.target);
	strcpy(address.sun_path, job.target);
	line = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (line < 0 || connect(line, (struct sockaddr *)&address, sizeof address))
		not_here("%s: %s", job.target, strerror(errno));
	greet();
	in_room = job.depth * (sizeof(struct reply) + job.block_bytes);
	memory = calloc(1, buffer_bytes);
	out = malloc(job.depth * (sizeof(struct request) + job.block_bytes));
	in = malloc(in_room);
	is_write = calloc(1, job.depth);
	if (!memory || !out || !in || !is_write)
		not_here("no memory");
	return memory;
}

static void disk_send(const struct op *ops, uint32_t n)
{
	uint8_t *end = out;

	for (uint32_t i = 0; i < n; i++) {
		struct request request = { htonl(REQUEST_MAGIC), 0, htons((uint16_t)ops[i].is_write), ops[i].tag,
					   htobe64(ops[i].offset), htonl(job.block_bytes) };

		memcpy(end, &request, sizeof request);
		end += sizeof request;
		is_write[ops[i].tag] = (uint8_t)ops[i].is_write;
		if (ops[i].is_write) {
			memcpy(end, ops[i].buffer, job.block_bytes);
			end += job.block_bytes;
		}
	}
	transmit(out, (size_t)(end - out));
}

static uint32_t disk_take(uint32_t *tags)
{
	ssize_t got = recv(line, in + in_bytes, in_room - in_bytes, MSG_DONTWAIT);
	size_t at = 0;
	uint32_t n = 0;

	if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR))
		not_here("the server has hung up");
	in_bytes += got > 0 ? (size_t)got : 0;
	while (in_bytes - at >= sizeof(struct reply)) {
		struct reply reply;
		size_t length;

		memcpy(&reply, in + at, sizeof reply);
		if (ntohl(reply.magic) != REPLY_MAGIC || reply.error || reply.handle >= job.depth)
			not_here("a request failed");
		length = is_write[reply.handle] ? 0 : job.block_bytes;
		if (in_bytes - at < sizeof reply + length)
			break;
		memcpy(memory + reply.handle * job.block_bytes, in + at + sizeof reply, length);
		tags[n++] = (uint32_t)reply.handle;
		at += sizeof reply + length;
	}
	in_bytes -= at;
	memmove(in, in + at, in_bytes);
	return n;
}

static void disk_wait(void)
{
	struct pollfd wanted = { .fd = line, .events = POLLIN };

	if (job.sleeps)
		poll(&wanted, 1, -1);
}

static double disk_back_cpu_s(void)
{
	return -1;
}
