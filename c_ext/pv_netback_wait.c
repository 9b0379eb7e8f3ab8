/* SPDX-License-Identifier: MIT */
/* Frames that wait for buffers of their guest, in order, and who has sent them. */
#include <stdlib.h>
#include <string.h>

#include "netback_private.h"

#define BLOCK_BYTES 32768u
#define ALIGN 8u

struct pv_backlog *pv_backlog_new(void)
{
	struct pv_backlog *made = calloc(1, sizeof(*made));

	if (made)
		made->users = 1;
	return made;
}

void pv_backlog_release(struct pv_backlog *backlog)
{
	if (backlog && !--backlog->users)
		free(backlog);
}

/* ---- blocks ---- */

static uint32_t bytes_for(const struct pv_frame *frame)
{
	return (uint32_t)(sizeof(struct waiting) + frame->length + ALIGN - 1) & ~(ALIGN - 1);
}

/* The newest one, with room for so many bytes; NULL: no memory. */
static struct pv_waiting_block *have_block(struct pv_netback *netback, uint32_t n_bytes)
{
	struct pv_waiting_block *block = netback->newest;
	uint32_t capacity = n_bytes > BLOCK_BYTES ? n_bytes : BLOCK_BYTES;

	if (block && block->capacity - block->used >= n_bytes)
		return block;
	block = malloc(sizeof(*block) + capacity);
	if (!block)
		return NULL;
	*block = (struct pv_waiting_block){ .capacity = capacity };
	if (netback->newest)
		netback->newest->next = block;
	else
		netback->oldest = block;
	netback->newest = block;
	return block;
}

int netback_wait(struct pv_netback *netback, const uint8_t *bytes, const struct pv_frame *frame, int64_t now_ns)
{
	struct pv_backlog *sender = frame->flags & PV_FRAME_FLOODED ? NULL : netback->sender;
	struct pv_waiting_block *block;
	struct waiting *waiting;

	if (netback->waiting_bytes + frame->length > PV_NETBACK_WAITING_BYTES)
		return 0;
	block = have_block(netback, bytes_for(frame));
	if (!block)
		return 0;
	waiting = (struct waiting *)(block->bytes + block->used);
	*waiting = (struct waiting){ .since_ns = now_ns, .sender = sender, .frame = *frame };
	waiting->frame.offset = block->used + (uint32_t)sizeof(*waiting);
	memcpy(block->bytes + waiting->frame.offset, bytes, frame->length);
	block->used += bytes_for(frame);
	block->n++;
	netback->waiting_bytes += frame->length;
	netback->waiting_frames++;
	if (sender) {
		sender->bytes += frame->length + PV_BACKLOG_FRAME_BYTES;
		sender->users++;
	}
	return 1;
}

struct waiting *netback_oldest(const struct pv_netback *netback)
{
	return (struct waiting *)(netback->oldest->bytes + netback->oldest->from);
}

void netback_drop_oldest(struct pv_netback *netback)
{
	struct pv_waiting_block *block = netback->oldest;
	struct waiting *oldest = netback_oldest(netback);

	netback->waiting_bytes -= oldest->frame.length;
	netback->waiting_frames--;
	if (oldest->sender) {
		oldest->sender->bytes -= oldest->frame.length + PV_BACKLOG_FRAME_BYTES;
		pv_backlog_release(oldest->sender);
	}
	block->from += bytes_for(&oldest->frame);
	if (--block->n)
		return;
	netback->oldest = block->next;
	if (!block->next)
		netback->newest = NULL;
	free(block);
}

void pv_netback_forget(struct pv_netback *netback)
{
	while (netback->waiting_frames)
		netback_drop_oldest(netback);
}
