/* SPDX-License-Identifier: MIT */
/* What engines have to say, for one thread of their owner. Rare: the fast path never comes here. */
#include <stdlib.h>

#include "vbd_private.h"

struct pv_vbd_board {
	pthread_mutex_t lock;
	pthread_cond_t said;
	struct pv_vbd_engine *first, *last;  /* that have something to say, the longest waiting first */
	uint32_t closed;
};

struct pv_vbd_board *pv_vbd_board_new(void)
{
	struct pv_vbd_board *board = calloc(1, sizeof(*board));

	if (board) {
		pthread_mutex_init(&board->lock, NULL);
		pthread_cond_init(&board->said, NULL);
	}
	return board;
}

void pv_vbd_board_free(struct pv_vbd_board *board)
{
	if (!board)
		return;
	pthread_cond_destroy(&board->said);
	pthread_mutex_destroy(&board->lock);
	free(board);
}

/* Under the lock. */
static void append(struct pv_vbd_board *board, struct pv_vbd_engine *engine)
{
	engine->next = NULL;
	if (board->last)
		board->last->next = engine;
	else
		board->first = engine;
	board->last = engine;
}

/* Under the lock; the engine need not be there. */
static void take_out(struct pv_vbd_board *board, struct pv_vbd_engine *engine)
{
	struct pv_vbd_engine **link = &board->first, *before = NULL;

	while (*link && *link != engine) {
		before = *link;
		link = &before->next;
	}
	if (!*link)
		return;
	*link = engine->next;
	if (board->last == engine)
		board->last = before;
	engine->next = NULL;
}

int pv_vbd_board_wait(struct pv_vbd_board *board, struct pv_vbd_notice *notice)
{
	struct pv_vbd_engine *engine;

	pthread_mutex_lock(&board->lock);
	while (!board->first && !board->closed)
		pthread_cond_wait(&board->said, &board->lock);
	engine = board->closed ? NULL : board->first;
	if (engine) {
		take_out(board, engine);
		*notice = engine->notice;
		engine->notice = (struct pv_vbd_notice){.token = engine->notice.token};
	}
	pthread_mutex_unlock(&board->lock);
	return engine != NULL;
}

void pv_vbd_board_close(struct pv_vbd_board *board)
{
	pthread_mutex_lock(&board->lock);
	board->closed = 1;
	pthread_cond_broadcast(&board->said);
	pthread_mutex_unlock(&board->lock);
}

void vbd_tell(struct pv_vbd_engine *engine, uint32_t what, const struct pv_vbd_notice *detail)
{
	struct pv_vbd_board *board = engine->board;
	struct pv_vbd_notice *notice = &engine->notice;

	pthread_mutex_lock(&board->lock);
	if (!notice->what)
		append(board, engine);
	/* Of what is said once for each number, the first is kept: the others are said when they come again. */
	if (what & PV_VBD_FAILED)
		notice->failure = detail->failure;
	if (what & ~notice->what & PV_VBD_DISK) {
		notice->error = detail->error;
		engine->errors_told[detail->error / 64] |= 1ull << (detail->error % 64);
	}
	if (what & ~notice->what & PV_VBD_REFUSED) {
		notice->reason = detail->reason;
		engine->reasons_told |= 1u << detail->reason;
	}
	if (what & PV_VBD_UNSUPPORTED)
		notice->unsupported |= detail->unsupported;
	notice->what |= what;
	pthread_cond_signal(&board->said);
	pthread_mutex_unlock(&board->lock);
}

void vbd_hush(struct pv_vbd_engine *engine)
{
	pthread_mutex_lock(&engine->board->lock);
	take_out(engine->board, engine);
	engine->notice = (struct pv_vbd_notice){.token = engine->notice.token};
	pthread_mutex_unlock(&engine->board->lock);
}
