/* SPDX-License-Identifier: MIT */
/* The legs of a loop: which there are, which of them are looked at, which something is due for. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>

#include "netloop_private.h"

void netloop_activate(struct pv_netleg *leg)
{
	struct pv_netloop *loop = leg->loop;

	leg->idle_since_ns = 0;
	if (leg->active)
		return;
	leg->active = 1;
	leg->position = loop->n_active;
	loop->active[loop->n_active++] = leg;
}

void netloop_deactivate(struct pv_netleg *leg)
{
	struct pv_netloop *loop = leg->loop;

	if (!leg->active)
		return;
	leg->active = 0;
	loop->active[leg->position] = loop->active[--loop->n_active];
	loop->active[leg->position]->position = leg->position;
}

int netloop_set_polled(struct pv_netleg *leg, int polled)
{
	struct epoll_event event = { .events = EPOLLIN, .data.ptr = leg };

	if (leg->polled == (uint32_t)polled)
		return 0;
	for (int i = 0; i < 2; i++) {
		int fd = netleg_fd(leg, i);

		if (fd >= 0 && epoll_ctl(leg->loop->epoll_fd, polled ? EPOLL_CTL_ADD : EPOLL_CTL_DEL, fd, &event)) {
			int error = errno;

			if (polled && i)
				epoll_ctl(leg->loop->epoll_fd, EPOLL_CTL_DEL, netleg_fd(leg, 0), &event);
			return -error;
		}
	}
	leg->polled = (uint32_t)polled;
	return 0;
}

void netloop_rouse(struct pv_netleg *leg)
{
	if (!leg->active) {
		/* A descriptor that is readable as long as there is something would wake us again and again. */
		netloop_set_polled(leg, 0);
		netleg_disarm(leg, 0);
	}
	netloop_activate(leg);
}

void pv_netloop_activate(struct pv_netleg *leg)
{
	leg->told = 0;
	netloop_rouse(leg);
}

void netloop_note_time(struct pv_netleg *leg)
{
	struct pv_netloop *loop = leg->loop;

	if (leg->timed || !netleg_due(leg))
		return;
	leg->timed = 1;
	loop->timed[loop->n_timed++] = leg;
}

void netloop_untime(struct pv_netloop *loop, uint32_t i)
{
	loop->timed[i]->timed = 0;
	loop->timed[i] = loop->timed[--loop->n_timed];
}

static int make_room(struct pv_netloop *loop)
{
	uint32_t room = loop->legs_room ? 2 * loop->legs_room : 16;
	struct pv_netleg **legs, **active, **timed;

	if (loop->n_legs < loop->legs_room)
		return 0;
	legs = realloc(loop->legs, room * sizeof(*legs));
	if (!legs)
		return -ENOMEM;
	loop->legs = legs;
	active = realloc(loop->active, room * sizeof(*active));
	if (!active)
		return -ENOMEM;
	loop->active = active;
	timed = realloc(loop->timed, room * sizeof(*timed));
	if (!timed)
		return -ENOMEM;
	loop->timed = timed;
	loop->legs_room = room;
	return 0;
}

static int have_port(struct pv_netloop *loop, uint32_t port)
{
	uint32_t n = loop->n_by_port ? loop->n_by_port : 16;
	struct pv_netleg **by_port;

	while (n <= port)
		n *= 2;
	if (n == loop->n_by_port)
		return 0;
	by_port = realloc(loop->by_port, n * sizeof(*by_port));
	if (!by_port)
		return -ENOMEM;
	memset(by_port + loop->n_by_port, 0, (n - loop->n_by_port) * sizeof(*by_port));
	loop->by_port = by_port;
	loop->n_by_port = n;
	return 0;
}

static void free_parts(struct pv_netleg *leg)
{
	netleg_free_pipes(leg);
	netcapture_forget(leg);
	pv_backlog_release(leg->backlog);
	leg->backlog = NULL;
	free(leg->out);
	leg->out = NULL;
}

int pv_netloop_add(struct pv_netloop *loop, struct pv_netleg *leg, int32_t port)
{
	int result = make_room(loop);

	if (!result && port >= 0)
		result = have_port(loop, (uint32_t)port);
	if (result)
		return result;
	/* A frame of a burst goes out at a leg once, and its copy once more at a mirror. */
	leg->out = calloc(2 * PV_NETLOOP_BURST, sizeof(*leg->out));
	leg->backlog = pv_backlog_new();
	if (!leg->out || !leg->backlog || (leg->kind == PV_NETLEG_USER && netleg_make_pipes(leg))) {
		free_parts(leg);
		return -ENOMEM;
	}
	leg->loop = loop;
	leg->port = port;
	if (port >= 0) {
		struct pv_netleg **last = &loop->by_port[port];

		while (*last)
			last = &(*last)->next_of_port;
		*last = leg;
	}
	leg->number = loop->n_legs;
	loop->legs[loop->n_legs++] = leg;
	netloop_activate(leg);
	return 0;
}

static void unwire(struct pv_netleg *leg)
{
	struct pv_netleg *other = leg->wire;

	if (!other)
		return;
	leg->wire = other->wire = NULL;
	netloop_rouse(other);
}

void pv_netloop_wire(struct pv_netleg *one, struct pv_netleg *other)
{
	unwire(one);
	if (other) {
		unwire(other);
		one->wire = other;
		other->wire = one;
		netloop_rouse(other);
	}
	netloop_rouse(one);
}

void pv_netloop_remove(struct pv_netleg *leg)
{
	struct pv_netloop *loop = leg->loop;

	if (!loop)
		return;
	netloop_set_polled(leg, 0);
	if (!leg->active)
		netleg_disarm(leg, 0);
	netloop_deactivate(leg);
	for (uint32_t i = 0; i < loop->n_timed; i++)
		if (loop->timed[i] == leg) {
			netloop_untime(loop, i);
			break;
		}
	loop->removals++;
	loop->legs[leg->number] = loop->legs[--loop->n_legs];
	loop->legs[leg->number]->number = leg->number;
	if (leg->port >= 0) {
		struct pv_netleg **at = &loop->by_port[leg->port];

		while (*at != leg)
			at = &(*at)->next_of_port;
		*at = leg->next_of_port;
	}
	if (leg->wire != leg)
		unwire(leg);
	leg->wire = NULL;
	if (leg->held_ns)
		loop->n_held--;
	leg->held_ns = 0;
	/* Those whose frames wait here are counted by this thread. */
	if (leg->kind == PV_NETLEG_BACK)
		pv_netback_forget(leg->back);
	free_parts(leg);
	leg->loop = NULL;
}
