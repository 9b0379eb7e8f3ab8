/* SPDX-License-Identifier: MIT */
/*
 * What the xenstore engine's files keep: numbers of the protocol, and every struct.
 *
 * A *node* is a place in the tree. Its *content* (value, permissions, names of the children, generation) is a counted
 * object: a transaction that looks at a node keeps the content it saw, and a later change of the tree makes a new one.
 * A *view* is what an operation works on: the tree, or a transaction over it.
 */
#ifndef XS_TYPES_H
#define XS_TYPES_H

#include <stdint.h>

#include "pv_stream.h"
#include "pv_xs.h"

/* -- numbers of the protocol (public/io/xs_wire.h) */

enum {
	XS_CONTROL, XS_DIRECTORY, XS_READ, XS_GET_PERMS, XS_WATCH, XS_UNWATCH, XS_TRANSACTION_START, XS_TRANSACTION_END,
	XS_INTRODUCE, XS_RELEASE, XS_GET_DOMAIN_PATH, XS_WRITE, XS_MKDIR, XS_RM, XS_SET_PERMS, XS_WATCH_EVENT, XS_ERROR,
	XS_IS_DOMAIN_INTRODUCED, XS_RESUME, XS_SET_TARGET, XS_RESTRICT, XS_RESET_WATCHES, XS_DIRECTORY_PART,
	XS_GET_FEATURE, XS_SET_FEATURE, XS_GET_QUOTA, XS_SET_QUOTA,
};

/* Errors on the wire, as negative results of functions here. */
enum xs_errno {
	XS_OK, XS_EINVAL, XS_EACCES, XS_EEXIST, XS_ENOENT, XS_ENOMEM, XS_ENOSPC, XS_EIO, XS_ENOSYS, XS_EBUSY, XS_EAGAIN,
	XS_E2BIG, XS_EPERM, XS_PARKED, XS_UNRESOLVED, XS_N_ERRNOS,
};

struct xs_header {
	uint32_t op;
	uint32_t request_id;
	uint32_t transaction_id;
	uint32_t n;
};

#define XS_HEADER_BYTES 16
#define XS_PATH_MAX 3072
#define XS_RELATIVE_PATH_MAX 2048
#define XS_LEVELS_MAX (XS_PATH_MAX / 2 + 2)
#define XS_DOMID_ANY 0x7FF5
#define XS_DOMID_SELF 0x7FF0
#define XS_DOMID_MAX 0xFFFF

#define XS_READ_ACCESS 1
#define XS_WRITE_ACCESS 2
#define XS_OWNER_ACCESS 4
#define XS_ALL_ACCESS 7
#define XS_IGNORED 8          /* an entry for a domain that did not exist: grants nothing, ever */

/* What counts against a quota of a node's size, as the C daemon stores nodes. */
#define XS_NODE_HEADER_BYTES 16
#define XS_PERMISSION_BYTES 8

#define XS_HIGH_WATER (256 << 10)   /* with more unsent output a connection's requests wait */
#define XS_REQUESTS_PER_TURN 64     /* of one connection, before others have theirs */
#define XS_TURN_NS 50000            /* of a guest: after so long it is others' turn, too */
#define XS_SMALL_REPLY 16           /* bytes; up to this a reply is sent whatever memory a domain holds */
#define XS_RETRY_MS 1000            /* a journal that cannot be written is tried again after so long */
#define XS_MEMORY_REPORT_MS 10000   /* a guest that holds much memory is reported so often at most */

#define XS_FEATURE_ERROR 2
#define XS_FEATURE_RECONNECTION 1
#define XS_FEATURE_WATCH_DEPTH 4
#define XS_FEATURE_DOMID_ANY 8
#define XS_FEATURES 15

/* -- permissions */

struct xs_perm {
	uint16_t domid;
	uint16_t access;
};

/* An interned list: equal lists are one object. */
struct xs_perms {
	struct xs_perms *chain;
	uint32_t refs;
	uint32_t hash;
	uint32_t n;
	struct xs_perm entries[];
};

/* -- the tree */

struct xs_content {
	struct xs_perms *perms;
	char *names;            /* of the children in the order they were made, a NUL after each */
	uint64_t generation;
	uint32_t refs;
	uint32_t n_value;
	uint32_t n_names;
	uint32_t names_room;
	uint8_t value[];
};

struct xs_node {
	struct xs_node *chain;      /* in the table of nodes */
	struct xs_node *parent;     /* NULL: the root */
	struct xs_node *older;      /* in the order they were made */
	struct xs_node *newer;
	struct xs_content *content;
	uint32_t hash;              /* of its path */
	uint32_t refs;              /* the tree's, and of accesses of transactions */
	uint16_t n_name;
	uint16_t n_path;
	uint8_t gone;               /* 1: no longer in the tree; it has no content then, and its parent may be no more */
	uint8_t epoch;              /* of the snapshot that has it; 0: none */
	char name[];
};

/* Levels of a path: level 0 is the root, level i ends at end[i]. */
struct xs_walk {
	const char *path;
	uint32_t n_levels;          /* without the root */
	uint32_t found;             /* deepest level that has a node in the tree */
	struct xs_node *node;       /* that of level `at`, which moves up and down between 0 and found */
	uint32_t at;
	uint16_t end[XS_LEVELS_MAX];
	uint32_t hash[XS_LEVELS_MAX];
};

/* -- transactions */

/* What a transaction knows of a path it has looked at. */
struct xs_access {
	char *path;
	struct xs_node *node;           /* when first seen, NULL: missing; may be gone meanwhile. Once applied: what is there */
	struct xs_content *content;     /* NULL: no such node in its view */
	struct xs_perms *before;        /* permissions when first seen */
	uint64_t base;                  /* generation when first seen; 0: missing */
	uint32_t n_path;
	uint32_t hash;
	uint32_t parent;                /* made here: index of the access to the level above */
	uint32_t level;
	uint32_t sequence;              /* of its making here */
	uint8_t modified;
	uint8_t remade;                 /* was taken away here, whatever came after */
	uint8_t inner;                  /* with a node above it */
	uint8_t event;
	uint8_t exact;
};

/* How many nodes more a domain owns by what a transaction does. */
struct xs_charge {
	uint32_t domid;
	int32_t n;
};

struct xs_transaction {
	struct xs_transaction *next;    /* of its connection */
	struct pv_xs *hub;
	struct xs_domain *domain;
	struct xs_access *accesses;
	uint32_t *table;                /* index + 1 of an access, by hash; 0 empty */
	struct xs_charge *charges;
	uint32_t number;
	uint32_t n_accesses;
	uint32_t accesses_room;
	uint32_t table_room;            /* a power of two */
	uint32_t n_charges;
	uint32_t charges_room;
	uint32_t n_made;
	int64_t memory_bytes;           /* that count as its domain's */
	int refusal;                    /* the errno when it could not look at a node: XS_ENOSPC, XS_ENOMEM; else XS_OK */
	uint8_t failed;                 /* a change could not be made as a whole */
	uint8_t outdated;               /* it gave a node to a domain that is gone */
};

struct xs_view {
	struct pv_xs *hub;
	struct xs_transaction *transaction;   /* NULL: the tree itself */
	struct xs_walk *walk;
};

/* -- watches */

struct xs_watch {
	struct pv_xs_conn *connection;
	struct xs_place *place;
	struct xs_watch *next_of_connection;
	struct xs_watch *previous_of_connection;
	struct xs_watch *next_of_place;
	uint64_t number;
	int32_t depth;              /* levels below its path that it looks at; -1: all */
	uint16_t n_prefix;          /* bytes cut from the path of an event (a relative watch) */
	uint16_t n_token;
	char token[];
};

/* A watched path. */
struct xs_place {
	struct xs_place *chain;
	struct xs_watch *first;
	struct xs_watch *last;
	uint32_t hash;
	uint32_t n_path;
	uint32_t n_levels;
	char path[];
};

/* -- domains */

struct xs_domain {
	struct pv_xs_domain public;
	uint32_t epoch;             /* counts its deaths: what was caused before is not its any more */
	uint32_t n_home;
	uint32_t n_found;           /* nodes it owns, counted by pv_xs_check */
	int64_t credit_ms;          /* when its credit last grew */
	int64_t reported_ms;        /* when its memory was last reported */
	uint8_t has_credit;         /* it shares the rate of writes */
	uint8_t stalled;            /* it is not served for now */
	char home[24];
	struct pv_xs_conn *ring;
	struct pv_xs_conn *first;   /* its connections */
};

/* A guest's request that is not wholly answered: its reply or events it caused are not delivered yet. */
struct xs_cause {
	struct xs_domain *domain;
	uint32_t epoch;
	uint32_t refs;
};

/* -- connections */

/* A packet to send. */
struct xs_out {
	struct xs_out *next;
	struct xs_out *chain;       /* in the connection's table of events */
	struct xs_cause *cause;
	int64_t queued_ms;
	uint32_t hash;              /* of an event */
	uint32_t n;
	uint8_t is_event;
	uint8_t data[];
};

struct pv_xs_conn {
	struct pv_xs *hub;
	struct xs_domain *domain;
	struct pv_xs_conn *next, *previous;                 /* of the hub */
	struct pv_xs_conn *next_of_domain, *previous_of_domain;
	struct pv_xs_conn *next_dirty;
	struct pv_xs_conn *next_turn;                       /* or of the loop's dead */
	struct xs_transaction *transactions;
	struct xs_watch *watches, *last_watch;
	struct xs_out *out, *last_out;
	struct xs_out **events;     /* table of the events in `out`; NULL: none */
	struct xs_watch *first_event;   /* of a new watch, to be sent after the reply */
	const char *broken;
	uint8_t *in;                /* requests not handled yet */
	struct pv_stream stream;    /* of a ring that is served */
	uint8_t *page;              /* NULL: speaks over no ring, or it is not mapped */
	struct pv_port *port;
	uint64_t n_out;             /* bytes */
	uint64_t n_dropped_events;
	uint32_t n_in;
	uint32_t n_waiting;         /* of these: whole requests */
	uint32_t in_room;
	uint32_t out_sent;          /* bytes of the first packet that are gone */
	uint32_t events_room;       /* a power of two */
	uint32_t n_events;
	uint32_t number;
	uint32_t next_transaction;
	uint32_t n_transactions;
	int32_t fd;                 /* -1: none */
	uint32_t epoll_mask;
	uint8_t closed;
	uint8_t dirty;
	uint8_t parked;
	uint8_t again;              /* handles more in its next turn */
	uint8_t served;             /* its ring is: no error has ended it */
	uint8_t stale;              /* its port's binding has changed: nobody is notified till the caller has looked */
	uint8_t owned;              /* the loop frees it */
	uint8_t timed;              /* has events that time out */
};

/* -- the hub */

struct xs_bytes {
	uint8_t *data;
	uint64_t n;
	uint64_t room;
};

struct xs_trace {
	uint8_t *data;              /* a ring of bytes */
	uint64_t start, end;        /* free-running positions of what is kept */
	uint64_t first, next;       /* numbers of the first line kept and of the next one */
	int64_t until_ms;           /* lines are kept until then */
	int32_t fd;
};

struct xs_loop {
	int32_t epoll_fd;
	struct pv_xs_event *events;       /* of the poll that runs */
	uint32_t n_events;
	uint32_t max_events;
	uint32_t n_rings;
	struct pv_xs_conn *turns;         /* who handles more in its next turn */
	struct pv_xs_conn *last_turn;
	struct pv_xs_conn *dead;          /* to be freed when nothing names them any more */
	struct pv_xs_conn **batch;        /* of a flush */
	uint32_t batch_room;
	struct pv_waiter *waiter;         /* where the ports of rings are heard; NULL: nowhere */
	uint8_t *scratch;
	int64_t spin_ns;                  /* how long to watch rings before sleeping */
	int64_t ring_active_ns;           /* when a ring last moved */
	int64_t due_ms;                   /* when pv_xs_on_time has something to do; -1: never */
	uint8_t any_stale;
	uint8_t journal_told;             /* the caller knows of the journal's error */
	uint8_t full_told;                /* the caller knows that the journal is long */
	uint8_t done_told;                /* the caller knows that the snapshot is complete */
};

/* A file of frames, and those not written to it yet. */
struct xs_log {
	struct xs_bytes pending;
	uint64_t frame;             /* where the open frame starts in pending */
	uint64_t bytes;             /* of the file, with what is pending */
	int32_t fd;                 /* -1: none */
	int32_t lost;               /* errno of a sync that failed: the kernel may have given up what it had */
	uint8_t open;               /* 1: a frame is open */
	uint8_t unsynced;           /* 1: something was written since it was last on the disk */
};

struct xs_journal {
	struct xs_log log;
	struct xs_log snapshot;     /* the new file */
	uint64_t frames;
	uint64_t base_bytes;        /* of the file when it was new */
	int64_t again_ms;           /* a file that is lost is not replaced before this moment */
	struct xs_node *next;       /* to be written to the new file */
	int32_t sync;
	int32_t error;
	uint8_t epoch;              /* of the last snapshot */
	uint8_t done;               /* 1: the new file is complete */
};

struct pv_xs {
	uint64_t seed;
	struct pv_xs_limits limits;
	struct xs_node **nodes;
	struct xs_node *root, *newest;
	struct xs_perms **perms;
	struct xs_place **places;
	struct pv_xs_conn *connections;
	struct pv_xs_conn *dirty;
	struct xs_domain **domains[256];
	struct xs_perms *special[2];
	struct xs_cause *cause;         /* of the request being handled; NULL: Dom0's or none */
	struct pv_xs_conn *parked;      /* whose first request waits for the caller */
	uint64_t generation;
	uint64_t watch_number;
	int64_t now_ms;
	int64_t reserve;                /* thousandths of a write */
	int64_t memory_bytes;
	uint32_t n_nodes, nodes_room;
	uint32_t n_perms, perms_room;
	uint32_t n_places, places_room;
	uint32_t places_at[XS_LEVELS_MAX];   /* by level of their path: most levels of a deep path have none */
	uint32_t n_watches;
	uint32_t n_connections;
	uint32_t n_transactions;
	uint32_t connection_number;
	uint32_t unresolved;            /* domid + 1 that a request waits to hear of */
	uint32_t any_absent;
	uint8_t absent[(XS_DOMID_MAX + 1) / 8];   /* bits: domains of which this request has heard that they do not exist */
	uint32_t n_timed;               /* guests' connections with events unread */
	uint32_t n_stalled;             /* domains that are not served for now */
	uint32_t n_rate_domains;        /* that share the rate of writes */
	uint32_t maxima[PV_XS_N_QUOTAS];
	struct pv_xs_statistics statistics;
	struct xs_trace trace;
	struct xs_loop loop;
	struct xs_journal journal;
	struct xs_walk walk;            /* of the request */
	struct xs_walk look;            /* of everything else */
	char path[XS_PATH_MAX + 1];     /* canonical path of the request */
	struct xs_watch **matches;
	uint32_t matches_room;
};
#endif
