/* SPDX-License-Identifier: MIT */
/*
 * The tree that `populate` makes and the others ask for, and how the right answers look.
 *
 * TREE/d<i>/n<j> with values of eight digits, the first four made from the node's number, so that a reader can check what
 * it gets while others write; TREE/w100 and TREE/w1000 with that many children; TREE/t<i> for transactions.
 */
#ifndef XENSTORE_TREE_H
#define XENSTORE_TREE_H

#include "xenstore_client.h"

#define WIDE 1000
#define NARROW 100
#define PATH_BYTES 128

/* One that is asked again and again. */
struct operation {
	const char *name;
	enum op type;
	const char *place;       /* NULL: any node */
	const char *argument;    /* behind the place */
	bool (*check)(const struct message *message, uint32_t node);
	bool expects_error;
};

/* NULL when there is none of that name. */
const struct operation *find_operation(const char *name);
/* PATH_BYTES. */
void node_path(char *path, uint32_t node);
/* 16 bytes. */
void node_value(char *value, uint32_t node, uint64_t *seed);
/* Of a child of the narrow or the wide directory: three letters and a NUL. */
void child_name(char *name, uint32_t child);

#endif
