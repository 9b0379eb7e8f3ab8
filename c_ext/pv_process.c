/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "pv_process.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/io_uring.h>
#include <linux/membarrier.h>
#include <linux/securebits.h>
#include <net/if.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

_Static_assert(PV_NEW_MOUNT == CLONE_NEWNS && PV_NEW_IPC == CLONE_NEWIPC && PV_NEW_USER == CLONE_NEWUSER &&
		       PV_NEW_PID == CLONE_NEWPID && PV_NEW_NET == CLONE_NEWNET,
	       "namespace flags are the kernel's");
_Static_assert(PV_MOUNT_NOSUID == MS_NOSUID && PV_MOUNT_NODEV == MS_NODEV && PV_MOUNT_NOEXEC == MS_NOEXEC &&
		       PV_MOUNT_BIND == MS_BIND && PV_MOUNT_RECURSIVE == MS_REC && PV_MOUNT_PRIVATE == MS_PRIVATE,
	       "mount flags are the kernel's");
_Static_assert(PV_CAP_SETGID == 1 << CAP_SETGID && PV_CAP_SETUID == 1 << CAP_SETUID &&
		       PV_CAP_SYS_ADMIN == 1 << CAP_SYS_ADMIN,
	       "capability bits are the kernel's");
_Static_assert(PV_MEMBARRIER_GLOBAL == MEMBARRIER_CMD_GLOBAL_EXPEDITED &&
		       PV_MEMBARRIER_PRIVATE == MEMBARRIER_CMD_PRIVATE_EXPEDITED,
	       "membarrier commands are the kernel's");

static int result(long returned)
{
	return returned < 0 ? -errno : 0;
}

int pv_set_dumpable(int on)
{
	return result(prctl(PR_SET_DUMPABLE, on ? 1 : 0, 0, 0, 0));
}

int pv_set_death_signal(int signal_number)
{
	return result(prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0));
}

int pv_set_no_new_privileges(void)
{
	return result(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
}

int pv_lock_capabilities(void)
{
	/* The kernel knows how many capabilities there are; a header may know fewer. EINVAL is the end of its list. */
	for (unsigned long cap = 0; prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++)
		if (prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) < 0)
			return -errno;
	return result(prctl(PR_SET_SECUREBITS,
			    SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_CAP_AMBIENT_RAISE |
				    SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED,
			    0, 0, 0));
}

int pv_keep_network_rights(void)
{
	const uint64_t kept = 1u << CAP_NET_ADMIN | 1u << CAP_NET_RAW | 1u << CAP_NET_BIND_SERVICE;
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct network[_LINUX_CAPABILITY_U32S_3] = {
		{.effective = kept, .permitted = kept, .inheritable = kept}};

	for (unsigned long cap = 0; prctl(PR_CAPBSET_READ, cap, 0, 0, 0) >= 0; cap++)
		if (!(cap < 64 && kept >> cap & 1) && prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) < 0)
			return -errno;
	/* Inheritable first, and the right to lock until all is as it should be. */
	network[0].effective |= 1u << CAP_SETPCAP;
	network[0].permitted |= 1u << CAP_SETPCAP;
	if (syscall(SYS_capset, &header, network) < 0)
		return -errno;
	for (unsigned long cap = 0; cap < 64; cap++)
		if (kept >> cap & 1 && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0) < 0)
			return -errno;
	if (prctl(PR_SET_SECUREBITS,
		  SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_CAP_AMBIENT_RAISE | SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED,
		  0, 0, 0) < 0)
		return -errno;
	network[0].effective = network[0].permitted = (uint32_t)kept;
	return result(syscall(SYS_capset, &header, network));
}

int pv_drop_capabilities(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {{0}};

	if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0)
		return -errno;
	return result(syscall(SYS_capset, &header, none));
}

int pv_has_capabilities(uint64_t wanted)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct now[_LINUX_CAPABILITY_U32S_3] = {{0}};

	if (syscall(SYS_capget, &header, now) < 0)
		return 0;
	uint64_t effective = now[0].effective | (uint64_t)now[1].effective << 32;
	return (effective & wanted) == wanted;
}

int pv_unshare(uint64_t flags)
{
	return result(unshare((int)flags));
}

int pv_mount(const char *source, const char *target, const char *type, uint64_t flags, const char *data)
{
	return result(mount(source, target, type, (unsigned long)flags, data));
}

int pv_mounts_read_only(const char *path)
{
	struct mount_attr change = {.attr_set = MOUNT_ATTR_RDONLY};

	return result(mount_setattr(AT_FDCWD, path, AT_RECURSIVE, &change, sizeof(change)));
}

int pv_loopback_up(void)
{
	struct ifreq request = {.ifr_name = "lo"};
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	int status;

	if (fd < 0)
		return -errno;
	status = result(ioctl(fd, SIOCGIFFLAGS, &request));
	if (status == 0) {
		request.ifr_flags |= IFF_UP;
		status = result(ioctl(fd, SIOCSIFFLAGS, &request));
	}
	close(fd);
	return status;
}

int pv_membarrier_commands(void)
{
	long offered = syscall(SYS_membarrier, MEMBARRIER_CMD_QUERY, 0, 0);

	return offered < 0 ? -errno : (int)offered;
}

int pv_try_io_uring(void)
{
	struct io_uring_params parameters = {0};
	long fd = syscall(SYS_io_uring_setup, 1, &parameters);

	if (fd < 0)
		return -errno;
	close((int)fd);
	return 0;
}
