/* SPDX-License-Identifier: MIT */
/*
 * A small vhost-user-blk client: one split virtqueue in a memfd that it shares with the server, with event indexes, so
 * that neither side notifies one that is awake. TARGET: the server's Unix socket.
 *
 * Source: QEMU's docs/interop/vhost-user.rst; virtio 1.2, 2.7 (split virtqueues) and 5.2 (block device).
 */
#include "blk.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>

#define ENTRIES 256             /* of the virtqueue; three a request */
#define MOST (ENTRIES / 3)

enum { GET_FEATURES = 1, SET_FEATURES = 2, SET_OWNER = 3, SET_MEM_TABLE = 5, SET_VRING_NUM = 8, SET_VRING_ADDR = 9,
       SET_VRING_BASE = 10, SET_VRING_KICK = 12, SET_VRING_CALL = 13, GET_PROTOCOL_FEATURES = 15,
       SET_PROTOCOL_FEATURES = 16, SET_VRING_ENABLE = 18 };

#define VERSION 1u
#define REPLY 4u
#define EVENT_INDEX (UINT64_C(1) << 29)
#define PROTOCOL_FEATURES (UINT64_C(1) << 30)
#define VERSION_1 (UINT64_C(1) << 32)

#define NEXT 1          /* flags of a descriptor */
#define WRITABLE 2

struct descriptor {
	uint64_t address;
	uint32_t length;
	uint16_t flags;
	uint16_t next;
};

struct available {
	uint16_t flags;
	uint16_t index;
	uint16_t ring[ENTRIES];
	uint16_t used_event;    /* notify me when `used` passes this */
};

struct used {
	uint16_t flags;
	uint16_t index;
	struct {
		uint32_t id;
		uint32_t length;
	} ring[ENTRIES];
	uint16_t available_event;
};

struct header {
	uint32_t type;
	uint32_t priority;
	uint64_t sector;
};

/* All that is shared; the buffers follow. */
struct shared {
	_Alignas(4096) struct descriptor descriptors[ENTRIES];
	_Alignas(4096) struct available available;
	_Alignas(4096) struct used used;
	_Alignas(4096) struct header headers[MOST];
	uint8_t status[MOST];
	_Alignas(4096) uint8_t buffers[];
};

static struct shared *shared;
static int line, kick, call;
static uint16_t produced, taken;        /* of `available`, of `used` */

/* Messages. */

struct __attribute__((packed)) message {
	uint32_t request;
	uint32_t flags;
	uint32_t size;
	union {
		uint64_t number;
		struct {
			uint32_t index;
			uint32_t value;
		} state;
		struct {
			uint32_t index;
			uint32_t flags;
			uint64_t descriptors, used, available, log;
		} addresses;
		struct {
			uint32_t n;
			uint32_t pad;
			uint64_t guest_address, n_bytes, user_address, offset;
		} memory;
	} payload;
};

static void say(struct message *message, uint32_t request, size_t size, int fd)
{
	char room[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec part = { message, 12 + size };
	struct msghdr header = { .msg_iov = &part, .msg_iovlen = 1 };

	message->request = request;
	message->flags = VERSION;
	message->size = (uint32_t)size;
	if (fd >= 0) {
		header.msg_control = room;
		header.msg_controllen = sizeof room;
		CMSG_FIRSTHDR(&header)->cmsg_level = SOL_SOCKET;
		CMSG_FIRSTHDR(&header)->cmsg_type = SCM_RIGHTS;
		CMSG_FIRSTHDR(&header)->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(CMSG_FIRSTHDR(&header)), &fd, sizeof fd);
	}
	if (sendmsg(line, &header, MSG_NOSIGNAL) != (ssize_t)part.iov_len)
		not_here("the server has hung up");
}

static void say_number(uint32_t request, uint64_t number, int fd)
{
	struct message message = { .payload.number = number };

	say(&message, request, sizeof number, fd);
}

static void say_state(uint32_t request, uint32_t value)
{
	struct message message = { .payload.state = { 0, value } };

	say(&message, request, sizeof message.payload.state, -1);
}

static uint64_t ask(uint32_t request)
{
	struct message message = { 0 };

	say(&message, request, 0, -1);
	if (recv(line, &message, 20, MSG_WAITALL) != 20 || message.request != request || !(message.flags & REPLY))
		not_here("that is no vhost-user server");
	return message.payload.number;
}

static uint64_t address_of(const void *place)
{
	return (uint64_t)(uintptr_t)place;
}

static void greet(int memory, size_t n_bytes)
{
	uint64_t wanted = VERSION_1 | PROTOCOL_FEATURES | EVENT_INDEX, offered = ask(GET_FEATURES);
	struct message table = { .payload.memory = { .n = 1, .guest_address = address_of(shared), .n_bytes = n_bytes,
						     .user_address = address_of(shared) } };
	struct message addresses = { .payload.addresses = { .descriptors = address_of(shared->descriptors),
							    .used = address_of(&shared->used),
							    .available = address_of(&shared->available) } };

	if ((offered & wanted) != wanted)
		not_here("the server has not what is needed: %llx", (unsigned long long)offered);
	say_number(SET_OWNER, 0, -1);
	ask(GET_PROTOCOL_FEATURES);
	say_number(SET_PROTOCOL_FEATURES, 0, -1);
	say_number(SET_FEATURES, wanted, -1);
	say(&table, SET_MEM_TABLE, sizeof table.payload.memory, memory);
	say_state(SET_VRING_NUM, ENTRIES);
	say_state(SET_VRING_BASE, 0);
	say(&addresses, SET_VRING_ADDR, sizeof addresses.payload.addresses, -1);
	say_number(SET_VRING_CALL, 0, call);
	say_number(SET_VRING_KICK, 0, kick);
	say_state(SET_VRING_ENABLE, 1);
}

static uint8_t *disk_open(size_t buffer_bytes)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	size_t n_bytes = (sizeof *shared + buffer_bytes + 4095) / 4096 * 4096;
	int memory = memfd_create("vhost-user", MFD_CLOEXEC);

	if (job.depth > MOST)
		not_here("%u requests do not fit the virtqueue of %u", job.depth, MOST);
	if (strlen(job.target) >= sizeof address.sun_path)
		not_here("%s is too long for a socket", job.target);
	strcpy(address.sun_path, job.target);
	line = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (line < 0 || connect(line, (struct sockaddr *)&address, sizeof address))
		not_here("%s: %s", job.target, strerror(errno));
	kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (memory < 0 || kick < 0 || call < 0 || ftruncate(memory, (off_t)n_bytes))
		not_here("no memory: %s", strerror(errno));
	shared = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, memory, 0);
	if (shared == MAP_FAILED)
		not_here("no memory: %s", strerror(errno));
	for (uint32_t tag = 0; tag < MOST; tag++) {
		struct descriptor *of_tag = &shared->descriptors[3 * tag];

		of_tag[0] = (struct descriptor){ address_of(&shared->headers[tag]), sizeof(struct header), NEXT,
						 (uint16_t)(3 * tag + 1) };
		of_tag[1] = (struct descriptor){ address_of(shared->buffers + (uint64_t)tag * job.block_bytes),
						 job.block_bytes, NEXT, (uint16_t)(3 * tag + 2) };
		of_tag[2] = (struct descriptor){ address_of(&shared->status[tag]), 1, WRITABLE, 0 };
	}
	greet(memory, n_bytes);
	return shared->buffers;
}

/* 1 when an index that went from `before` to `now` passed `event`. */
static int passed(uint16_t event, uint16_t now, uint16_t before)
{
	return (uint16_t)(now - event - 1) < (uint16_t)(now - before);
}

static void disk_send(const struct op *ops, uint32_t n)
{
	uint16_t before = produced;
	uint64_t one = 1;

	for (uint32_t i = 0; i < n; i++) {
		uint32_t tag = ops[i].tag;

		shared->headers[tag] = (struct header){ ops[i].is_write, 0, ops[i].offset / 512 };
		shared->status[tag] = 0xFF;
		shared->descriptors[3 * tag + 1].flags = ops[i].is_write ? NEXT : NEXT | WRITABLE;
		shared->available.ring[produced++ % ENTRIES] = (uint16_t)(3 * tag);
	}
	__atomic_store_n(&shared->available.index, produced, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (passed(__atomic_load_n(&shared->used.available_event, __ATOMIC_RELAXED), produced, before) &&
	    write(kick, &one, sizeof one) < 0)
		not_here("no notification: %s", strerror(errno));
}

static uint32_t disk_take(uint32_t *tags)
{
	uint16_t index = __atomic_load_n(&shared->used.index, __ATOMIC_ACQUIRE);
	uint32_t n = 0;

	while (taken != index) {
		uint32_t tag = shared->used.ring[taken++ % ENTRIES].id / 3;

		if (tag >= job.depth || shared->status[tag])
			not_here("a request failed");
		tags[n++] = tag;
	}
	if (n)  /* an index behind us: no notification is wanted */
		__atomic_store_n(&shared->available.used_event, (uint16_t)(taken - 1), __ATOMIC_RELAXED);
	return n;
}

static void disk_wait(void)
{
	struct pollfd wanted = { .fd = call, .events = POLLIN };
	uint64_t count;

	if (!job.sleeps) {
		relax();
		return;
	}
	__atomic_store_n(&shared->available.used_event, taken, __ATOMIC_RELAXED);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (__atomic_load_n(&shared->used.index, __ATOMIC_ACQUIRE) != taken)
		return;
	poll(&wanted, 1, -1);
	if (read(call, &count, sizeof count) < 0 && errno != EAGAIN)
		not_here("no notification: %s", strerror(errno));
}

static double disk_back_cpu_s(void)
{
	return -1;
}
