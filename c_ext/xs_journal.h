/* SPDX-License-Identifier: MIT */
/* The form of the journal's file, for who writes it and who reads it: see pv_xs_journal.c. */
#ifndef XS_JOURNAL_H
#define XS_JOURNAL_H

#include "xs_private.h"

#define VERSION 1
#define FILE_HEADER_BYTES 16
#define FRAME_HEADER_BYTES 12
#define FRAME_MAX (1u << 30)

enum { NODE = 1, REMOVED, SPECIAL, DOMAIN, QUOTA, GENERATION, COMPLETE, MADE };

static const char magic[8] = { 'P', 'V', 'X', 'S', 'J', 'R', 'N', 'L' };

struct frame_header {
	uint32_t n;
	uint32_t n_crc;
	uint32_t crc;
};

/* CRC-32C, going on from that of the bytes before (0: none). */
uint32_t xs_crc(uint32_t crc, const uint8_t *data, uint64_t n);
/* Before any is reckoned. */
void xs_crc_init(void);

#endif
