/* SPDX-License-Identifier: MIT */
/*
 * The xenstore engine: the tree, its transactions and watches, the sessions of clients, their quotas, and the loop that
 * moves their bytes. Wire protocol: Xen docs/misc/xenstore.txt, xenstore-ring.txt, public/io/xs_wire.h. Where daemons
 * differ it behaves as the C daemon of Xen 4.22. The classes in src/xenstore are a second implementation with the same
 * rules; tests compare the two.
 *
 * A hub holds everything. A connection speaks for one domain; it has a socket or a ring that the loop serves, or neither,
 * and then the caller moves its bytes (pv_xs_feed, pv_xs_output, pv_xs_sent).
 *
 * Operations that need the hypervisor or files (PV_XS_PARKED) are the caller's: the engine stops at such a request until
 * the caller has given its reply.
 *
 * Trust: every byte of a client is checked here. A client over the payload limit, or a ring with impossible indexes, is
 * given up (`broken`), never the process. Memory that a guest can make the engine hold is bounded by its quotas. When the
 * machine has no memory left, requests that need some get ENOMEM until there is again; 16 MiB are set aside so that
 * what was begun can be ended. A single request that needs more than these ends the process (abort), as its journal allows.
 *
 * Threads: one at a time. Fork: not in a child.
 */
#ifndef PV_XS_H
#define PV_XS_H

#include <stdint.h>

#include "pv_event.h"

#define PV_XS_PAYLOAD_MAX 4096
#define PV_XS_N_OPS 27

/* Quotas of a domain, by index; 0 is no limit. */
#define PV_XS_QUOTA_NODES 0
#define PV_XS_QUOTA_WATCHES 1
#define PV_XS_QUOTA_OUTSTANDING 2
#define PV_XS_QUOTA_MEMORY 3
#define PV_XS_QUOTA_SOFT_MEMORY 4
#define PV_XS_QUOTA_TRANSACTIONS 5
#define PV_XS_QUOTA_TRANSACTION_NODES 6
#define PV_XS_QUOTA_NODE_PERMISSIONS 7
#define PV_XS_QUOTA_PATH_MAX 8
#define PV_XS_QUOTA_NODE_SIZE 9
#define PV_XS_N_QUOTAS 10

#define PV_XS_GLOBAL 0xFFFFFFFF   /* as a domid: the defaults for all domains */

struct pv_xs;        /* opaque: a hub */
struct pv_xs_conn;   /* opaque: a connection */

/* What the caller may set before it serves. */
struct pv_xs_limits {
	uint32_t quotas[10];               /* what new domains start with, PV_XS_QUOTA_* */
	uint32_t privileged_output_bytes;  /* unread output of a connection of Dom0, which is closed over it: it must not miss events */
	uint32_t event_timeout_ms;         /* an event that a guest has not read for so long is dropped; 0: never */
};

/* A domain as the engine knows it. The second group is the caller's to set with pv_xs_set_domain. */
struct pv_xs_domain {
	uint32_t domid;
	uint32_t known;          /* 1: exists; 0: only its nodes are counted */
	uint32_t n_nodes;
	uint32_t n_watches;
	uint32_t n_transactions;
	uint32_t n_outstanding;
	uint32_t n_connections;
	int64_t memory_bytes;
	int64_t credit;          /* thousandths of a write */
	uint32_t quotas[10];
	uint32_t maxima[10];     /* highest value seen of each quota's count */

	uint32_t introduced;
	uint32_t shut_down;
	uint32_t features;
	uint32_t has_target;
	uint32_t target;
	uint32_t gfn;
	uint32_t port;
};

struct pv_xs_statistics {
	uint64_t nodes;
	uint64_t watches;
	uint64_t connections;
	uint64_t transactions;
	uint64_t memory_bytes;       /* of nodes, watches and buffers */
	uint64_t requests;
	uint64_t events;
	uint64_t events_merged;
	uint64_t events_dropped;
	uint64_t wake_ups;
	uint64_t journal_bytes;      /* of the journal's current file */
	uint64_t journal_frames;
	uint64_t generation;
};

/* A request that the caller answers. `payload` holds until the answer. */
struct pv_xs_request {
	struct pv_xs_conn *connection;
	uint32_t op;
	uint32_t request_id;
	uint32_t transaction_id;
	uint32_t domid;
	uint32_t n_payload;
	const uint8_t *payload;
};

#define PV_XS_DONE 0
#define PV_XS_PARKED 1         /* pv_xs_parked tells the request; nothing is handled until pv_xs_answer */

/* seed: for the hash of names, unknown to clients. */
struct pv_xs *pv_xs_new(uint64_t seed);
/* Also closes every connection's socket. */
void pv_xs_free(struct pv_xs *hub);
struct pv_xs_limits *pv_xs_limits_of(struct pv_xs *hub);
void pv_xs_get_statistics(struct pv_xs *hub, struct pv_xs_statistics *statistics);
/* Milliseconds of any steady clock; the loop sets it itself. */
void pv_xs_set_now(struct pv_xs *hub, int64_t now_ms);
/* Go through everything that must agree: NULL, or what does not. */
const char *pv_xs_check(struct pv_xs *hub);

/* -- connections. `known` is set for the domain. */
struct pv_xs_conn *pv_xs_connect(struct pv_xs *hub, uint32_t domid);
/* Everything it holds goes, its socket is closed; the struct stays until pv_xs_conn_free. Twice is harmless. */
void pv_xs_disconnect(struct pv_xs_conn *connection);
void pv_xs_conn_free(struct pv_xs_conn *connection);
/* Back to how it was when new: watches, transactions, half a request and unsent output are gone. */
void pv_xs_reset(struct pv_xs_conn *connection);
/* Take bytes of the client and handle the requests they complete: PV_XS_*. n 0: go on with what waits. */
int pv_xs_feed(struct pv_xs_conn *connection, const uint8_t *data, uint32_t n);
int pv_xs_wants_input(const struct pv_xs_conn *connection);
uint64_t pv_xs_n_output(const struct pv_xs_conn *connection);
uint64_t pv_xs_n_dropped_events(const struct pv_xs_conn *connection);
/* Copy the next bytes to send: how many, at most max. */
uint32_t pv_xs_output(const struct pv_xs_conn *connection, uint8_t *buffer, uint32_t max);
void pv_xs_sent(struct pv_xs_conn *connection, uint32_t n);
/* NULL, or why this client cannot be served any longer. */
const char *pv_xs_broken(const struct pv_xs_conn *connection);
void pv_xs_give_up(struct pv_xs_conn *connection, const char *why);
int pv_xs_closed(const struct pv_xs_conn *connection);
uint32_t pv_xs_domid(const struct pv_xs_conn *connection);
uint32_t pv_xs_number(const struct pv_xs_conn *connection);

/* The next connection that whoever moves bytes must look at: it has output, is broken, or may go on (pv_xs_feed with n 0);
 * NULL: none. For connections that the loop does not serve. */
struct pv_xs_conn *pv_xs_next_dirty(struct pv_xs *hub);

/* -- requests that the caller answers. 1 and the request, or 0: none waits. */
int pv_xs_parked(struct pv_xs *hub, struct pv_xs_request *request);
/* error: 0, or 1 for an error with its name as payload. The connection goes on: PV_XS_*. */
int pv_xs_answer(struct pv_xs *hub, int error, const uint8_t *payload, uint32_t n);
/* A permission names a domain that the engine does not know: 1 and its id. Answer with pv_xs_resolve. */
int pv_xs_unresolved(struct pv_xs *hub, uint32_t *domid);
int pv_xs_resolve(struct pv_xs *hub, int exists);

/* -- domains */
/* 1 and what is known of it, or 0. */
int pv_xs_get_domain(struct pv_xs *hub, uint32_t domid, struct pv_xs_domain *domain);
/* Set the second group of fields; makes it known. */
void pv_xs_set_domain(struct pv_xs *hub, const struct pv_xs_domain *domain);
/* Ids of the known ones, ascending: how many, of which max are written. */
uint32_t pv_xs_domains(struct pv_xs *hub, uint32_t *domids, uint32_t max);
/* Take away all that these domains hold. */
void pv_xs_forget(struct pv_xs *hub, const uint32_t *domids, uint32_t n);
/* name: 0 @introduceDomain, 1 @releaseDomain. */
void pv_xs_fire_special(struct pv_xs *hub, int name, uint32_t domid);
/* A domain's own value, or for PV_XS_GLOBAL the one that new domains get. */
uint32_t pv_xs_quota(struct pv_xs *hub, uint32_t domid, uint32_t quota);
void pv_xs_set_quota(struct pv_xs *hub, uint32_t domid, uint32_t quota, uint32_t value);
/* The highest counts seen in any guest, PV_XS_N_QUOTAS of them; `reset`: forget what was before. */
void pv_xs_maxima(struct pv_xs *hub, uint32_t *maxima, int reset);

/* -- time */
/* Milliseconds until pv_xs_on_time has something to do, -1: nothing. */
int64_t pv_xs_next_timeout(struct pv_xs *hub);
/* Drop events that were not read in time, give credit. */
void pv_xs_on_time(struct pv_xs *hub);

/* -- trace: lines of text about each request while it is on */
/* Keep lines until this moment. */
void pv_xs_trace_until(struct pv_xs *hub, int64_t now_ms);
/* Access log: an open file, or -1. */
void pv_xs_trace_to(struct pv_xs *hub, int fd);
/* Whole lines from number *first on, up to max bytes: how many bytes; *first is set to the number after the last. *lost:
 * lines that are not kept any longer. */
uint32_t pv_xs_trace_read(struct pv_xs *hub, uint64_t *first, uint64_t *lost, uint8_t *buffer, uint32_t max);

/* -- journal: see pv_xs_journal.c for the form of the file */
/* Make the tree, domains and quotas of a journal those of a new hub: 0, *n_good is where its whole frames end: what follows
 * is the torn end of a last write, which nobody was told of. -EPROTO: not a journal, or damaged at *n_good; -ENOTSUP:
 * another version. */
int pv_xs_journal_load(struct pv_xs *hub, const uint8_t *data, uint64_t n, uint64_t *n_good);
/* From now on every change is written to fd, at its position, before it is acknowledged. n_bytes: what is there. sync: and
 * to the disk. fd -1: no longer. The fd stays the caller's. */
void pv_xs_journal_to(struct pv_xs *hub, int fd, uint64_t n_bytes, int sync);
void pv_xs_journal_sync(struct pv_xs *hub, int sync);
/* Start to write a snapshot to a new file, which follows all changes from now on. The loop goes on with it. */
void pv_xs_snapshot_start(struct pv_xs *hub, int fd);
/* Write up to n_nodes nodes more: 1 done (the new file is complete), 0 not yet, -errno. */
int pv_xs_snapshot_step(struct pv_xs *hub, uint32_t n_nodes);
/* The complete new file takes the place of the journal. */
void pv_xs_snapshot_adopt(struct pv_xs *hub);
void pv_xs_snapshot_abort(struct pv_xs *hub);
/* Write what has not been: 0 or -errno (then nothing more is acknowledged). The loop does it before it sends. A file that
 * could not be synced stays bad until a snapshot takes its place. */
int pv_xs_journal_flush(struct pv_xs *hub);

/* -- loop */
#define PV_XS_EVENT_FD 1        /* a descriptor of the caller's is ready: fd, mask */
#define PV_XS_EVENT_CLOSED 2    /* a connection has ended: domid, reason (NULL: its client left) */
#define PV_XS_EVENT_STALE 3     /* the binding of a ring's port has changed: domid */
#define PV_XS_EVENT_PARKED 4    /* a request for the caller */
/* The journal cannot be written: mask is the errno; nothing is acknowledged till it can, which is told too: mask 0. */
#define PV_XS_EVENT_JOURNAL 5
#define PV_XS_EVENT_LONG 6      /* a snapshot should take the journal's place: it is long, or could not be synced */
#define PV_XS_EVENT_MEMORY 8    /* a guest holds much memory: domid */
#define PV_XS_EVENT_SNAPSHOT 7  /* the snapshot is complete: pv_xs_snapshot_adopt; mask: else the errno */

struct pv_xs_event {
	uint32_t kind;
	int32_t fd;
	uint32_t mask;
	uint32_t domid;
	const char *reason;
};

/* 0 or -errno. */
int pv_xs_loop_open(struct pv_xs *hub);
/* Descriptors of the sockets it serves and will go on to serve: how many, of which max are written. */
uint32_t pv_xs_sockets(struct pv_xs *hub, int32_t *fds, uint32_t max);
/* A descriptor of the caller's: told by PV_XS_EVENT_FD while it is ready. */
int pv_xs_loop_add(struct pv_xs *hub, int fd, uint32_t mask);
int pv_xs_loop_remove(struct pv_xs *hub, int fd);
/* Serve a connection over a socket, which the loop owns from now on. -errno: both are closed. */
int pv_xs_serve_socket(struct pv_xs_conn *connection, int fd);
/* Serve a connection over a mapped ring page (4096 bytes); page and port stay the caller's and must outlive that.
 * PV_XS_RING_FRESH: empty both streams; _BROKEN: what was under way is lost, and the guest is told so (error COMM); it may
 * ask for a reconnection; _RESUME: go on with what stands in the page. */
#define PV_XS_RING_FRESH 0
#define PV_XS_RING_BROKEN 1
#define PV_XS_RING_RESUME 2
void pv_xs_serve_ring(struct pv_xs_conn *connection, void *page, struct pv_port *port, int how);
/* The page and the port are not used any more. */
void pv_xs_stop_ring(struct pv_xs_conn *connection);
/* The port knows its peer again. */
void pv_xs_ring_bound(struct pv_xs_conn *connection);
/* Its port was pending. */
void pv_xs_ring_look(struct pv_xs_conn *connection);
/* The connection over a domain's ring, or NULL. */
struct pv_xs_conn *pv_xs_ring_of(struct pv_xs *hub, uint32_t domid);
/* Hear the ports of rings at this waiter, which is always armed. What is pending there and is no ring's is told by
 * PV_XS_EVENT_FD with the waiter's descriptor. NULL: no longer. spin_ns: how long rings are watched before sleeping. */
int pv_xs_loop_waiter(struct pv_xs *hub, struct pv_waiter *waiter, int64_t spin_ns);
/* Serve until something is there for the caller, at most timeout_ms (-1: no limit): how many events. Without the GIL. */
int pv_xs_poll(struct pv_xs *hub, int64_t timeout_ms, struct pv_xs_event *events, uint32_t max);

/* -- live update: the state beside the journal's, as bytes */
/* Connections with their descriptors, watches, half-read requests and unsent output: how many bytes; the caller frees
 * with pv_xs_state_free. */
int64_t pv_xs_state_save(struct pv_xs *hub, uint8_t **state);
void pv_xs_state_free(uint8_t *state);
/* Into a hub that has loaded the tree; the sockets are those of this process. 0; -EPROTO not a state of this version. */
int pv_xs_state_load(struct pv_xs *hub, const uint8_t *state, uint64_t n);

#endif
