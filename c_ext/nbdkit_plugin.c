/* SPDX-License-Identifier: MIT */
/*
 * A plugin of nbdkit that serves the block device of a domain: each request of an NBD client is a blocking call of
 * pv_blkdisk.h in the thread that nbdkit has for it.
 *
 * It gets two connected sockets by inheritance: `broker=FD`, to the hypervisor and labelled with the domain, and
 * `control=FD`, to the process that follows xenstore (pv_nbdkit.h).
 */
#define _GNU_SOURCE
#define NBDKIT_API_VERSION 2
#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <nbdkit-plugin.h>

#include "pv_nbdkit.h"

#define MAX_TRANSFER (32u << 20)

static int broker_fd = -1;
static int control_fd = -1;
static pthread_t control;
static int has_control;
static struct pv_blkdisk *disk;

/* ---- the other process ---- */

/* The socket has room for far more than is ever under way; who does not read it is gone or of no use. */
static void say(const struct pv_nbdkit_message *message)
{
	ssize_t sent;

	do
		sent = send(control_fd, message, sizeof(*message), MSG_NOSIGNAL | MSG_DONTWAIT);
	while (sent < 0 && errno == EINTR);
}

static void on_complaint(void *context, const char *text)
{
	struct pv_nbdkit_message message = { .kind = PV_NBDKIT_COMPLAIN };

	(void)context;
	strncpy((char *)message.text, text, sizeof(message.text) - 1);
	say(&message);
}

static void answer(struct pv_nbdkit_message *message)
{
	switch (message->kind) {
	case PV_NBDKIT_MAKE:
		message->status = pv_blkdisk_make(disk, message->backend, message->ring_order, message->max_spin_ns, &message->keys);
		break;
	case PV_NBDKIT_GO:
		message->status = pv_blkdisk_go(disk, &message->shape);
		break;
	case PV_NBDKIT_RESHAPE:
		message->status = pv_blkdisk_reshape(disk, &message->shape);
		break;
	case PV_NBDKIT_PAUSE:
		pv_blkdisk_pause(disk);
		message->status = 0;
		break;
	case PV_NBDKIT_FAIL:
		pv_blkdisk_fail(disk, (int)message->error);
		message->status = 0;
		break;
	case PV_NBDKIT_COUNT:
		pv_blkdisk_count(disk, &message->counters);
		message->status = 0;
		break;
	default:
		message->status = -EINVAL;
	}
	say(message);
}

static void *serve_control(void *unused)
{
	struct pv_nbdkit_message message;
	ssize_t n;

	(void)unused;
	for (;;) {
		n = recv(control_fd, &message, sizeof(message), 0);
		if (n == (ssize_t)sizeof(message))
			answer(&message);
		else if (!(n < 0 && errno == EINTR))
			break;
	}
	/* Nobody follows the backend any more. */
	pv_blkdisk_fail(disk, ESHUTDOWN);
	nbdkit_shutdown();
	return NULL;
}

/* ---- nbdkit's life ---- */

static int config(const char *key, const char *value)
{
	int *fd = strcmp(key, "broker") == 0 ? &broker_fd : strcmp(key, "control") == 0 ? &control_fd : NULL;

	if (!fd) {
		nbdkit_error("unknown parameter %s", key);
		return -1;
	}
	return nbdkit_parse_int(key, value, fd);
}

static int config_complete(void)
{
	if (broker_fd >= 0 && control_fd >= 0)
		return 0;
	nbdkit_error("it is started by `paravirt vbd export`, which gives it its sockets");
	return -1;
}

/* Here and not earlier: threads, and what belongs to a process, do not outlive a fork. */
static int after_fork(void)
{
	int error;

	disk = pv_blkdisk_open(broker_fd, on_complaint, NULL, &error);
	broker_fd = -1;
	if (!disk) {
		nbdkit_error("no connection to the hypervisor: %s", strerror(-error));
		return -1;
	}
	error = pthread_create(&control, NULL, serve_control, NULL);
	has_control = !error;
	if (error) {
		nbdkit_error("no thread: %s", strerror(error));
		return -1;
	}
	return 0;
}

static void cleanup(void)
{
	if (has_control) {
		shutdown(control_fd, SHUT_RDWR);
		pthread_join(control, NULL);
	}
	if (disk)
		pv_blkdisk_close(disk);
	if (control_fd >= 0)
		close(control_fd);
	disk = NULL;
}

/* ---- connections ---- */

/* What nbdkit wants of a call. It tells the client by errno. */
static int result_of(int error)
{
	if (error == 0)
		return 0;
	errno = -error;
	return -1;
}

static struct pv_blkdisk_shape shape_now(void)
{
	struct pv_blkdisk_shape shape;

	pv_blkdisk_shape_now(disk, &shape);
	return shape;
}

static void *open_connection(int readonly)
{
	int error = pv_blkdisk_await(disk);

	(void)readonly;
	if (error == 0)
		return NBDKIT_HANDLE_NOT_NEEDED;
	nbdkit_error("the disk is closed: %s", strerror(-error));
	errno = -error;
	return NULL;
}

static int64_t get_size(void *handle)
{
	(void)handle;
	return (int64_t)shape_now().size;
}

static int block_size(void *handle, uint32_t *minimum, uint32_t *preferred, uint32_t *maximum)
{
	struct pv_blkdisk_shape shape = shape_now();

	(void)handle;
	*minimum = shape.sector;
	*preferred = shape.physical_sector > PV_PAGE_BYTES ? shape.physical_sector : PV_PAGE_BYTES;
	if (*preferred < shape.sector)
		*preferred = shape.sector;
	*maximum = MAX_TRANSFER;
	return 0;
}

static int can_write(void *handle)
{
	(void)handle;
	return !shape_now().read_only;
}

static int can_trim(void *handle)
{
	(void)handle;
	return (int)shape_now().discard;
}

static int yes(void *handle)
{
	(void)handle;
	return 1;
}

static int no(void *handle)
{
	(void)handle;
	return 0;
}

/* A write and then a flush. */
static int can_fua(void *handle)
{
	(void)handle;
	return NBDKIT_FUA_EMULATE;
}

static int read_bytes(void *handle, void *to, uint32_t count, uint64_t offset, uint32_t flags)
{
	(void)handle;
	(void)flags;
	return result_of(pv_blkdisk_read(disk, to, count, offset));
}

static int write_bytes(void *handle, const void *from, uint32_t count, uint64_t offset, uint32_t flags)
{
	(void)handle;
	(void)flags;
	return result_of(pv_blkdisk_write(disk, from, count, offset));
}

static int flush(void *handle, uint32_t flags)
{
	(void)handle;
	(void)flags;
	return result_of(pv_blkdisk_flush(disk));
}

/* Only whole sectors can be given back: what is left at both ends stays, which a trim may do. */
static int trim(void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
	uint64_t sector = shape_now().sector;
	uint64_t start = (offset + sector - 1) / sector * sector, end = (offset + count) / sector * sector;

	(void)handle;
	(void)flags;
	return start < end ? result_of(pv_blkdisk_discard(disk, end - start, start)) : 0;
}

/* A discard does not promise zeroes, so they are written. */
static int zero(void *handle, uint32_t count, uint64_t offset, uint32_t flags)
{
	(void)handle;
	(void)flags;
	return result_of(pv_blkdisk_zero(disk, count, offset));
}

static struct nbdkit_plugin plugin = {
	.name = "paravirt",
	.longname = "paravirt block device",
	.description = "The block device of a domain.",
	.errno_is_preserved = 1,
	.config = config,
	.config_complete = config_complete,
	.after_fork = after_fork,
	.cleanup = cleanup,
	.open = open_connection,
	.get_size = get_size,
	.block_size = block_size,
	.can_write = can_write,
	.can_flush = yes,
	.can_trim = can_trim,
	.can_zero = yes,
	.can_fast_zero = no,
	.can_fua = can_fua,
	.can_multi_conn = yes,     /* a flush is of the whole disk */
	.is_rotational = no,
	.pread = read_bytes,
	.pwrite = write_bytes,
	.flush = flush,
	.trim = trim,
	.zero = zero,
};

NBDKIT_REGISTER_PLUGIN(plugin)
