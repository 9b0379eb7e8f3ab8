/* SPDX-License-Identifier: MIT */
#ifndef NETLOOP_PRIVATE_H
#define NETLOOP_PRIVATE_H

#include <pthread.h>

#include "pv_netloop.h"

#define NETLOOP_BURST_BYTES 196608 /* so that what two senders have waiting, and a burst of each, is less than what may wait */

struct pv_netloop {
	struct pv_switch sw;
	struct pv_netleg **legs;
	uint32_t n_legs, legs_room;
	struct pv_netleg **active;
	uint32_t n_active;
	struct pv_netleg **timed;   /* that something is due for */
	uint32_t n_timed;
	uint32_t n_held;            /* of these, as they had too much waiting */
	struct pv_backlog *sender;  /* whose burst is forwarded */
	uint64_t removals;
	struct pv_netleg **by_port; /* the first leg of each port of the switch */
	uint32_t n_by_port;
	struct pv_switch_verdict *verdict;
	struct pv_netleg *touched[PV_SWITCH_PORTS + 1]; /* legs with frames of the present burst */
	uint32_t n_touched;
	int32_t ends[2];            /* ports of the switch that are joined by a wire; PV_SWITCH_NO_PORT: none */
	uint32_t is_wire;
	struct pv_burst burst;      /* and behind it, room for one more frame */
	int epoll_fd;
	int kick_fd;
	int64_t spin_ns;
	int64_t hold_ns;
	int64_t now_ns;
	uint32_t visitors;          /* threads that entered, or want to */
	uint32_t stopping;
	uint32_t home;
	uint64_t sleeps;
	int started, ended;
	int tid;
	pthread_t thread;
	pthread_mutex_t lock;       /* whoever has it may touch the legs */
	pthread_mutex_t news_lock;
	pthread_cond_t news;
	uint32_t has_news;
};

/* Frames of a leg to the end of the burst. How many; 0: none now; -errno: the leg is done with. */
int64_t netleg_take(struct pv_netleg *leg, struct pv_burst *burst);
/* Frames to it. */
void netleg_send(struct pv_netleg *leg, uint8_t *memory, struct pv_frame *frames, uint32_t n);
/* Whether it can take a large packet now. */
int netleg_has_room(struct pv_netleg *leg);
/* What the passing of time and new buffers make possible. */
void netleg_look(struct pv_netleg *leg);
/* Have it wake the loop: 1; 0: there is something to do already; -errno. */
int netleg_arm(struct pv_netleg *leg);
/* It was armed; `rung`: and its descriptor was readable. */
void netleg_disarm(struct pv_netleg *leg, int rung);
/* Its i-th descriptor for the epoll, of two; -1: none. */
int netleg_fd(const struct pv_netleg *leg, int i);
int64_t netleg_due(const struct pv_netleg *leg);
/* Whether it has so much waiting at guests that nothing more is taken from it now. */
int netleg_is_held(struct pv_netleg *leg);
void netleg_fail(struct pv_netleg *leg, int64_t error);

/* A program's port. */
int64_t netleg_take_user(struct pv_netleg *leg, struct pv_burst *burst);
void netleg_send_user(struct pv_netleg *leg, const uint8_t *memory, const struct pv_frame *frames, uint32_t n);
/* Whether it has given something. */
int netleg_has_user(struct pv_netleg *leg);
int netleg_make_pipes(struct pv_netleg *leg);
void netleg_free_pipes(struct pv_netleg *leg);

void netloop_kick(struct pv_netloop *loop);
/* Frames pass a leg that has taps, in a direction (PV_NETCAPTURE_*). */
void netcapture_take(struct pv_netleg *leg, uint32_t direction, uint8_t *memory, const struct pv_frame *frames, uint32_t n);
/* Its taps go. */
void netcapture_forget(struct pv_netleg *leg);
/* Among those that have their turns, or not. */
void netloop_activate(struct pv_netleg *leg);
void netloop_deactivate(struct pv_netleg *leg);
/* Its descriptors are in the epoll, or not. 0 or -errno. */
int netloop_set_polled(struct pv_netleg *leg, int polled);
/* If something is due for it, it is looked at then. */
void netloop_note_time(struct pv_netleg *leg);
void netloop_untime(struct pv_netloop *loop, uint32_t i);
/* The leg is to have its turns again. */
void netloop_rouse(struct pv_netleg *leg);
/* After something was sent to it: what is due, or has failed, or waits for its peer, is not forgotten. */
void netloop_settle(struct pv_netleg *leg);
/* Send the first n frames of the loop's burst, which came from `leg`, where they belong. */
void netloop_forward(struct pv_netleg *leg, uint32_t n);

#endif
