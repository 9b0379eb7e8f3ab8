/* SPDX-License-Identifier: MIT */
/*
 * The hypervisor broker's messages, and a small client.
 *
 * A process talks to the broker over one AF_UNIX SOCK_SEQPACKET socket, which the broker has labelled with the domid of
 * the process: nothing a message says changes who sent it. Each request and each reply is one message of 128 bytes in the
 * host's byte order; descriptors travel beside replies (SCM_RIGHTS), and beside two requests only (DOMAIN_SET_INIT, _ADD_PROCESS).
 * The first request is HELLO. Replies come in the order of the requests and carry their seq. `status` of a reply is 0 or
 * a negative errno with Xen's meaning; then the payload is a text for people (struct pv_hv_failure).
 *
 * Ports, waiters, arenas and mappings belong to the connection that made them and end with it.
 *
 * Source of the operations: Xen public/event_channel.h, grant_table.h, domctl.h; Linux' gntdev for unmap notify.
 */
#ifndef PV_HV_H
#define PV_HV_H

#include <stdint.h>

#include "pv_event.h"

#define PV_HV_MAGIC 0x56485650         /* "PVHV" */
#define PV_HV_VERSION 1
#define PV_HV_MESSAGE_BYTES 128
#define PV_HV_PAYLOAD_BYTES 112
#define PV_HV_NAME_BYTES 64
#define PV_HV_MAX_FDS 4

#define PV_DOMID_SELF 0x7FF0           /* in a request: the caller; no domain has this or a higher domid */
#define PV_DOMID_XEN 0x7FF2            /* sender of virtual interrupts */

#define PV_HV_HELLO 1                  /* hello; reply: hello, fd of struct pv_bindings (read-only) */
#define PV_HV_INFO 2                   /* reply: info */
#define PV_HV_DOMAIN_CREATE 16         /* Dom0. domain; reply: domain */
#define PV_HV_DOMAIN_DESTROY 17        /* Dom0. domain.domid */
#define PV_HV_DOMAIN_INFO 18           /* Dom0. domain.domid; reply: the domain with the lowest domid not below it */
#define PV_HV_DOMAIN_SET_INIT 19       /* Dom0. domain.domid, fd: pidfd whose process' end is the domain's */
#define PV_HV_DOMAIN_CONNECT 20        /* Dom0. domain.domid; reply: fd of a socket labelled with it */
#define PV_HV_DOMAIN_SHUTDOWN 21       /* domain.shutdown_reason: of the caller itself */
#define PV_HV_DOMAIN_ADD_PROCESS 22    /* Dom0. domain.domid, fd: pidfd of a process that is killed when the domain ends */
#define PV_HV_WAITER_CREATE 32         /* reply: port.waiter */
#define PV_HV_WAITER_DESTROY 33        /* port.waiter; closes its ports */
#define PV_HV_EVTCHN_ALLOC_UNBOUND 34  /* port.waiter, .remote_domid; reply: port, fds of a new inbox */
#define PV_HV_EVTCHN_BIND 35           /* port.waiter, .remote_domid, .remote_port; reply: port, fds of a new inbox, fds of the peer */
#define PV_HV_EVTCHN_BIND_VIRQ 36      /* port.waiter (its virtual CPU), .virq; reply: port, fds of a new inbox */
#define PV_HV_EVTCHN_BIND_IPI 37       /* port.waiter; reply: port, fds of a new inbox, fds of the peer (the same inbox) */
#define PV_HV_EVTCHN_CLOSE 38          /* port.port, .inbox (0: any); reply: port.flags */
#define PV_HV_EVTCHN_SEND 39           /* port.port: by the broker, for callers that do not hold the peer's inbox */
#define PV_HV_EVTCHN_STATUS 40         /* port.domid, .port, .inbox (0: any), .generation; reply: port, fds of the peer unless nothing changed */
#define PV_HV_EVTCHN_RESET 41          /* port.domid, .port = 0, then what the reply says; reply: port.port, 0 when all are closed */
#define PV_HV_EVTCHN_BIND_VCPU 42      /* port.port, .inbox, .waiter; reply: port, fds of a new inbox, fds of the peer */
#define PV_HV_EVTCHN_NEXT 43           /* port.domid, .port; reply: the open port with the lowest number not below it; port.port 0: none */
#define PV_HV_VIRQ_RAISE 44            /* Dom0. port.virq, .domid */
#define PV_HV_VIRQ_HANDLER 45          /* Dom0. port.virq, .domid: who may bind it */
#define PV_HV_ARENA_CREATE 48          /* arena.domid = peer, .n_pages, .flags; reply: arena, fds entries, data */
#define PV_HV_ARENA_DESTROY 49         /* arena.gref = base */
#define PV_HV_ARENA_RESERVED 50        /* arena.gref = 0 to 7: own reserved page, for Dom0; reply: arena, fds entries, data */
#define PV_HV_ARENA_MAP 51             /* arena.domid = granter, .gref; reply: arena, fds entries, data, maptrack */
#define PV_HV_ARENA_UNMAP 52           /* arena.map */
#define PV_HV_NOTIFY_SET 53            /* notify: what to do when the mapping goes away; reply: notify.id */
#define PV_HV_NOTIFY_RUN 54            /* notify.id: do it now, once */
#define PV_HV_STORE_REGISTER 64        /* Dom0. reply: fd of the store's link (below) */
#define PV_HV_STORE_CONNECT 65         /* reply: fd of a socket to xenstored, labelled with the caller's domid */
#define PV_HV_LOOK_CREATE 80           /* reply: look, fd of a new statistics object (pv_look.h) of this process */
#define PV_HV_LOOK_NEXT 81             /* Dom0. look.object; reply: the object with the lowest number not below it, its fd; look.object 0: none */
#define PV_HV_ARENA_LOOK 82            /* Dom0. arena.domid, .gref; reply: the arena that has this or the next higher reference, fds entries, data (both read-only); arena.n_pages 0: none */
#define PV_HV_EVTCHN_KICK 83           /* Dom0. port.domid, .port: wake its owner as if the peer had sent */
/* On the store's link, which has no replies: */
#define PV_HV_STORE_CONNECTION 66      /* broker to store: domain.domid, fd of its socket */
#define PV_HV_STORE_RELEASED 67        /* store to broker: domain.domid: the store has forgotten this dead domain */

#define PV_DOMAIN_RUNNING 1
#define PV_DOMAIN_SHUTDOWN 2           /* asked to end, by itself; shutdown_reason says why */
#define PV_DOMAIN_DYING 3              /* ended; peers still map its memory, or xenstored has not let go of it */
#define PV_SHUTDOWN_NONE 255

#define PV_EVTCHN_CLOSED 0
#define PV_EVTCHN_UNBOUND 1
#define PV_EVTCHN_INTERDOMAIN 2
#define PV_EVTCHN_VIRQ 4
#define PV_EVTCHN_IPI 5
#define PV_VIRQ_DOM_EXC 3              /* Dom0: some domain shut down or died */

#define PV_PORT_NEW_INBOX 1            /* the first fds: page of the new inbox, its doorbell to read */
#define PV_PORT_PEER 2                 /* the last fds: page of the peer's inbox, its doorbell to write */
#define PV_PORT_INBOX_GONE 4           /* nothing uses the inbox any more (BIND_VCPU: the former one): drop it */
#define PV_PORT_PENDING 8              /* STATUS, NEXT: its event was not taken yet */
#define PV_PORT_MASKED 16              /* STATUS, NEXT: its owner masks it */
#define PV_PORT_ASLEEP 32              /* STATUS, NEXT: its owner sleeps until an event comes */

#define PV_ARENA_READ_ONLY 1           /* the peer may only read the data */
#define PV_ARENA_POSIX 2               /* reply: POSIX shared memory (else a sealed memfd) */
#define PV_ARENA_ENDED 4               /* ARENA_LOOK: its owner is through with it, a peer maps it still */

#define PV_NOTIFY_CLEAR_BYTE 1         /* write a zero byte at `offset` of the page with frame `gref` */
#define PV_NOTIFY_SEND_EVENT 2         /* send on `port` of the caller */

struct pv_hv_header {
	uint16_t op;
	uint16_t n_fds;
	uint32_t seq;
	int32_t status;
	uint32_t pad;
};

struct pv_hv_hello {
	uint32_t magic;
	uint32_t version;
	uint16_t domid;
	uint16_t isolated;
	uint32_t pad;
};

struct pv_hv_info {
	uint64_t budget_bytes;      /* shared memory the broker may hand out */
	uint64_t used_bytes;
	uint64_t max_pages;         /* default limits of a domain */
	uint32_t max_ports;
	uint32_t max_arenas;
	uint32_t max_maps;
	uint32_t max_connections;
	uint32_t domains;
	uint32_t connections;
	uint32_t posix;             /* memory between domains that are not isolated: 1 POSIX, 0 memfd */
	uint32_t store;             /* 1: a xenstored is registered */
};

struct pv_hv_domain {
	uint16_t domid;
	uint8_t state;
	uint8_t isolated;
	uint8_t shutdown_reason;
	uint8_t pad[3];
	uint32_t uid;               /* owner of its listening socket; UINT32_MAX: the broker's */
	uint32_t ports;
	uint32_t arenas;
	uint32_t maps;
	uint32_t connections;
	uint32_t pad2;
	uint64_t pages;
	uint64_t max_pages;         /* in a request, 0: the default */
	uint8_t name[PV_HV_NAME_BYTES];  /* UTF-8, NUL-terminated */
};

struct pv_hv_port {
	uint16_t domid;
	uint16_t remote_domid;
	uint32_t waiter;            /* index of its word in struct pv_bindings */
	uint32_t port;
	uint32_t remote_port;
	uint32_t state;
	uint32_t virq;
	uint32_t flags;
	uint32_t inbox;             /* names the inbox; never used again */
	uint32_t slot;
	uint32_t peer_slot;
	uint32_t generation;        /* of the waiter, of the moment of the reply; in STATUS: the one the caller knows */
	uint32_t peer_inbox;        /* with PV_PORT_PEER: names the peer's inbox, which several ports may share */
};

struct pv_hv_arena {
	uint16_t domid;
	uint16_t flags;
	uint32_t gref;
	uint32_t n_pages;
	uint32_t map;
	uint16_t peer_domid;        /* ARENA_LOOK: these three */
	uint16_t pad;
	uint32_t n_maps;            /* processes of the peer that map it */
	uint32_t pid;               /* of the process that made it; 0: not known, or a reserved page */
};

struct pv_hv_notify {
	uint32_t map;
	uint32_t id;
	uint32_t actions;
	uint32_t gref;
	uint32_t offset;
	uint32_t port;
};

struct pv_hv_look {
	uint32_t object;            /* never used again; 0: none */
	uint32_t pid;               /* of the process it belongs to, as the broker sees it; 0: not known */
	uint16_t domid;
	uint16_t pad;
};

struct pv_hv_failure {
	uint8_t text[PV_HV_PAYLOAD_BYTES];  /* UTF-8, NUL-terminated */
};

struct pv_hv_message {
	struct pv_hv_header header;
	union {
		struct pv_hv_hello hello;
		struct pv_hv_info info;
		struct pv_hv_domain domain;
		struct pv_hv_port port;
		struct pv_hv_arena arena;
		struct pv_hv_notify notify;
		struct pv_hv_look look;
		struct pv_hv_failure failure;
		uint8_t raw[PV_HV_PAYLOAD_BYTES];
	};
};

/*
 * Send one request, with `send_fd` beside it (-1: none; it stays the caller's). 0, or -errno of the socket: -EPIPE or
 * -ECONNRESET when the broker is gone. No signal.
 */
int pv_hv_send(int fd, const struct pv_hv_message *request, int send_fd);
/*
 * Receive the reply to `seq`; replies to earlier requests (whose callers gave up) are dropped. Returns how many
 * descriptors came, all close-on-exec and now the caller's (fewer than reply->header.n_fds when this process can hold no
 * more); -EINTR when a signal arrived (call again); -EPIPE at the
 * broker's end; -EPROTO for anything that is not a reply to `seq`.
 */
int pv_hv_receive(int fd, uint32_t seq, struct pv_hv_message *reply, int *fds, uint32_t max_fds);
/*
 * Both, going on after signals. Result as pv_hv_receive; reply->header.status has the broker's answer.
 * Threads: one call at a time on one socket. Fork: a child has to use a socket of its own.
 */
int pv_hv_call(
	int fd, const struct pv_hv_message *request, int send_fd, struct pv_hv_message *reply, int *fds, uint32_t max_fds);

/*
 * The broker, which holds no inbox mapped: set a slot of the inbox page `page_fd` pending, and ring `bell_fd` if its
 * receiver sleeps. 0 or -errno.
 */
int pv_hv_deliver(int page_fd, uint32_t slot, int bell_fd);
/* The broker: a binding of this waiter changed; ring it after this. */
void pv_bindings_set(struct pv_bindings *bindings, uint32_t waiter, uint32_t generation);

#endif
