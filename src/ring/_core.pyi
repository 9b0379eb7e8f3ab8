# SPDX-License-Identifier: MIT
# Made by `make stub` from the headers in c_ext/; a test holds it to the compiled module.
from typing import Any, Protocol

CData = Any

class _Lib(Protocol):
    PV_ARENA_POSIX: int
    PV_ARENA_READ_ONLY: int
    PV_BINDINGS_MAGIC: int
    PV_BINDINGS_WAITERS: int
    PV_BLKIF_MAX_SEGMENTS: int
    PV_BLKIF_OP_DISCARD: int
    PV_BLKIF_OP_FLUSH_DISKCACHE: int
    PV_BLKIF_OP_INDIRECT: int
    PV_BLKIF_OP_READ: int
    PV_BLKIF_OP_WRITE: int
    PV_BLKIF_OP_WRITE_BARRIER: int
    PV_BLKIF_PENDING: int
    PV_BLKIF_REFUSED_ALIGNMENT: int
    PV_BLKIF_REFUSED_BOUNDS: int
    PV_BLKIF_REFUSED_GRANT: int
    PV_BLKIF_REFUSED_NOTHING: int
    PV_BLKIF_REFUSED_OPERATION: int
    PV_BLKIF_REFUSED_RANGE: int
    PV_BLKIF_REFUSED_READ_ONLY: int
    PV_BLKIF_REFUSED_SEGMENTS: int
    PV_BLKIF_RSP_EOPNOTSUPP: int
    PV_BLKIF_RSP_ERROR: int
    PV_BLKIF_RSP_OKAY: int
    PV_CAP_SETGID: int
    PV_CAP_SETUID: int
    PV_CAP_SYS_ADMIN: int
    PV_DOMAIN_DYING: int
    PV_DOMAIN_RUNNING: int
    PV_DOMAIN_SHUTDOWN: int
    PV_DOMID_SELF: int
    PV_DOMID_XEN: int
    PV_EVTCHN_CLOSED: int
    PV_EVTCHN_INTERDOMAIN: int
    PV_EVTCHN_IPI: int
    PV_EVTCHN_UNBOUND: int
    PV_EVTCHN_VIRQ: int
    PV_GNTST_BAD_COPY_ARG: int
    PV_GNTST_BAD_DOMAIN: int
    PV_GNTST_BAD_GNTREF: int
    PV_GNTST_BAD_HANDLE: int
    PV_GNTST_BAD_PAGE: int
    PV_GNTST_EAGAIN: int
    PV_GNTST_GENERAL_ERROR: int
    PV_GNTST_NO_DEVICE_SPACE: int
    PV_GNTST_NO_SPACE: int
    PV_GNTST_OKAY: int
    PV_GNTST_PERMISSION_DENIED: int
    PV_GTF_PERMIT_ACCESS: int
    PV_GTF_READING: int
    PV_GTF_READONLY: int
    PV_GTF_SUB_PAGE: int
    PV_GTF_TYPE_MASK: int
    PV_GTF_WRITING: int
    PV_HV_ARENA_CREATE: int
    PV_HV_ARENA_DESTROY: int
    PV_HV_ARENA_MAP: int
    PV_HV_ARENA_RESERVED: int
    PV_HV_ARENA_UNMAP: int
    PV_HV_DOMAIN_CONNECT: int
    PV_HV_DOMAIN_CREATE: int
    PV_HV_DOMAIN_DESTROY: int
    PV_HV_DOMAIN_INFO: int
    PV_HV_DOMAIN_SET_INIT: int
    PV_HV_DOMAIN_SHUTDOWN: int
    PV_HV_EVTCHN_ALLOC_UNBOUND: int
    PV_HV_EVTCHN_BIND: int
    PV_HV_EVTCHN_BIND_IPI: int
    PV_HV_EVTCHN_BIND_VIRQ: int
    PV_HV_EVTCHN_CLOSE: int
    PV_HV_EVTCHN_SEND: int
    PV_HV_EVTCHN_STATUS: int
    PV_HV_HELLO: int
    PV_HV_INFO: int
    PV_HV_MAGIC: int
    PV_HV_MAX_FDS: int
    PV_HV_MESSAGE_BYTES: int
    PV_HV_NAME_BYTES: int
    PV_HV_NOTIFY_RUN: int
    PV_HV_NOTIFY_SET: int
    PV_HV_PAYLOAD_BYTES: int
    PV_HV_STORE_CONNECT: int
    PV_HV_STORE_CONNECTION: int
    PV_HV_STORE_REGISTER: int
    PV_HV_STORE_RELEASED: int
    PV_HV_VERSION: int
    PV_HV_WAITER_CREATE: int
    PV_HV_WAITER_DESTROY: int
    PV_INBOX_MAGIC: int
    PV_INBOX_SLOTS: int
    PV_MAPTRACK_MAGIC: int
    PV_MEMBARRIER_GLOBAL: int
    PV_MEMBARRIER_PRIVATE: int
    PV_MOUNT_BIND: int
    PV_MOUNT_NODEV: int
    PV_MOUNT_NOEXEC: int
    PV_MOUNT_NOSUID: int
    PV_MOUNT_PRIVATE: int
    PV_MOUNT_RECURSIVE: int
    PV_NEW_IPC: int
    PV_NEW_MOUNT: int
    PV_NEW_NET: int
    PV_NEW_PID: int
    PV_NEW_USER: int
    PV_NOTIFY_CLEAR_BYTE: int
    PV_NOTIFY_RANG: int
    PV_NOTIFY_SEND_EVENT: int
    PV_NOTIFY_STALE: int
    PV_NOTIFY_SUPPRESSED: int
    PV_NOTIFY_UNBOUND: int
    PV_PAGE_BYTES: int
    PV_PORT_INBOX_GONE: int
    PV_PORT_NEW_INBOX: int
    PV_PORT_PEER: int
    PV_SHARED_VERSION: int
    PV_SHUTDOWN_NONE: int
    PV_VIRQ_DOM_EXC: int
    PV_WAIT_EVENT: int
    PV_WAIT_INTERRUPTED: int
    PV_WAIT_KICKED: int
    PV_WAIT_STALE: int
    PV_WAIT_TIMEOUT: int
    def pv_bell_ring(self, a0: int, /) -> int: ...
    def pv_blkif_copy(self, a0: CData, a1: CData, a2: int, a3: int, a4: int, /) -> None: ...
    def pv_blkif_finish(self, a0: CData, a1: CData, a2: CData, a3: int, a4: CData, a5: CData, /) -> None: ...
    def pv_blkif_grant(self, a0: CData, a1: int, a2: CData, a3: int, /) -> int: ...
    def pv_blkif_prepare(self, a0: CData, a1: CData, a2: CData, a3: int, a4: CData, /) -> int: ...
    def pv_blkif_revoke(self, a0: CData, a1: CData, /) -> int: ...
    def pv_drop_capabilities(self) -> int: ...
    def pv_grant_access(self, a0: CData, a1: int, a2: int, a3: int, a4: int, /) -> int: ...
    def pv_grant_copy(self, a0: CData, a1: CData, a2: int, a3: int, a4: int, a5: int, /) -> None: ...
    def pv_grant_in_use(self, a0: CData, a1: int, /) -> int: ...
    def pv_grant_map(self, a0: CData, a1: int, a2: int, a3: int, /) -> int: ...
    def pv_grant_release(self, a0: CData, a1: int, a2: CData, a3: CData, a4: int, /) -> int: ...
    def pv_grant_revoke(self, a0: CData, a1: int, /) -> int: ...
    def pv_grant_unmap(self, a0: CData, a1: int, a2: int, /) -> int: ...
    def pv_has_capabilities(self, a0: int, /) -> int: ...
    def pv_home_is_here(self, a0: int, /) -> int: ...
    def pv_home_mark(self) -> int: ...
    def pv_hv_call(self, a0: int, a1: CData, a2: int, a3: CData, a4: int, a5: int, /) -> int: ...
    def pv_hv_receive(self, a0: int, a1: int, a2: CData, a3: int, a4: int, /) -> int: ...
    def pv_hv_send(self, a0: int, a1: CData, a2: int, /) -> int: ...
    def pv_inbox_check(self, a0: CData, /) -> int: ...
    def pv_inbox_init(self, a0: CData, /) -> None: ...
    def pv_inbox_take(self, a0: CData, a1: int, a2: int, /) -> int: ...
    def pv_lock_capabilities(self) -> int: ...
    def pv_loopback_up(self) -> int: ...
    def pv_membarrier_commands(self) -> int: ...
    def pv_mount(self, a0: CData, a1: CData, a2: CData, a3: int, a4: CData, /) -> int: ...
    def pv_mounts_read_only(self, a0: CData, /) -> int: ...
    def pv_notify(self, a0: CData, /) -> int: ...
    def pv_now_ns(self) -> int: ...
    def pv_port_init(self, a0: CData, a1: CData, a2: CData, a3: int, /) -> None: ...
    def pv_port_mask(self, a0: CData, /) -> None: ...
    def pv_port_set_peer(self, a0: CData, a1: CData, a2: int, a3: int, a4: int, /) -> None: ...
    def pv_port_set_pending(self, a0: CData, /) -> None: ...
    def pv_port_take_pending(self, a0: CData, /) -> int: ...
    def pv_port_unmask(self, a0: CData, /) -> int: ...
    def pv_set_death_signal(self, a0: int, /) -> int: ...
    def pv_set_dumpable(self, a0: int, /) -> int: ...
    def pv_set_no_new_privileges(self) -> int: ...
    def pv_try_io_uring(self) -> int: ...
    def pv_unshare(self, a0: int, /) -> int: ...
    def pv_wait(self, a0: CData, a1: CData, a2: int, a3: int, /) -> int: ...
    def pv_waiter_add(self, a0: CData, a1: CData, a2: int, /) -> int: ...
    def pv_waiter_arm_always(self, a0: CData, /) -> int: ...
    def pv_waiter_destroy(self, a0: CData, /) -> None: ...
    def pv_waiter_drain(self, a0: CData, /) -> int: ...
    def pv_waiter_init(self, a0: CData, a1: int, /) -> int: ...
    def pv_waiter_kick(self, a0: CData, /) -> None: ...
    def pv_waiter_remove(self, a0: CData, a1: CData, a2: int, /) -> int: ...

lib: _Lib
ffi: Any
