/* SPDX-License-Identifier: MIT */
/*
 * Rights and namespaces of the calling process: what a domain's process gives up before the domain's command runs in it.
 *
 * Every function returns 0 or a negative errno value and changes the calling thread (the prctl and capability calls) or
 * process. They are meant for a process with one thread: namespaces and capabilities of other threads stay as they were.
 * On fork all of it is inherited but the parent-death signal; on exec all of it is kept but "not dumpable".
 */
#ifndef PV_PROCESS_H
#define PV_PROCESS_H

#include <stdint.h>

/* Flags of pv_unshare. */
#define PV_NEW_MOUNT 0x00020000
#define PV_NEW_IPC 0x08000000
#define PV_NEW_USER 0x10000000
#define PV_NEW_PID 0x20000000
#define PV_NEW_NET 0x40000000

/* Flags of pv_mount. */
#define PV_MOUNT_NOSUID 0x2
#define PV_MOUNT_NODEV 0x4
#define PV_MOUNT_NOEXEC 0x8
#define PV_MOUNT_BIND 0x1000
#define PV_MOUNT_RECURSIVE 0x4000
#define PV_MOUNT_PRIVATE 0x40000

/* Bits of pv_membarrier_commands: the asymmetric fence within a process, and between processes that opt in. */
#define PV_MEMBARRIER_GLOBAL 0x2
#define PV_MEMBARRIER_PRIVATE 0x8

/* Bits of pv_has_capabilities. */
#define PV_CAP_SETGID 0x40
#define PV_CAP_SETUID 0x80
#define PV_CAP_SYS_ADMIN 0x200000

/*
 * 0: other processes of the same uid can neither trace this one nor open its memory or descriptors under /proc.
 * /proc/self then belongs to root: whoever has to write there does it first.
 */
int pv_set_dumpable(int on);

/*
 * Have the kernel send `signal_number` to this process when the *thread* that made it ends. A change of uid or of
 * capabilities clears it again, so it comes after those; and the parent may be dead already, so look at it afterwards.
 */
int pv_set_death_signal(int signal_number);

/* From now on no exec can give rights (setuid files, file capabilities). Cannot be undone; children inherit it. */
int pv_set_no_new_privileges(void);

/*
 * Empty the bounding set and lock uid 0 to mean nothing. Needs CAP_SETPCAP (-EPERM without), so it comes before a change
 * of uid; what a thread holds at that moment stays until pv_drop_capabilities.
 */
int pv_lock_capabilities(void);

/*
 * In user and network namespaces of its own: keep what an administrator of the network needs there (CAP_NET_ADMIN,
 * CAP_NET_RAW, CAP_NET_BIND_SERVICE), over exec too, and nothing else for good.
 */
int pv_keep_network_rights(void);

/* Empty the ambient, effective, permitted and inheritable sets. Needs no right. */
int pv_drop_capabilities(void);

/* 1 if all of `wanted` (PV_CAP_*) are effective now, else 0. */
int pv_has_capabilities(uint64_t wanted);

/* Move into new namespaces. PV_NEW_PID counts for children only. -EPERM, -ENOSPC or -EINVAL where the kernel refuses. */
int pv_unshare(uint64_t flags);

/* mount(2); `type` and `data` may be NULL. */
int pv_mount(const char *source, const char *target, const char *type, uint64_t flags, const char *data);

/* Make the mount at `path` and all below it read-only. -ENOSYS before Linux 5.12. */
int pv_mounts_read_only(const char *path);

/* Bring the loopback device of this network namespace up. */
int pv_loopback_up(void);

/* Commands that membarrier(2) offers (the mask of MEMBARRIER_CMD_QUERY), or a negative errno value. */
int pv_membarrier_commands(void);

/* 0 if the kernel gives this process an io_uring, else a negative errno value. */
int pv_try_io_uring(void);

#endif
