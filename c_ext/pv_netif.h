/* SPDX-License-Identifier: MIT */
/*
 * netif on the wire, and what a packet is between its ends: frames in private memory, with what Xen says about each.
 *
 * A packet takes one or more requests of the transmit ring: the first, slots of extra information, then further pages.
 * Everything here works on private copies of requests; nothing looks at shared memory.
 *
 * Source: Xen public/io/netif.h; limits and what is fatal as in Linux' drivers/net/xen-netback/netback.c.
 */
#ifndef PV_NETIF_H
#define PV_NETIF_H

#include <stdint.h>

#define PV_NETIF_CSUM_BLANK 1      /* transmit; in receive responses this bit and the next are swapped */
#define PV_NETIF_DATA_VALIDATED 2
#define PV_NETIF_MORE_DATA 4
#define PV_NETIF_EXTRA_INFO 8
#define PV_NETIF_RX_DATA_VALIDATED 1
#define PV_NETIF_RX_CSUM_BLANK 2
#define PV_NETIF_RX_GSO_PREFIX 16

#define PV_NETIF_DROPPED -2
#define PV_NETIF_ERROR -1
#define PV_NETIF_OKAY 0
#define PV_NETIF_NULL 1

#define PV_NETIF_EXTRA_GSO 1
#define PV_NETIF_EXTRA_MCAST_ADD 2
#define PV_NETIF_EXTRA_MCAST_DEL 3
#define PV_NETIF_EXTRA_HASH 4
#define PV_NETIF_EXTRA_XDP 5       /* Linux alone */
#define PV_NETIF_EXTRA_MORE 1

#define PV_NETIF_GSO_TCPV4 1
#define PV_NETIF_GSO_TCPV6 2

#define PV_NETIF_MIN_FRAME 14
#define PV_NETIF_MAX_FRAME 65535
#define PV_NETIF_MIN_SLOTS 18      /* of one packet, that every backend takes */
#define PV_NETIF_MAX_FOLLOWING 18  /* pages after the first; with more a packet is dropped ... */
#define PV_NETIF_FATAL_FOLLOWING 20 /* ... and with still more the frontend is not to be trusted */
#define PV_NETIF_MAX_DATA 19
#define PV_NETIF_MAX_REQUESTS 256  /* that one packet can take, well or not: as many as a ring of one page has */
#define PV_NETIF_MAX_EXTRAS 235    /* of them extra information, which Linux does not limit otherwise */

struct pv_netif_tx_request {
	uint32_t gref;
	uint16_t offset;           /* bytes into the page */
	uint16_t flags;
	uint16_t id;
	uint16_t size;             /* bytes: of the whole packet in its first request, of this page in the others */
};

struct pv_netif_tx_response {
	uint16_t id;
	int16_t status;
};

struct pv_netif_rx_request {
	uint16_t id;
	uint16_t pad;
	uint32_t gref;
};

struct pv_netif_rx_response {
	uint16_t id;
	uint16_t offset;           /* bytes into the page */
	uint16_t flags;
	int16_t status;            /* bytes, or an error */
};

struct pv_netif_extra {
	uint8_t type;
	uint8_t flags;
	uint8_t content[6];        /* GSO: size (u16), type (u8); multicast: address; hash: type, algorithm, value; XDP: headroom */
};

#define PV_FRAME_CSUM_BLANK 1      /* the TCP or UDP checksum is to be filled in */
#define PV_FRAME_VALIDATED 2       /* it was found right, or need not be looked at */
#define PV_FRAME_HASH 4            /* `hash` is there */
#define PV_FRAME_FLOODED 8         /* a switch has sent it to several ports */

/* A packet in private memory. */
struct pv_frame {
	uint32_t offset;           /* bytes into the memory of its burst */
	uint32_t length;           /* bytes */
	uint16_t flags;            /* PV_FRAME_* */
	uint16_t gso_size;         /* bytes of payload in each segment */
	uint8_t gso_type;          /* PV_NETIF_GSO_*; 0: the frame is one segment */
	uint8_t hash_type;
	uint16_t queue;            /* where it came from, of a device with several */
	uint32_t hash;
	int32_t status;            /* out, where a call says so */
};

#define PV_BURST_HEADROOM 64       /* bytes free before each frame of a burst */

/* Memory for packets, and what lies in it. */
struct pv_burst {
	uint8_t *memory;
	uint32_t capacity;         /* bytes */
	uint32_t used;
	struct pv_frame *frames;
	uint32_t n;
	uint32_t max;
};

/* Why a frontend's chain of requests ends its device. */
#define PV_NETIF_FATAL_SHORT 1     /* more data was announced and did not come */
#define PV_NETIF_FATAL_SLOTS 2     /* too many pages */
#define PV_NETIF_FATAL_PAGE 3      /* a slot crosses its page */
#define PV_NETIF_FATAL_NO_EXTRA 4  /* extra information was announced and did not come */
#define PV_NETIF_FATAL_EXTRA 5     /* extra information of no known type */
#define PV_NETIF_FATAL_GSO_SIZE 6  /* segments of no bytes */
#define PV_NETIF_FATAL_GSO_TYPE 7  /* segments of no known protocol */

/* What one chain of requests says. */
struct pv_netif_packet {
	uint32_t n_requests;       /* slots of the ring, extra information included */
	uint32_t n_extras;
	uint32_t n_data;           /* data[], well or not */
	uint32_t bytes;
	int32_t status;            /* OKAY; ERROR: to be dropped and answered so */
	uint16_t flags;            /* of the first request */
	uint16_t gso_size;
	uint8_t gso_type;
	uint8_t mcast;             /* PV_NETIF_EXTRA_MCAST_*: not a packet but a wish */
	uint8_t mcast_address[6];
	uint8_t has_hash;          /* 1: the frontend has hashed it, and says how and what came of it */
	uint8_t hash_type;         /* number of its PV_NETHASH_* bit */
	uint32_t hash;
	struct pv_netif_tx_request data[PV_NETIF_MAX_DATA]; /* `size` is of this page in the first, too */
};

/*
 * The packet that begins with requests[0], of n. The requests that it takes; 0: it does not end within these n, of which
 * none is taken; -PV_NETIF_FATAL_*.
 */
int pv_netif_parse(const struct pv_netif_tx_request *requests, uint32_t n, struct pv_netif_packet *packet);
/* What is announced in those n requests of a packet that pv_netif_parse said 0 of: PV_NETIF_FATAL_SHORT or _NO_EXTRA. */
int pv_netif_missing(const struct pv_netif_tx_request *requests, uint32_t n);
/* Responses to a packet's n requests: `status` to data, NULL to the n_extras of extra information. */
void pv_netif_answer(const struct pv_netif_tx_request *requests, uint32_t n, uint32_t n_extras, int status,
		     struct pv_netif_tx_response *responses);

void pv_burst_clear(struct pv_burst *burst);
/* Room for a frame of n bytes at the end, not yet counted; NULL: there is none. */
struct pv_frame *pv_burst_next(struct pv_burst *burst, uint32_t n_bytes);
/* Count it in. */
void pv_burst_keep(struct pv_burst *burst, const struct pv_frame *frame);

#endif
