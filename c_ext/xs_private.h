/* SPDX-License-Identifier: MIT */
/*
 * What the files of the xenstore engine (pv_xs_*.c) share. Nothing here is shared with another process but a guest's ring
 * page, which pv_xs_ring.c alone touches, through pv_stream.
 *
 * A *node* is a place in the tree. Its *content* (value, permissions, names of the children, generation) is a counted
 * object: a transaction that looks at a node keeps the content it saw, and a later change of the tree makes a new one.
 * A *view* is what an operation works on: the tree, or a transaction over it.
 */
#ifndef XS_PRIVATE_H
#define XS_PRIVATE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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
	struct xs_node *node;           /* when first seen; if it was missing: the nearest above that was there. May be gone */
	struct xs_content *content;     /* NULL: no such node in its view */
	struct xs_perms *before;        /* permissions when first seen */
	uint64_t base;                  /* generation when first seen; 0: missing */
	uint32_t n_path;
	uint32_t hash;
	uint32_t below;                 /* missing when first seen: hash of the path that `node` had no child at */
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
	uint8_t open;               /* 1: a frame is open */
	uint8_t unsynced;           /* 1: something was written since it was last on the disk */
};

struct xs_journal {
	struct xs_log log;
	struct xs_log snapshot;     /* the new file */
	uint64_t frames;
	uint64_t base_bytes;        /* of the file when it was new */
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

/* -- memory: there is always some, or the process ends */

void *xs_alloc(uint64_t n);
void *xs_resize(void *memory, uint64_t n);
/* Make room for n more bytes and return where they go. */
uint8_t *xs_bytes_add(struct xs_bytes *bytes, uint64_t n);

static inline uint32_t xs_mix(uint64_t hash)
{
	hash ^= hash >> 32;
	hash *= 0x9E3779B97F4A7C15u;
	return (uint32_t)(hash >> 32);
}

/* The hash of a path is xs_mix of this over its bytes; it can be gone on with from a prefix. */
uint64_t xs_hash_bytes(uint64_t seed, const void *data, uint32_t n);

/* A quota is reached by a count that a domain may not have. */
static inline int xs_reached(int64_t count, uint32_t quota)
{
	return quota && count >= quota;
}

/* -- pv_xs_perms.c */

struct xs_perms *xs_perms_intern(struct pv_xs *hub, const struct xs_perm *entries, uint32_t n);
struct xs_perms *xs_perms_keep(struct xs_perms *perms);
void xs_perms_drop(struct pv_xs *hub, struct xs_perms *perms);
/* From wire form ("r7\0b0\0"), n_words words: XS_OK and entries, or XS_EINVAL. */
int xs_perms_parse(const char *text, uint32_t n_words, struct xs_perm *entries);
/* Wire form; room for 8 bytes an entry: how many. */
uint32_t xs_perms_format(const struct xs_perms *perms, char *text);
int xs_access(const struct xs_domain *domain, const struct xs_perms *perms);
/* The same list with another owner: a new reference. */
struct xs_perms *xs_perms_owned_by(struct pv_xs *hub, struct xs_perms *perms, uint32_t domid);
/* Domains that are gone, a bit each. */
static inline int xs_is_dead(const uint8_t *dead, uint32_t domid)
{
	return dead[domid >> 3] >> (domid & 7) & 1;
}
int xs_perms_name_dead(const struct xs_perms *perms, const uint8_t *dead);
/* The same without entries of the dead; what they cannot own any longer is Dom0's: a new reference. */
struct xs_perms *xs_perms_without(struct pv_xs *hub, struct xs_perms *perms, const uint8_t *dead);
static inline uint32_t xs_owner(const struct xs_perms *perms)
{
	return perms->entries[0].domid;
}

/* -- pv_xs_path.c */

/* Canonical form in hub->path and hub->walk.n_levels, end, hash: its length, or 0 for no valid path. */
uint32_t xs_canonical(struct pv_xs *hub, const struct xs_domain *domain, const char *path, uint32_t n);
/* Bytes that count against a guest's longest path. */
uint32_t xs_quota_length(const char *path, uint32_t n);
/* Whether a name has characters that are allowed, no empty part and no slash at its end. */
int xs_is_well_formed(struct pv_xs *hub, const char *path, uint32_t n);
/* Levels and hashes of a valid absolute path. */
void xs_measure(struct pv_xs *hub, struct xs_walk *walk, const char *path, uint32_t n);
/* Find how much of a measured path is there. */
void xs_walk(struct pv_xs *hub, struct xs_walk *walk);

/* -- pv_xs_tree.c */

struct xs_node *xs_walk_node(struct xs_walk *walk, uint32_t level);
/* hash: that of the child's path, from a walk. */
struct xs_node *xs_find_child(struct pv_xs *hub, struct xs_node *parent, const char *name, uint32_t n, uint32_t hash);
/* The absolute path of a node: its length. */
uint32_t xs_path_of(const struct xs_node *node, char *path);

struct xs_content *xs_content_new(struct xs_perms *perms, const void *value, uint32_t n_value);
struct xs_content *xs_content_copy(const struct xs_content *content);
struct xs_content *xs_content_keep(struct xs_content *content);
void xs_content_drop(struct pv_xs *hub, struct xs_content *content);
void xs_content_set_value(struct xs_content **slot, const void *value, uint32_t n);
void xs_content_set_perms(struct pv_xs *hub, struct xs_content *content, struct xs_perms *perms);
int xs_content_has_name(const struct xs_content *content, const char *name, uint32_t n);
void xs_content_add_name(struct xs_content *content, const char *name, uint32_t n);
void xs_content_remove_name(struct xs_content *content, const char *name, uint32_t n);
uint32_t xs_content_bytes(const struct xs_content *content);

/* Changes of the tree itself. The caller enters names in parents, counts owners and writes the journal. */
struct xs_node *xs_node_add(struct pv_xs *hub, struct xs_node *parent, const char *name, uint32_t n, uint32_t hash,
			    struct xs_content *content);
void xs_node_unlink(struct pv_xs *hub, struct xs_node *node);
void xs_node_free(struct pv_xs *hub, struct xs_node *node);
/* Somebody who has kept it does so no longer. */
void xs_node_drop(struct xs_node *node);
/* Its content, for changing right now: nobody else's, with a new generation. */
struct xs_content **xs_node_edit(struct pv_xs *hub, struct xs_node *node);
/* All of a subtree, children before parents: an array of *n, to be freed. */
struct xs_node **xs_subtree(struct pv_xs *hub, struct xs_node *top, uint32_t *n);
void xs_charge_nodes(struct pv_xs *hub, uint32_t domid, int32_t n);
/* Memory of a node, put to its owner's account (sign 1) or taken off it (-1). */
void xs_account_node(struct pv_xs *hub, const struct xs_node *node, int sign);

/* -- pv_xs_transaction.c */

struct xs_transaction *xs_transaction_new(struct pv_xs_conn *connection);
/* It is no longer open; it may still commit. */
void xs_transaction_close(struct xs_transaction *transaction);
void xs_transaction_free(struct xs_transaction *transaction);
/* These domains (bits) are gone: no permission is made for them. */
void xs_transaction_forget(struct xs_transaction *transaction, const uint8_t *dead);
struct xs_transaction *xs_transaction_find(struct pv_xs_conn *connection, uint32_t number);
struct xs_access *xs_transaction_look(struct xs_transaction *transaction, struct xs_walk *walk, uint32_t level);
/* The same for a child of what an access knows: its path with its hash, and where the child's name starts in it. */
struct xs_access *xs_transaction_look_below(struct xs_transaction *transaction, uint32_t parent, const char *path, uint32_t n,
					    uint32_t start, uint32_t hash);
struct xs_content **xs_transaction_edit(struct xs_transaction *transaction, struct xs_access *access);
void xs_transaction_charge(struct xs_transaction *transaction, uint32_t domid, int32_t n_nodes, int64_t n_bytes);
int64_t xs_transaction_charged(const struct xs_transaction *transaction, uint32_t domid);
/* XS_OK and the events are fired, or an errno. The transaction stays the caller's. */
int xs_transaction_commit(struct xs_transaction *transaction, const struct xs_domain *who);

/* -- pv_xs_operations.c: on hub->path with hub->walk; XS_OK or an errno */

int xs_lookup(struct xs_view *view, const struct xs_domain *who, int need, struct xs_content **content);
int xs_write(struct xs_view *view, struct xs_domain *who, const void *value, uint32_t n);
/* *made: whether it was not there. */
int xs_mkdir(struct xs_view *view, struct xs_domain *who, int *made);
/* *removed: whether there was something. */
int xs_rm(struct xs_view *view, struct xs_domain *who, int *removed);
int xs_set_perms(struct xs_view *view, struct xs_domain *who, const struct xs_perm *entries, uint32_t n);

/* -- pv_xs_watch.c */

struct xs_watch *xs_watch_find(struct pv_xs_conn *connection, const char *path, uint32_t n, const char *token,
			       uint32_t n_token);
struct xs_watch *xs_watch_add(struct pv_xs_conn *connection, const char *path, uint32_t n, const char *token,
			      uint32_t n_token, uint32_t n_prefix, int32_t depth);
void xs_watch_remove(struct xs_watch *watch);
/* Whether there may be a watch of exactly the path with this hash. */
int xs_is_watched(const struct pv_xs *hub, uint32_t hash);
/* Something changed at a path. content: what is or was there, NULL: look. before: its permissions before, or NULL. */
void xs_fire(struct pv_xs *hub, const char *path, uint32_t n, const struct xs_content *content, int exact,
	     const struct xs_perms *before);
/* A node was taken away, and perhaps its parent too, but neither is freed yet. */
void xs_fire_removed(struct pv_xs *hub, const struct xs_node *node, int exact);
void xs_fire_watch(struct xs_watch *watch, const char *path, uint32_t n);

/* -- pv_xs_domain.c */

struct xs_domain *xs_domain(struct pv_xs *hub, uint32_t domid);        /* made when it is not there */
struct xs_domain *xs_domain_find(struct pv_xs *hub, uint32_t domid);   /* or NULL */
/* The one with the next higher id, or NULL; after NULL comes the first. */
struct xs_domain *xs_domain_next(struct pv_xs *hub, const struct xs_domain *domain);
/* It exists, as somebody who knows has said. */
void xs_make_known(struct pv_xs *hub, struct xs_domain *domain);
static inline int xs_privileged(const struct xs_domain *domain)
{
	return domain->public.domid == 0;
}
/* Remember the highest count of what a quota is for. */
static inline void xs_note(struct xs_domain *domain, uint32_t quota, int64_t count)
{
	if (count > domain->public.maxima[quota])
		domain->public.maxima[quota] = (uint32_t)count;
}
/* Whether a guest may not have `count` of what a quota is for; if it may, the count is noted. */
int xs_over(struct xs_domain *domain, uint32_t quota, int64_t count);
/* Whether it may not hold n_bytes more. */
int xs_over_memory(struct xs_domain *domain, int64_t n_bytes);
void xs_account(struct pv_xs *hub, struct xs_domain *domain, int64_t n_bytes);
/* Report a guest that holds much memory, now and then. */
void xs_note_memory(struct pv_xs *hub, struct xs_domain *domain);
/* Whether requests that were read may be handled, whether more may be read. */
int xs_may_be_handled(const struct xs_domain *domain);
int xs_may_be_read(const struct xs_domain *domain);
/* It is not served for now. */
void xs_stall(struct pv_xs *hub, struct xs_domain *domain);
/* See which domains that were not served may go on: their connections become dirty. */
void xs_settle(struct pv_xs *hub);

/* -- pv_xs_rate.c */

/* A guest that is new, that is gone. */
void xs_join_rate(struct pv_xs *hub, struct xs_domain *domain);
void xs_leave_rate(struct pv_xs *hub, struct xs_domain *domain);
/* A guest has changed the tree: it pays while transactions are open that it may spoil. */
void xs_debit(struct pv_xs *hub, struct xs_domain *domain);
/* Add what has come since its credit last grew; settle with the reserve. */
void xs_grow_credit(struct pv_xs *hub, struct xs_domain *domain);
/* How long after its credit last grew a guest is out of debt, if nobody helps. */
int64_t xs_debt_ms(const struct pv_xs *hub, const struct xs_domain *domain);

/* -- pv_xs_output.c */

/* A request of a guest is being handled: what is queued meanwhile belongs to it. */
struct xs_cause *xs_cause_new(struct xs_domain *domain);
/* One of the packets that belong to a request is out of the way; after the last one it is no longer outstanding. */
void xs_cause_drop(struct xs_cause *cause);
void xs_mark_dirty(struct pv_xs_conn *connection);
/* A reply with room for n bytes of payload, queued: where they go. */
uint8_t *xs_put_reply(struct pv_xs_conn *connection, uint32_t op, uint32_t request_id, uint32_t transaction_id, uint32_t n);
void xs_put_event(struct pv_xs_conn *connection, const char *path, uint32_t n_path, const char *token, uint32_t n_token);
/* Bytes to send as they are. */
uint8_t *xs_put_raw(struct pv_xs_conn *connection, uint32_t n);
/* Take away the first packet, sent or not. */
void xs_pop_output(struct pv_xs_conn *connection);
void xs_drop_old_events(struct pv_xs_conn *connection);
/* When it has something to drop next; INT64_MAX: never. */
int64_t xs_next_expiry(const struct pv_xs_conn *connection);

/* -- pv_xs_conn.c */

void xs_drop_state(struct pv_xs_conn *connection);
/* Whether requests that were read have to wait. */
int xs_blocked(const struct pv_xs_conn *connection);
int xs_handle_waiting(struct pv_xs_conn *connection);
/* Bytes that are not handled yet. */
void xs_keep_input(struct pv_xs_conn *connection, const uint8_t *data, uint32_t n);
/* Forget the first n bytes of what was not handled yet. */
void xs_consume_input(struct pv_xs_conn *connection, uint32_t n);

/* -- pv_xs_request.c */

/* Handle one request and queue its reply: XS_OK, XS_PARKED or XS_UNRESOLVED (then it stays the first in `in`). */
int xs_handle(struct pv_xs_conn *connection, const struct xs_header *header, const uint8_t *payload);
extern const char *const xs_errno_names[XS_N_ERRNOS];

/* -- pv_xs_hub.c */

/* The parked request is over, with what was asked and heard for it. */
void xs_drop_parked(struct pv_xs *hub);
/* What one request has heard of domains that do not exist is not true for the next. */
void xs_forget_absent(struct pv_xs *hub);

/* -- pv_xs_trace.c */

static inline int xs_traces(const struct pv_xs *hub)
{
	return hub->trace.fd >= 0 || hub->now_ms < hub->trace.until_ms;
}

void xs_trace_request(struct pv_xs_conn *connection, const struct xs_header *header, const uint8_t *payload,
		      const char *outcome, int64_t ns);

/* -- pv_xs_journal.c: records of the open frame */

/* Its content is new, and so many levels above it are, with its permissions. */
void xs_log_node(struct pv_xs *hub, const char *path, uint32_t n, const struct xs_node *node, uint32_t n_above);
/* It and what is below it are going to be taken away. */
void xs_log_removed(struct pv_xs *hub, const char *path, uint32_t n, const struct xs_node *node);
void xs_log_special(struct pv_xs *hub, int name);
void xs_log_domain(struct pv_xs *hub, const struct xs_domain *domain);
/* A quota that new domains get. */
void xs_log_quota(struct pv_xs *hub, uint32_t quota, uint32_t value);
/* The change is whole: close the frame. */
void xs_log_commit(struct pv_xs *hub);
int xs_journal_is_long(const struct pv_xs *hub);
/* A node goes away while a snapshot is being written. */
void xs_snapshot_skip(struct pv_xs *hub, const struct xs_node *node);
/* A node was made, after all others. */
void xs_snapshot_meet(struct pv_xs *hub, struct xs_node *node);

/* -- pv_xs_loop.c, pv_xs_ring.c */

#define XS_SCRATCH_BYTES (64 << 10)

void xs_loop_init(struct pv_xs *hub);
void xs_loop_close(struct pv_xs *hub);
/* A connection is closed: its socket too. */
void xs_loop_forget(struct pv_xs_conn *connection);
void xs_take_turn_later(struct pv_xs_conn *connection);
void xs_tell(struct pv_xs *hub, uint32_t kind, int fd, uint32_t mask, uint32_t domid, const char *reason);
/* Take requests from a ring; send what there is to send. Whether bytes moved. */
int xs_ring_read(struct pv_xs_conn *connection);
int xs_ring_write(struct pv_xs_conn *connection);
void xs_ring_give_up(struct pv_xs_conn *connection, uint32_t why);

#endif
