/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <string.h>

#include "pv_atomic.h"
#include "pv_home.h"
#include "pv_ring.h"

#define FEW_MESSAGES 8
#define CACHE_LINE 64
#define MOST_CLAIMED_BYTES 4096
#define CLAIMED_AHEAD 4

/* Making and joining. */

uint32_t pv_ring_entries(uint32_t n_bytes, uint32_t entry_bytes)
{
	uint32_t fit;

	if (n_bytes <= PV_RING_HEADER_BYTES || n_bytes > PV_RING_MAX_BYTES || entry_bytes == 0)
		return 0;
	fit = (n_bytes - PV_RING_HEADER_BYTES) / entry_bytes;
	return fit ? (uint32_t)1 << (31 - __builtin_clz(fit)) : 0;
}

static int set_up(struct pv_ring *ring, void *memory, uint32_t n_bytes, uint32_t entry_bytes, uint32_t request_bytes,
		  uint32_t response_bytes, struct pv_port *port, int is_front)
{
	struct pv_ring_header *header = memory;
	uint32_t size = pv_ring_entries(n_bytes, entry_bytes);

	if (size == 0 || (uintptr_t)memory % 8 || request_bytes == 0 || response_bytes == 0 ||
	    request_bytes > entry_bytes || response_bytes > entry_bytes)
		return -EINVAL;
	*ring = (struct pv_ring){
		.entries = (uint8_t *)memory + PV_RING_HEADER_BYTES,
		.own_prod = is_front ? &header->req_prod : &header->rsp_prod,
		.own_event = is_front ? &header->rsp_event : &header->req_event,
		.peer_prod = is_front ? &header->rsp_prod : &header->req_prod,
		.peer_event = is_front ? &header->req_event : &header->rsp_event,
		.own_cpu = is_front ? &header->front_cpu : &header->back_cpu,
		.peer_cpu = is_front ? &header->back_cpu : &header->front_cpu,
		.port = port,
		.home_word = pv_home_word(),
		.home = pv_home_mark(),
		.is_front = is_front != 0,
		.size = size,
		.entry_bytes = entry_bytes,
		.out_bytes = is_front ? request_bytes : response_bytes,
		.in_bytes = is_front ? response_bytes : request_bytes,
	};
	pv_spin_init(&ring->spin, PV_SPIN_DEFAULT_NS, NULL);
	return 0;
}

static void start_at(struct pv_ring *ring, uint32_t index)
{
	ring->prod = ring->checked = ring->cons = ring->peer_prod_checked = ring->cons_at_event = index;
	ring->empty_cons = index - 1;
	pv_store_relaxed(ring->own_event, index + 1);
}

int pv_ring_create(struct pv_ring *ring, void *memory, uint32_t n_bytes, uint32_t entry_bytes, uint32_t request_bytes,
		   uint32_t response_bytes, struct pv_port *port, uint32_t start)
{
	struct pv_ring_header *header = memory;
	int result = set_up(ring, memory, n_bytes, entry_bytes, request_bytes, response_bytes, port, 1);

	if (result)
		return result;
	memset(header, 0, sizeof *header);
	header->req_prod = header->rsp_prod = start;
	header->req_event = header->rsp_event = start + 1;
	start_at(ring, start);
	return 0;
}

/* Join where both indexes stand; `index` where the caller knows where that is. */
static int join(struct pv_ring *ring, const uint32_t *index)
{
	uint32_t own = pv_load_acquire(ring->own_prod), peer = pv_load_acquire(ring->peer_prod);

	if (own != peer || (index && own != *index))
		return -EBUSY;
	start_at(ring, own);
	return 0;
}

int pv_ring_attach(struct pv_ring *ring, void *memory, uint32_t n_bytes, uint32_t entry_bytes, uint32_t request_bytes,
		   uint32_t response_bytes, struct pv_port *port, int is_front)
{
	int result = set_up(ring, memory, n_bytes, entry_bytes, request_bytes, response_bytes, port, is_front);

	return result ? result : join(ring, NULL);
}

int pv_ring_attach_at(struct pv_ring *ring, void *memory, uint32_t n_bytes, uint32_t entry_bytes, uint32_t request_bytes,
		      uint32_t response_bytes, struct pv_port *port, int is_front, uint32_t index)
{
	int result = set_up(ring, memory, n_bytes, entry_bytes, request_bytes, response_bytes, port, is_front);

	return result ? result : join(ring, &index);
}

/* Counts, from private memory alone. */

uint32_t pv_ring_outstanding(const struct pv_ring *ring)
{
	/* The thread that takes moves cons, the one that pushes moves prod; acquire: a freed slot has been copied out. */
	uint32_t prod = pv_load_acquire(&ring->prod), cons = pv_load_acquire(&ring->cons);

	return ring->is_front ? prod - cons : cons - prod;
}

uint32_t pv_ring_room(const struct pv_ring *ring)
{
	uint32_t outstanding = pv_ring_outstanding(ring);

	return ring->is_front ? ring->size - outstanding : outstanding;
}

int pv_ring_full(const struct pv_ring *ring)
{
	return pv_ring_room(ring) == 0;
}

int pv_ring_cons_overflow(const struct pv_ring *ring, uint32_t index)
{
	return !ring->is_front && index - pv_load_acquire(&ring->prod) >= ring->size;
}

/* A front end can have no more responses than requests outstanding; a back end no more requests than slots that hold no
 * unanswered one. Either also catches an index that went backwards. */
int pv_ring_prod_overflow(const struct pv_ring *ring, uint32_t index)
{
	uint32_t outstanding = pv_ring_outstanding(ring);

	return index - ring->cons > (ring->is_front ? outstanding : ring->size - outstanding);
}

static inline int check_usable(const struct pv_ring *ring)
{
	if (pv_load_relaxed(&ring->dead))
		return -EPROTO;
	return pv_load_relaxed(ring->home_word) == ring->home ? 0 : -ECHILD;
}

/* Note a new producer index of the peer: what there is to consume by it; or -EPROTO, and the ring is dead. */
static inline int64_t accept(struct pv_ring *ring, uint32_t peer, uint32_t known)
{
	if (pv_ring_prod_overflow(ring, peer) || peer - ring->cons < known) {
		pv_store_relaxed(&ring->dead, 1);
		return -EPROTO;
	}
	ring->peer_prod_checked = peer;
	return peer - ring->cons;
}

/*
 * What the peer has published and we have not consumed, or -EPROTO. An index once found right stays right, so the shared
 * word is read only for more than is known.
 */
static inline int64_t available(struct pv_ring *ring, uint32_t wanted)
{
	uint32_t known = ring->peer_prod_checked - ring->cons, peer;

	if (known >= wanted)
		return known;
	/* Acquire: the entries before this index, written before the peer's pv_ring_push stored it with release. */
	peer = pv_load_acquire(ring->peer_prod);
	return peer == ring->peer_prod_checked ? known : accept(ring, peer, known);
}

/*
 * Copies. The entries may change while they are read: what counts is the private copy, complete before anybody looks at
 * it. The barrier keeps the compiler from going back to the shared bytes instead.
 */

#define COPY_EACH(n_bytes)                                                                            \
	for (; n; n--, to += to_step, from += from_step)                                              \
		memcpy(to, from, n_bytes)

static void copy_messages(uint8_t *to, uint32_t to_step, const uint8_t *from, uint32_t from_step, uint32_t bytes,
			  uint32_t n)
{
	if (bytes == 16)
		COPY_EACH(16);
	else if (bytes == 112 && n <= FEW_MESSAGES)
		COPY_EACH(112);
	else if (bytes == to_step && bytes == from_step)
		memcpy(to, from, (size_t)n * bytes);
	else
		COPY_EACH(bytes);
}

/* One message of a usual size, for functions that call nothing on their way: the cheapest there is. 0: of another size. */
static inline int copy_one(uint8_t *to, const uint8_t *from, uint32_t bytes)
{
	if (bytes == 112)
		memcpy(to, from, 112);
	else if (bytes == 16)
		memcpy(to, from, 16);
	else
		return 0;
	return 1;
}

static inline uint8_t *slot_at(const struct pv_ring *ring, uint32_t index)
{
	return ring->entries + (size_t)(index & (ring->size - 1)) * ring->entry_bytes;
}

/*
 * Ask for slots as the owner of their lines: they are read now and written soon, for the answers or the next requests.
 * Each line is handed over once instead of twice, and all of them at the same time. Only for slots that the peer has
 * published: what it still writes would be torn from it.
 */
static inline void claim(const struct pv_ring *ring, uint32_t index, uint32_t n)
{
	uint32_t slot = index & (ring->size - 1), till_end = ring->size - slot;
	size_t n_bytes = (size_t)(n < till_end ? n : till_end) * ring->entry_bytes;
	const uint8_t *first = slot_at(ring, slot);

	for (size_t at = 0; at < n_bytes && at < MOST_CLAIMED_BYTES; at += CACHE_LINE)
		pv_prefetch_write(first + at);
}

static inline void copy_to_ring(struct pv_ring *ring, const uint8_t *messages, uint32_t n)
{
	uint32_t slot = ring->prod & (ring->size - 1), bytes = ring->out_bytes, step = ring->entry_bytes;
	uint8_t *first = slot_at(ring, slot);
	uint32_t till_end = ring->size - slot;

	if (n <= till_end) {
		copy_messages(first, step, messages, bytes, bytes, n);
	} else {
		copy_messages(first, step, messages, bytes, bytes, till_end);
		copy_messages(ring->entries, step, messages + (size_t)till_end * bytes, bytes, bytes, n - till_end);
	}
}

static inline void copy_from_ring(struct pv_ring *ring, uint8_t *messages, uint32_t n)
{
	uint32_t slot = ring->cons & (ring->size - 1), bytes = ring->in_bytes, step = ring->entry_bytes;
	const uint8_t *first = slot_at(ring, slot);
	uint32_t till_end = ring->size - slot;

	claim(ring, slot, n);
	if (n <= till_end) {
		copy_messages(messages, bytes, first, step, bytes, n);
	} else {
		copy_messages(messages, bytes, first, step, bytes, till_end);
		copy_messages(messages + (size_t)till_end * bytes, bytes, ring->entries, step, bytes, n - till_end);
	}
	pv_fence_compiler();
}

/* Push. */

/* Make everything before `next` visible. */
static void publish(struct pv_ring *ring, uint32_t next)
{
	/* Ours before the peer's answer can come: pv_ring_take of another thread checks responses against it. */
	pv_store_release(&ring->prod, next);
	/* Release: the entries. Licence to read them; pairs with available() of the peer. */
	pv_store_release(ring->own_prod, next);
}

/* Whether the peer asked to be notified of anything published since the last look. */
static inline int is_asked(struct pv_ring *ring)
{
	uint32_t before = ring->checked, next = ring->prod, event;

	/* Publish, then look: pairs with the fence in pv_ring_final_check. Without it both may miss the other's store. */
	if (ring->fence == PV_FENCE_FULL)
		pv_fence_full();
	else
		pv_fence_light();
	event = pv_load_relaxed(ring->peer_event);
	ring->checked = next;
	return (uint32_t)(next - event) < (uint32_t)(next - before);
}

/* The peer has asked: n | PV_RING_* << 32. */
static __attribute__((noinline)) int64_t notify(struct pv_ring *ring, uint32_t n)
{
	ring->notified++;
	if (ring->port && pv_notify(ring->port) == PV_NOTIFY_STALE) {
		ring->untold = 1;
		return n | (int64_t)PV_RING_STALE << 32;
	}
	return n;
}

/* Look whether the peer has asked. n | PV_RING_* << 32. */
static inline int64_t look_and_notify(struct pv_ring *ring, uint32_t n)
{
	if (is_asked(ring))
		return notify(ring, n);
	ring->suppressed++;
	return n;
}

/* n slots are filled, n not 0 and not more than the room. */
static inline void publish_filled(struct pv_ring *ring, uint32_t n, uint32_t room)
{
	uint32_t outstanding = ring->is_front ? ring->size - room + n : 0;

	if (__builtin_expect(ring->observer != NULL, 0))
		ring->observer->pushing(ring, n);
	ring->produced += n;
	ring->batches++;
	if (outstanding > ring->max_outstanding)
		ring->max_outstanding = outstanding;
	publish(ring, ring->prod + n);
}

/* A branch for a whole batch, so that nothing in it waits for a minimum to be known. */
static __attribute__((noinline)) int64_t push(struct pv_ring *ring, const void *messages, uint32_t n, uint32_t room)
{
	if (n > room) {
		if (!ring->is_front)
			return -EINVAL;
		return room ? push(ring, messages, room, room) : 0;
	}
	if (n == 0)
		return 0;
	copy_to_ring(ring, messages, n);
	publish_filled(ring, n, room);
	return n;
}

static __attribute__((noinline)) int64_t push_and_look(struct pv_ring *ring, const void *messages, uint32_t n,
						       uint32_t room)
{
	int64_t pushed = push(ring, messages, n, room);

	return pushed > 0 ? look_and_notify(ring, (uint32_t)pushed) : pushed;
}

int64_t pv_ring_push(struct pv_ring *ring, const void *messages, uint32_t n)
{
	int result = check_usable(ring);
	uint32_t room;

	if (result)
		return result;
	room = pv_ring_room(ring);
	if (n != 1 || room == 0 || !copy_one(slot_at(ring, ring->prod), messages, ring->out_bytes))
		return push_and_look(ring, messages, n, room);
	publish_filled(ring, 1, room);
	return look_and_notify(ring, 1);
}

int64_t pv_ring_push_quiet(struct pv_ring *ring, const void *messages, uint32_t n)
{
	int result = check_usable(ring);

	return result ? result : push(ring, messages, n, pv_ring_room(ring));
}

int64_t pv_ring_notify(struct pv_ring *ring)
{
	int result = check_usable(ring);

	return result || ring->checked == ring->prod ? result : look_and_notify(ring, 0);
}

int pv_ring_reserve(struct pv_ring *ring, uint32_t max, struct pv_ring_slots *slots)
{
	int result = check_usable(ring);
	uint32_t room = result ? 0 : pv_ring_room(ring);
	uint32_t index = ring->prod & (ring->size - 1), till_end = ring->size - index;

	if (max > room)
		max = room;
	slots->n = max < till_end ? max : till_end;
	slots->index = index;
	slots->first = ring->entries + (size_t)index * ring->entry_bytes;
	return result;
}

int64_t pv_ring_commit(struct pv_ring *ring, uint32_t n)
{
	int result = check_usable(ring);
	uint32_t room;

	if (result)
		return result;
	room = pv_ring_room(ring);
	if (n > room)
		return -EINVAL;
	if (n == 0)
		return 0;
	publish_filled(ring, n, room);
	return look_and_notify(ring, n);
}

/* Take. */

/* n messages are copied out. */
static inline int64_t consume(struct pv_ring *ring, const void *messages, uint32_t n)
{
	uint32_t outstanding;

	if (__builtin_expect(ring->observer != NULL, 0))
		ring->observer->taking(ring, messages, n);
	/* Release: the copy is done before pv_ring_push of another thread may fill the slots again. */
	pv_store_release(&ring->cons, ring->cons + n);
	ring->consumed += n;
	outstanding = ring->is_front ? 0 : pv_ring_outstanding(ring);
	if (outstanding > ring->max_outstanding)
		ring->max_outstanding = outstanding;
	return n;
}

static __attribute__((noinline)) int64_t take(struct pv_ring *ring, void *messages, uint32_t n)
{
	copy_from_ring(ring, messages, n);
	return consume(ring, messages, n);
}

int64_t pv_ring_take(struct pv_ring *ring, void *messages, uint32_t max)
{
	int64_t n = check_usable(ring);

	if (n)
		return n;
	n = available(ring, max);
	if (n < max)
		return n > 0 ? take(ring, messages, (uint32_t)n) : n;
	/* A branch, not a minimum: a full batch is copied without waiting for the index to arrive. */
	if (max != 1 || !copy_one(messages, slot_at(ring, ring->cons), ring->in_bytes))
		return take(ring, messages, max);
	pv_fence_compiler();
	if (ring->peer_prod_checked - ring->cons > CLAIMED_AHEAD)
		claim(ring, ring->cons + CLAIMED_AHEAD, 1);
	/* The fence of the push that follows waits for this line. */
	if (ring->fence == PV_FENCE_FULL)
		pv_prefetch_write(ring->own_prod);
	return consume(ring, messages, 1);
}

int64_t pv_ring_unconsumed(struct pv_ring *ring)
{
	int64_t n = check_usable(ring);

	return n ? n : available(ring, ring->size);
}

int pv_ring_poll(struct pv_ring *ring)
{
	int64_t n = check_usable(ring);

	if (n == 0)
		n = available(ring, 1);
	return n < 0 ? (int)n : n > 0;
}
