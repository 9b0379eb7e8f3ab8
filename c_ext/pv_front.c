/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "pv_front.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pv_atomic.h"
#include "pv_hv.h"

#define N_PLACES 2   /* for rings: the pages of one may still be held by a backend that died */

/* An inbox of ours or of the peer's, with its doorbell. */
struct bell_page {
	struct pv_inbox *page;   /* NULL: none */
	int fd;
};

struct pv_front {
	int broker_fd;
	uint32_t seq;
	pthread_mutex_t calls;   /* one call of the broker at a time, and what is done with its reply */
	struct pv_bindings *bindings;
	uint32_t waiter_index;
	int has_waiter;
	struct pv_waiter waiter;
	struct bell_page own;
	uint32_t own_number;
	struct pv_port port;
	uint32_t port_number;    /* 0: there is none */
	struct bell_page peer;
	struct pv_granter granter;
	uint8_t *pages;          /* of the whole arena; NULL: there is none */
	size_t entries_bytes;
	struct pv_front_wish wish;
	uint32_t place;          /* of the ring that is there or was there last */
	int has_ring;
	struct pv_ring ring;
};

static void *map_shared(int fd, size_t n_bytes, int protection)
{
	void *memory = mmap(NULL, n_bytes, protection, MAP_SHARED, fd, 0);

	if (memory == MAP_FAILED)
		return NULL;
	madvise(memory, n_bytes, MADV_DONTFORK);
	return memory;
}

static void close_all(const int *fds, int n)
{
	for (int i = 0; i < n; i++)
		close(fds[i]);
}

/* One call; how many descriptors came, at most PV_HV_MAX_FDS; or the negative errno of the socket or of the refusal. */
static int ask(struct pv_front *front, uint16_t op, struct pv_hv_message *message, int *fds)
{
	struct pv_hv_message reply;
	int n;

	message->header = (struct pv_hv_header){ .op = op, .seq = ++front->seq };
	n = pv_hv_call(front->broker_fd, message, -1, &reply, fds, PV_HV_MAX_FDS);
	if (n < 0)
		return n == -ECONNRESET || n == -ENOTCONN ? -EPIPE : n;
	*message = reply;
	if (reply.header.status == 0 && n == reply.header.n_fds)
		return n;
	close_all(fds, n);
	if (reply.header.status == 0)
		return -EMFILE;
	return reply.header.status < 0 ? reply.header.status : -EPROTO;
}

/* The same for an operation whose reply has exactly n descriptors. */
static int ask_for(struct pv_front *front, uint16_t op, struct pv_hv_message *message, int *fds, int wanted)
{
	int n = ask(front, op, message, fds);

	if (n < 0 || n == wanted)
		return n < 0 ? n : 0;
	close_all(fds, n);
	return -EPROTO;
}

static void ask_quietly(struct pv_front *front, uint16_t op, struct pv_hv_message *message)
{
	int fds[PV_HV_MAX_FDS];
	int n = ask(front, op, message, fds);

	if (n > 0)
		close_all(fds, n);
}

static int greet(struct pv_front *front)
{
	struct pv_hv_message message = { .hello = { .magic = PV_HV_MAGIC, .version = PV_HV_VERSION } };
	int fd, error = ask_for(front, PV_HV_HELLO, &message, &fd, 1);

	if (error)
		return error;
	front->bindings = map_shared(fd, PV_PAGE_BYTES, PROT_READ);
	close(fd);
	if (!front->bindings)
		return -ENOMEM;
	if (message.hello.magic != PV_HV_MAGIC || message.hello.version != PV_HV_VERSION ||
	    front->bindings->magic != PV_BINDINGS_MAGIC || front->bindings->version != PV_SHARED_VERSION)
		return -EPROTO;
	return 0;
}

static int make_waiter(struct pv_front *front)
{
	struct pv_hv_message message = { 0 };
	int fds[PV_HV_MAX_FDS];
	int error = ask_for(front, PV_HV_WAITER_CREATE, &message, fds, 0);

	if (error)
		return error;
	front->waiter_index = message.port.waiter;
	if (front->waiter_index >= PV_BINDINGS_WAITERS)
		return -EPROTO;
	error = pv_waiter_init(&front->waiter, &front->bindings->generation[front->waiter_index]);
	front->has_waiter = !error;
	return error;
}

struct pv_front *pv_front_open(int broker_fd, int *error)
{
	struct pv_front *front = calloc(1, sizeof(*front));

	*error = -ENOMEM;
	if (!front) {
		close(broker_fd);
		return NULL;
	}
	front->broker_fd = broker_fd;
	pthread_mutex_init(&front->calls, NULL);
	*error = greet(front);
	if (!*error)
		*error = make_waiter(front);
	if (!*error)
		return front;
	pv_front_close(front);
	return NULL;
}

static void unmap(struct bell_page *bell)
{
	if (!bell->page)
		return;
	munmap(bell->page, PV_PAGE_BYTES);
	close(bell->fd);
	bell->page = NULL;
}

/* Takes both descriptors. 0, -ENOMEM, or -EPROTO when it is no inbox. */
static int map_inbox(struct bell_page *bell, const int *fds)
{
	bell->page = map_shared(fds[0], PV_PAGE_BYTES, PROT_READ | PROT_WRITE);
	bell->fd = fds[1];
	close(fds[0]);
	if (!bell->page) {
		close(fds[1]);
		return -ENOMEM;
	}
	if (pv_inbox_check(bell->page) == 0)
		return 0;
	unmap(bell);
	return -EPROTO;
}

static void forget_peer(struct pv_front *front, uint32_t generation)
{
	/* When this is done no sender is in the page. */
	pv_port_set_peer(&front->port, NULL, 0, -1, generation);
	unmap(&front->peer);
}

/* What a reply says of the peer, with the descriptors of its inbox, or none. */
static int learn(struct pv_front *front, const struct pv_hv_port *said, const int *fds, int n_fds)
{
	struct bell_page former = front->peer, now;
	int error;

	if (said->flags & PV_PORT_PEER) {
		if (n_fds != 2) {
			close_all(fds, n_fds);
			return -EPROTO;
		}
		error = map_inbox(&now, fds);
		if (error)
			return error;
		pv_port_set_peer(&front->port, now.page, said->peer_slot, now.fd, said->generation);
		front->peer = now;
		unmap(&former);
		return 0;
	}
	close_all(fds, n_fds);
	if (said->state == PV_EVTCHN_INTERDOMAIN)
		pv_port_set_peer(&front->port, front->peer.page, front->port.tx_slot, front->peer.page ? front->peer.fd : -1,
				 said->generation);
	else
		forget_peer(front, said->generation);
	return 0;
}

void pv_front_learn(struct pv_front *front, int notify)
{
	struct pv_hv_message message = { 0 };
	int fds[PV_HV_MAX_FDS];
	int n;

	pthread_mutex_lock(&front->calls);
	if (front->port_number) {
		message.port.domid = PV_DOMID_SELF;
		message.port.port = front->port_number;
		message.port.inbox = front->own_number;
		message.port.generation = front->port.generation_seen;
		n = ask(front, PV_HV_EVTCHN_STATUS, &message, fds);
		if (n >= 0)
			learn(front, &message.port, fds, n);
		else
			pv_port_set_peer(&front->port, front->peer.page, front->port.tx_slot,
					 front->peer.page ? front->peer.fd : -1, pv_load_acquire(front->port.generation));
		if (notify)
			pv_notify_learnt(&front->port);
	}
	pthread_mutex_unlock(&front->calls);
}

/* ---- the arena ---- */

static uint32_t ring_pages(const struct pv_front_wish *wish)
{
	return 1u << wish->ring_order;
}

static size_t arena_pages(const struct pv_front_wish *wish)
{
	return wish->data_pages + (size_t)N_PLACES * ring_pages(wish);
}

static int map_arena(struct pv_front *front, const struct pv_hv_arena *arena, const int *fds)
{
	struct pv_granter *granter = &front->granter;
	/* Entries, and behind them a note for each. */
	size_t each = sizeof(struct pv_grant_entry) + sizeof(struct pv_grant_note);
	size_t n_bytes = (arena->n_pages * each + PV_PAGE_BYTES - 1) / PV_PAGE_BYTES * PV_PAGE_BYTES;

	granter->base = arena->gref;
	granter->n_pages = arena->n_pages;
	granter->granted = calloc(arena->n_pages, sizeof(*granter->granted));
	granter->entries = map_shared(fds[0], n_bytes, PROT_READ | PROT_WRITE);
	front->pages = map_shared(fds[1], (size_t)arena->n_pages * PV_PAGE_BYTES, PROT_READ | PROT_WRITE);
	front->entries_bytes = n_bytes;
	if (!granter->granted || !granter->entries || !front->pages)
		return -ENOMEM;
	granter->notes = (struct pv_grant_note *)(void *)(granter->entries + arena->n_pages);
	return 0;
}

static void unmap_arena(struct pv_front *front)
{
	struct pv_hv_message message = { .arena = { .gref = front->granter.base } };

	if (front->pages)
		munmap(front->pages, (size_t)front->granter.n_pages * PV_PAGE_BYTES);
	if (front->granter.entries)
		munmap(front->granter.entries, front->entries_bytes);
	free(front->granter.granted);
	if (front->granter.n_pages)
		ask_quietly(front, PV_HV_ARENA_DESTROY, &message);
	front->pages = NULL;
	memset(&front->granter, 0, sizeof(front->granter));
}

static int make_arena(struct pv_front *front, const struct pv_front_wish *wish)
{
	struct pv_hv_message message = { 0 };
	int fds[PV_HV_MAX_FDS];
	int error;

	message.arena.domid = (uint16_t)wish->backend;
	message.arena.n_pages = (uint32_t)arena_pages(wish);
	error = ask_for(front, PV_HV_ARENA_CREATE, &message, fds, 2);
	if (error)
		return error;
	error = message.arena.n_pages == arena_pages(wish) ? map_arena(front, &message.arena, fds) : -EPROTO;
	close_all(fds, 2);
	front->wish = *wish;
	if (error)
		unmap_arena(front);
	return error;
}

static uint32_t place_page(const struct pv_front *front, uint32_t place)
{
	return front->wish.data_pages + place * ring_pages(&front->wish);
}

/* Take back the pages of a place. 0, or -EBUSY. */
static int recall(struct pv_front *front, uint32_t place)
{
	int busy = 0;

	for (uint32_t i = 0; i < ring_pages(&front->wish); i++) {
		uint32_t page = place_page(front, place) + i;

		if (front->granter.granted[page].flags && pv_grant_revoke(&front->granter, front->granter.base + page))
			busy = -EBUSY;
	}
	return busy;
}

static int find_place(struct pv_front *front)
{
	for (uint32_t i = 1; i <= N_PLACES; i++) {
		uint32_t place = (front->place + i) % N_PLACES;

		if (recall(front, place) == 0) {
			front->place = place;
			return 0;
		}
	}
	return -EBUSY;
}

/* ---- the port ---- */

static void drop_inbox(struct pv_front *front)
{
	if (!front->own.page)
		return;
	pv_waiter_remove(&front->waiter, front->own.page, front->own.fd);
	unmap(&front->own);
}

static void close_port(struct pv_front *front)
{
	struct pv_hv_message message = { 0 };
	int fds[PV_HV_MAX_FDS];
	int n;

	pthread_mutex_lock(&front->calls);
	if (front->port_number) {
		message.port.port = front->port_number;
		message.port.inbox = front->own_number;
		pv_port_mask(&front->port);
		pv_port_discard(&front->port);
		forget_peer(front, front->port.generation_seen);
		pv_port_close(&front->port);
		front->port_number = 0;
		n = ask(front, PV_HV_EVTCHN_CLOSE, &message, fds);
		if (n > 0)
			close_all(fds, n);
		/* It was the only port, so also a broker that cannot be asked has no use for it. */
		if (n < 0 || message.port.flags & PV_PORT_INBOX_GONE)
			drop_inbox(front);
	}
	pthread_mutex_unlock(&front->calls);
}

static int open_port(struct pv_front *front)
{
	struct pv_hv_message message = { 0 };
	struct bell_page made;
	int fds[PV_HV_MAX_FDS];
	int error, n;

	message.port.waiter = front->waiter_index;
	message.port.remote_domid = (uint16_t)front->wish.backend;
	n = ask(front, PV_HV_EVTCHN_ALLOC_UNBOUND, &message, fds);
	if (n < 0)
		return n;
	if (message.port.slot >= PV_INBOX_SLOTS || n != (message.port.flags & PV_PORT_NEW_INBOX ? 2 : 0)) {
		close_all(fds, n);
		return -EPROTO;
	}
	if (n) {
		drop_inbox(front);
		error = map_inbox(&made, fds);
		if (error)
			return error;
		error = pv_waiter_add(&front->waiter, made.page, made.fd);
		if (error) {
			unmap(&made);
			return error;
		}
		front->own = made;
		front->own_number = message.port.inbox;
	}
	if (!front->own.page || front->own_number != message.port.inbox)
		return -EPROTO;
	pv_port_init(&front->port, &front->waiter, front->own.page, message.port.slot);
	pv_port_unmask(&front->port);
	front->port_number = message.port.port;
	pv_port_set_peer(&front->port, NULL, 0, -1, message.port.generation);
	/* A backend that sends events without responses wakes us once a second. */
	pv_port_late_eoi(&front->port, PV_SPURIOUS_THRESHOLD);
	return 0;
}

/* ---- the ring ---- */

static int make_ring(struct pv_front *front, struct pv_front_keys *keys)
{
	uint32_t n_pages = ring_pages(&front->wish), first = place_page(front, front->place);
	uint8_t *memory = front->pages + (size_t)first * PV_PAGE_BYTES;
	uint32_t request = front->wish.request_bytes, response = front->wish.response_bytes;
	int error;

	memset(memory, 0, (size_t)n_pages * PV_PAGE_BYTES);
	error = pv_ring_create(&front->ring, memory, n_pages * PV_PAGE_BYTES, request > response ? request : response,
			       request, response, &front->port, 0);
	if (error)
		return error;
	pv_spin_init(&front->ring.spin, front->wish.max_spin_ns, NULL);
	for (uint32_t i = 0; i < n_pages; i++) {
		uint32_t gref = front->granter.base + first + i;

		error = pv_grant_access(&front->granter, gref, (uint16_t)front->wish.backend, gref, 0);
		if (error)
			return error;
		keys->refs[i] = gref;
	}
	keys->n_refs = n_pages;
	keys->port = front->port_number;
	return 0;
}

static int is_sane(const struct pv_front_wish *wish)
{
	return wish->ring_order <= PV_FRONT_MAX_RING_ORDER && wish->backend < PV_DOMID_SELF && wish->data_pages > 0 &&
	       wish->data_pages <= UINT32_MAX / PV_PAGE_BYTES && wish->request_bytes > 0 && wish->response_bytes > 0;
}

static int is_same_size(const struct pv_front_wish *a, const struct pv_front_wish *b)
{
	return a->backend == b->backend && a->ring_order == b->ring_order && a->data_pages == b->data_pages;
}

int pv_front_make(struct pv_front *front, const struct pv_front_wish *wish, struct pv_front_keys *keys)
{
	int error = 0;

	if (front->has_ring)
		return -EBUSY;
	if (!is_sane(wish) || (front->pages && !is_same_size(&front->wish, wish)))
		return -EINVAL;
	memset(keys, 0, sizeof(*keys));
	if (!front->pages)
		error = make_arena(front, wish);
	if (error)
		return error;
	front->wish = *wish;
	error = find_place(front);
	if (error)
		return error;
	error = open_port(front);
	if (!error)
		error = make_ring(front, keys);
	front->has_ring = !error;
	if (error) {
		close_port(front);
		recall(front, front->place);
	}
	return error;
}

void pv_front_drop(struct pv_front *front)
{
	if (!front->has_ring)
		return;
	front->has_ring = 0;
	close_port(front);
	recall(front, front->place);
}

void pv_front_close(struct pv_front *front)
{
	pv_front_drop(front);
	drop_inbox(front);
	unmap_arena(front);
	if (front->has_waiter)
		pv_waiter_destroy(&front->waiter);
	close(front->broker_fd);
	if (front->bindings)
		munmap(front->bindings, PV_PAGE_BYTES);
	pthread_mutex_destroy(&front->calls);
	free(front);
}

struct pv_ring *pv_front_ring(struct pv_front *front)
{
	return front->has_ring ? &front->ring : NULL;
}

struct pv_granter *pv_front_granter(struct pv_front *front)
{
	return &front->granter;
}

uint8_t *pv_front_data(struct pv_front *front)
{
	return front->pages;
}

void pv_front_kick(struct pv_front *front)
{
	pv_waiter_kick(&front->waiter);
}
