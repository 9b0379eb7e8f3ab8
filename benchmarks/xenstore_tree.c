/* SPDX-License-Identifier: MIT */
#include <stdio.h>
#include <string.h>

#include "xenstore_load.h"
#include "xenstore_tree.h"

void node_path(char *path, uint32_t node)
{
	snprintf(path, PATH_BYTES, TREE "/d%u/n%u", node / options.per_directory, node % options.per_directory);
}

static uint32_t node_mark(uint32_t node)
{
	return node * 2654435761u % 10000;
}

void node_value(char *value, uint32_t node, uint64_t *seed)
{
	snprintf(value, 16, "%04u%04u", node_mark(node), (uint32_t)(random_next(seed) % 10000));
}

static bool is_value(const struct message *message, uint32_t node)
{
	char mark[8];

	snprintf(mark, sizeof mark, "%04u", node_mark(node));
	return message->header.n_bytes == 8 && memcmp(message->body, mark, 4) == 0;
}

static bool is_ok(const struct message *message, uint32_t node)
{
	(void)node;
	return message->header.n_bytes == 3 && memcmp(message->body, "OK", 3) == 0;
}

static bool is_perms(const struct message *message, uint32_t node)
{
	(void)node;
	return message->header.n_bytes == 3 && memcmp(message->body, "n0", 3) == 0;
}

static bool is_missing(const struct message *message, uint32_t node)
{
	(void)node;
	return message_is_error(message, "ENOENT");
}

void child_name(char *name, uint32_t child)
{
	static const char digits[] = "0123456789abcdefghijklmnopqrstuvwxyz";

	name[0] = digits[child / (36 * 36) % 36];
	name[1] = digits[child / 36 % 36];
	name[2] = digits[child % 36];
	name[3] = 0;
}

static uint32_t digit(char c)
{
	return c <= '9' ? (uint32_t)(c - '0') : (uint32_t)(c - 'a') + 10;
}

/* Each of the names once, in any order. */
static bool are_children(const char *names, size_t n_bytes, uint32_t count)
{
	bool seen[WIDE] = {false};

	if (n_bytes != 4 * count)
		return false;
	for (uint32_t i = 0; i < count; i++, names += 4) {
		uint32_t child = digit(names[0]) * 36 * 36 + digit(names[1]) * 36 + digit(names[2]);

		if (names[3] || child >= count || seen[child])
			return false;
		seen[child] = true;
	}
	return true;
}

static bool is_narrow(const struct message *message, uint32_t node)
{
	(void)node;
	return are_children(message->body, message->header.n_bytes, NARROW);
}

static bool is_wide(const struct message *message, uint32_t node)
{
	(void)node;
	return are_children(message->body, message->header.n_bytes, WIDE);
}

/* "<generation>\0", the names, and an empty name for the end. */
static bool is_wide_part(const struct message *message, uint32_t node)
{
	size_t generation = strnlen(message->body, message->header.n_bytes) + 1;

	(void)node;
	return generation < message->header.n_bytes && message->body[message->header.n_bytes - 1] == 0 &&
	       are_children(message->body + generation, message->header.n_bytes - generation - 1, WIDE);
}

static const struct operation operations[] = {
	{.name = "read", .type = OP_READ, .check = is_value},
	{.name = "write", .type = OP_WRITE, .check = is_ok},
	{.name = "perms", .type = OP_GET_PERMS, .check = is_perms},
	{.name = "miss", .type = OP_READ, .place = TREE "/no/such", .check = is_missing, .expects_error = true},
	{.name = "directory-100", .type = OP_DIRECTORY, .place = TREE "/w100", .check = is_narrow},
	{.name = "directory-1000", .type = OP_DIRECTORY, .place = TREE "/w1000", .check = is_wide},
	{.name = "directory-part", .type = OP_DIRECTORY_PART, .place = TREE "/w1000", .argument = "0", .check = is_wide_part},
};

const struct operation *find_operation(const char *name)
{
	for (size_t i = 0; i < sizeof operations / sizeof *operations; i++)
		if (!strcmp(operations[i].name, name))
			return &operations[i];
	return NULL;
}
