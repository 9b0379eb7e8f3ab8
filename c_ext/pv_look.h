/* SPDX-License-Identifier: MIT */
/*
 * Looking at live rings from outside.
 *
 * A process that has rings keeps them in a *statistics object*: memory the broker made for it, which Dom0 alone can map
 * beside it. A page of it is a *record*: one end of a ring with its label, its private struct pv_ring, the ages of what is
 * in flight and a latency histogram. The end counts as it always does, in place, so being looked at costs it nothing; it
 * tells its observer (below) of every batch, which takes a time now and then. The device counts there, too. One message in 64 has its latency
 * measured; all have while Dom0 wants it. Behind the records stands the *tap*: a log of whole batches, written while a
 * recorder wants it.
 *
 * Layout: a page of struct pv_look_head, PV_LOOK_RECORDS pages of struct pv_look_record, PV_LOOK_TAP_BYTES of log. Sparse:
 * what is not used takes no memory.
 *
 * Trust: the process believes nothing in it but its own words; Dom0 writes wishes, which cost time at most, and how far it
 * has read the log. For Dom0 all of it is hostile: functions that read copy first, check, and never loop on what they
 * read.
 *
 * Threads: those of the ring (one pushes, one takes); a tap may have any number of writers and one reader.
 * Fork: the memory stays mapped in a child, which finds the ring's mark and is refused.
 */
#ifndef PV_LOOK_H
#define PV_LOOK_H

#include <stdint.h>

#include "pv_ring.h"

#define PV_LOOK_MAGIC 0x4B4C5650       /* "PVLK" */
#define PV_LOOK_VERSION 1
#define PV_LOOK_RECORDS 64
#define PV_LOOK_RECORD_BYTES 4096
#define PV_LOOK_TAP_AT 266240          /* (1 + PV_LOOK_RECORDS) pages */
#define PV_LOOK_TAP_BYTES 2097152
#define PV_LOOK_BYTES 2363392          /* of the whole object */

#define PV_LOOK_FREE 0
#define PV_LOOK_LIVE 1

#define PV_LOOK_SAMPLE 64              /* of so many messages, one has its latency measured */
#define PV_LOOK_STAMPS 64
#define PV_LOOK_BUCKETS 120            /* four an octave from 64 ns to 68 s; the first also has what is shorter */
#define PV_LOOK_REFS 16
#define PV_LOOK_NAME_BYTES 32
#define PV_LOOK_LAYOUT_BYTES 512

/* `counts` of a record: what stands in its counters. */
#define PV_LOOK_COUNTS_NOTHING 0
#define PV_LOOK_COUNTS_BLKIF 1         /* struct pv_blkif_counters */
#define PV_LOOK_COUNTERS 32

#define PV_LOOK_LATENCY 1              /* measure every message */
#define PV_LOOK_TAP 2                  /* log every batch */

/* What Dom0 wants of a record, until a time of CLOCK_MONOTONIC: a tool that dies has to take nothing back. 0: nothing. */
struct pv_look_wanted {
	uint64_t latency_until_ns;
	uint64_t tap_until_ns;
};

/* The first page. */
struct pv_look_head {
	uint32_t magic;
	uint32_t version;
	uint32_t pad0[14];
	uint64_t tap_tail;          /* writers: bytes that were ever given out to entries of the log */
	uint64_t tap_lost;          /* writers: messages that found no room */
	uint64_t pad1[6];
	uint64_t tap_head;          /* the reader: bytes before this may be overwritten */
	uint64_t pad2[7];
	struct pv_look_wanted wanted[64];
};

/* When some messages went on their way. */
struct pv_look_stamp {
	uint64_t ns;                /* CLOCK_MONOTONIC; to a tick (4 ms) when n is 0 */
	uint32_t index;             /* of the first message in the ring */
	uint32_t n;                 /* messages from there whose latency is being measured */
};

/* A page: one end of a ring. Names are UTF-8, NUL-terminated. */
struct pv_look_record {
	uint32_t state;             /* PV_LOOK_FREE, PV_LOOK_LIVE */
	uint32_t generation;        /* goes up when the record is given to another end */
	uint32_t number;            /* of the record in its object */
	uint32_t device_id;
	uint32_t queue;
	uint32_t port;              /* of this end; 0: none */
	uint64_t created_ns;        /* CLOCK_MONOTONIC */
	uint16_t domid;             /* of this end */
	uint16_t peer_domid;
	uint16_t granter_domid;     /* whose pages the ring stands in */
	uint16_t n_refs;
	uint32_t refs[PV_LOOK_REFS];
	uint8_t kind[PV_LOOK_NAME_BYTES];      /* class of the device: "vbd" */
	uint8_t protocol[PV_LOOK_NAME_BYTES];  /* of the messages: "blkif" */
	uint32_t stamp_first;       /* the oldest stamp that is not settled... */
	uint32_t stamp_next;        /* ...and the next one to write, both modulo 2^32 */
	uint32_t stamped;           /* index at the last stamp */
	uint32_t sample_at;         /* index of the next message to be measured */
	struct pv_ring ring;
	struct pv_look_stamp stamps[PV_LOOK_STAMPS];
	uint64_t latency[PV_LOOK_BUCKETS];     /* front: push to take of the k-th request and response; back: take to push */
	uint8_t request[PV_LOOK_LAYOUT_BYTES];   /* layout of the messages, as JSON (ring/looking.py); or empty */
	uint8_t response[PV_LOOK_LAYOUT_BYTES];
	uint32_t counts;            /* PV_LOOK_COUNTS_*: what the device counts beside the ring... */
	uint32_t pad;
	uint64_t counters[PV_LOOK_COUNTERS];     /* ...here, since the record began or the device was opened */
};

/* Stands before the messages of a batch in the log, at a multiple of 64 bytes. */
struct pv_look_entry {
	uint64_t position;          /* 1 + where it stands among all that were ever logged; stored last */
	uint64_t ns;                /* CLOCK_MONOTONIC */
	uint32_t record;            /* number, ... */
	uint32_t generation;        /* ...generation of the end */
	uint32_t index;             /* of the first message in the ring */
	uint32_t n;                 /* messages, packed, ... */
	uint32_t message_bytes;     /* ...of this size */
	uint32_t taken;             /* 1: taken from the ring by this end; 0: pushed by it */
	uint64_t pad[3];
};

/*
 * Map the object `fd`: the process all of it to write; Dom0 (`as_dom0`) the first page to write, the rest to read. NULL and
 * errno. The descriptor is not kept.
 */
struct pv_look_head *pv_look_map(int fd, int as_dom0);
void pv_look_unmap(struct pv_look_head *head);
/* The process: make a new, zeroed object ready. */
void pv_look_init(struct pv_look_head *head);
/* Record `number` of the object. */
struct pv_look_record *pv_look_at(struct pv_look_head *head, uint32_t number);
/*
 * Its ring was made or joined, and the label written: show it. Before the first message.
 */
void pv_look_begin(struct pv_look_record *record, uint32_t number);
/* The ring is used no more. The record is free for another one. */
void pv_look_end(struct pv_look_record *record);
/*
 * Where Dom0 sees what the device of a ring counts: PV_LOOK_COUNTERS words, zeroed at first, until pv_look_end. NULL when
 * the ring is in no record. `counts`: PV_LOOK_COUNTS_*. One thread at a time adds to them, with stores that do not tear.
 */
uint64_t *pv_look_counters(struct pv_ring *ring, uint32_t counts);

/* Dom0: copy a record as it stands now, each word of one moment. 1; 0 when it is free, or changed hands meanwhile. */
int pv_look_copy(const struct pv_look_head *head, uint32_t number, struct pv_look_record *copy);
/* Dom0: want something (PV_LOOK_*) of a record until then, or longer if somebody else does. */
void pv_look_want(struct pv_look_head *head, uint32_t number, uint32_t what, uint64_t until_ns);
/* Least latency in bucket `bucket`, ns; of PV_LOOK_BUCKETS: the end of the last one. */
uint64_t pv_look_bucket_ns(uint32_t bucket);
/*
 * Bounds of the age at now_ns of the message at `index`, from the stamps of a copy: 1, and at_least_ns <= age <=
 * at_most_ns (a tick more or less; UINT64_MAX: not known).
 */
int pv_look_age(const struct pv_look_record *copy, uint32_t index, uint64_t now_ns, uint64_t *at_least_ns,
		uint64_t *at_most_ns);

/* Recorder: begin at what is logged from now on. */
void pv_look_tap_open(struct pv_look_head *head);
/*
 * Recorder: the next batch of the log: its entry and messages, PV_RING_MAX_BYTES at most. 1; 0: none yet; -EPROTO: there
 * is nonsense, and what was logged up to now is skipped. `head` is of pv_look_map.
 */
int pv_look_tap_read(struct pv_look_head *head, struct pv_look_entry *entry, void *messages);
/* Recorder: give the memory of the log of the object `fd` back; what is logged from now on takes new one. 0 or -errno. */
int pv_look_tap_free(int fd);

#endif
