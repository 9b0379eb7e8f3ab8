/* SPDX-License-Identifier: MIT */
/*
 * What passes legs of a loop, as the bytes of a capture file: pcapng, or pcap with times in nanoseconds. The loop writes
 * whole packets into a ring of bytes; one reader takes them out, of any length. A reader that is slow costs the loop
 * nothing: what finds no room is counted, and said with the next packet that does.
 *
 * A frame is kept as it is at that place, but that a blank checksum is filled in. A large packet that is still to be cut
 * into segments has the sum of its pseudo header there, as a card wants it.
 *
 * Threads: one reader; calls that say so are made with the loop entered. Fork: a child has none.
 *
 * Source: IETF draft-ietf-opsawg-pcapng, draft-ietf-opsawg-pcap.
 */
#ifndef PV_NETCAPTURE_H
#define PV_NETCAPTURE_H

#include <stdint.h>

#include "pv_netloop.h"

#define PV_NETCAPTURE_IN 1          /* from the leg; as in the flags of a packet in pcapng */
#define PV_NETCAPTURE_OUT 2         /* to it */
#define PV_NETCAPTURE_BOTH 3
#define PV_NETCAPTURE_PCAPNG 0
#define PV_NETCAPTURE_PCAP 1
#define PV_NETCAPTURE_MIN_BYTES 262144
#define PV_NETCAPTURE_MAX_BYTES 268435456
#define PV_NETCAPTURE_RESERVE 8192  /* bytes of the ring that packets leave free for pv_netcapture_put */

struct pv_netcapture;

/*
 * `ring_bytes`: a power of two from MIN_BYTES to MAX_BYTES. `snaplen`: bytes that are kept of a frame at most; 0: all.
 * `most`: packets, then it is over; 0: any number. 0; -EINVAL; -ENOMEM; an errno of eventfd(2).
 */
int pv_netcapture_new(uint32_t ring_bytes, uint32_t snaplen, uint32_t format, uint64_t most, struct pv_netcapture **made);
/* No leg has it. */
void pv_netcapture_free(struct pv_netcapture *capture);

/* Entered: one more interface, as pcapng calls a place where packets come from. Its number, from 0 on; -ENOMEM. */
int pv_netcapture_add_interface(struct pv_netcapture *capture);
/* Entered: what passes a leg, in those directions, is of this interface. 0; -EINVAL; -ENOMEM. */
int pv_netcapture_attach(struct pv_netcapture *capture, struct pv_netleg *leg, uint32_t interface, uint32_t directions);
/* Entered. Harmless where it is not, and when the leg was removed. */
void pv_netcapture_detach(struct pv_netcapture *capture, struct pv_netleg *leg);
/* Entered: bytes of the file that are no packets. 0; -ENOSPC. */
int pv_netcapture_put(struct pv_netcapture *capture, const uint8_t *bytes, uint32_t n);
/* Entered: frames that passed an interface, and those of them that found no room. 0; -EINVAL. */
int pv_netcapture_count(const struct pv_netcapture *capture, uint32_t interface, uint64_t *seen, uint64_t *dropped);
/* Entered: no more packets. */
void pv_netcapture_finish(struct pv_netcapture *capture);

/* The reader: bytes of the file, up to `room`; how many. Not always up to the end of a packet. */
uint32_t pv_netcapture_read(struct pv_netcapture *capture, uint8_t *bytes, uint32_t room);
/* No more packets come, and all were read. */
int pv_netcapture_is_over(struct pv_netcapture *capture);
/*
 * 1: there is nothing to be read, and pv_netcapture_fd becomes readable when there is, or when it is over; 0: there is, or
 * it is over. After a 1, awake follows.
 */
int pv_netcapture_sleep(struct pv_netcapture *capture);
void pv_netcapture_awake(struct pv_netcapture *capture);
int pv_netcapture_fd(const struct pv_netcapture *capture);

#endif
