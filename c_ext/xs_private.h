/* SPDX-License-Identifier: MIT */
/*
 * What the files of the xenstore engine (pv_xs_*.c) call of each other; what they keep is in xs_types.h. Nothing here is
 * shared with another process but a guest's ring page, which pv_xs_ring.c alone touches, through pv_stream.
 */
#ifndef XS_PRIVATE_H
#define XS_PRIVATE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xs_types.h"

/* -- pv_xs_memory.c: there is always some, or the process ends */

/* Zeroed. */
void *xs_alloc(uint64_t n);
void *xs_alloc_unset(uint64_t n);
/* memory NULL: new, and zeroed. */
void *xs_resize(void *memory, uint64_t n);
/* Whether there is none to set aside: what needs memory is to be refused. */
int xs_memory_is_short(void);
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
/* The file is long, or what it should have may not be on the disk. */
int xs_journal_needs_snapshot(const struct pv_xs *hub);
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
