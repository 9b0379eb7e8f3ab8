/* SPDX-License-Identifier: MIT */
/* Whether pv_xs_check sees what it looks for: each count and link is made wrong, and right again. */
#define _GNU_SOURCE
#include <stdio.h>

#include "caller.h"
#include "xs_private.h"

static struct pv_xs *hub;

static void expect(const char *problem)
{
	const char *found = pv_xs_check(hub);

	if (problem ? !found || strcmp(found, problem) : found != NULL) {
		printf("found: %s, not: %s\n", found ? found : "nothing", problem ? problem : "nothing");
		exit(1);
	}
}

/* A value is another one while the check runs. */
#define wrong(place, value, problem) \
	do { \
		__typeof__(place) former = (place); \
		(place) = (value); \
		expect(problem); \
		(place) = former; \
		expect(NULL); \
	} while (0)

int main(void)
{
	struct pv_xs_conn *dom0;
	struct xs_node *newest;
	struct heard heard;

	hub = pv_xs_new(1);
	dom0 = pv_xs_connect(hub, 0);
	must(ask(dom0, &heard, WRITE, 0, "/a/b\0x", 6));
	must(ask(dom0, &heard, WATCH, 0, "/a\0t", 5));
	expect(NULL);
	newest = hub->newest;
	wrong(newest->parent, NULL, "a node has no parent");
	wrong(newest->parent->gone, 1, "a node has no parent");
	wrong(newest->name[0], 'c', "a node is not among the names of its parent");
	wrong(hub->n_nodes, hub->n_nodes - 1, "a name has no node");
	wrong(hub->n_watches, 2, "the count of watches is wrong");
	wrong(newest->content->perms->entries[0].domid, 700, "a node's owner has no count");
	wrong(xs_domain(hub, 0)->public.n_nodes, 1, "the count of what a domain owns is wrong");
	wrong(xs_domain(hub, 0)->public.memory_bytes, -1, "a domain holds less than no memory");
	pv_xs_conn_free(dom0);
	pv_xs_free(hub);
	puts("ok");
	return 0;
}
