/* SPDX-License-Identifier: MIT */
/*
 * Wherever Dom0's look at a record is interrupted by the record's next owner, the copy is of one owner; and wherever a
 * writer or the reader of the log is interrupted by another, each batch is read once and whole. Prints the places.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "interrupt_shim.h"
#include "pv_look.h"

#define must(what) ((what) ? (void)0 : fail(#what, __LINE__))
#define ENTRY 40

static struct pv_look_head *head;
static uint8_t pages[2][PV_PAGE_BYTES] __attribute__((aligned(64)));
static long place, at, places;
static void (*meanwhile)(void);
static int n_pushed, n_read;

static void fail(const char *what, int line)
{
	fprintf(stderr, "look_again.c:%d: does not hold at place %ld: %s\n", line, at, what);
	exit(1);
}

void interrupt(void)
{
	void (*now)(void) = meanwhile;

	if (!now || place++ != at)
		return;
	meanwhile = NULL;
	now();
}

/* Whether `call` was interrupted at the place. */
static int interrupted(void (*call)(void), void (*by)(void))
{
	place = 0;
	meanwhile = by;
	call();
	if (meanwhile == NULL) {
		places++;
		return 1;
	}
	meanwhile = NULL;
	return 0;
}

/* Records. */

static void label(char owner)
{
	struct pv_look_record *record = pv_look_at(head, 1);

	memset(record->kind, owner, PV_LOOK_NAME_BYTES);
	memset(record->response, owner, PV_LOOK_LAYOUT_BYTES);
}

static void end(void)
{
	pv_look_end(pv_look_at(head, 1));
}

static void end_and_label(void)
{
	end();
	label('b');
}

static void change_hands(void)
{
	end_and_label();
	pv_look_begin(pv_look_at(head, 1), 1);
}

static struct pv_look_record copy;
static int found;

static void look(void)
{
	found = pv_look_copy(head, 1, &copy);
}

static void look_while(void (*by)(void))
{
	int n_refused = 0, more = 1;

	for (at = 0; more; at++) {
		memset(pv_look_at(head, 1), 0, sizeof(struct pv_look_record));
		label('a');
		pv_look_begin(pv_look_at(head, 1), 1);
		more = interrupted(look, by);
		n_refused += !found;
		if (found) {
			must(copy.kind[0] == copy.response[0] && copy.kind[0] == (copy.generation ? 'b' : 'a'));
			must(copy.generation == 0 || by == change_hands);
		}
	}
	must(found && copy.kind[0] == 'a' && n_refused > 1);
}

/* The log. */

static void push(int number)
{
	uint8_t message[ENTRY];

	memset(message, number + 1, ENTRY);
	must((int32_t)pv_ring_push(&pv_look_at(head, (uint32_t)number)->ring, message, 1) == 1);
	n_pushed++;
}

static void push_one(void)
{
	push(0);
}

static void push_another(void)
{
	push(1);
}

static void read_log(void)
{
	static uint8_t messages[PV_RING_MAX_BYTES];
	struct pv_look_entry entry;
	int done = pv_look_tap_read(head, &entry, messages);

	must(done >= 0);
	if (done == 0)
		return;
	n_read++;
	must(entry.n == 1 && entry.message_bytes == ENTRY && entry.record < 2);
	for (int i = 0; i < ENTRY; i++)
		must(messages[i] == entry.record + 1);
}

static void read_on(void)
{
	read_log();
	read_log();
}

static void log_while(void (*call)(void), void (*by)(void))
{
	int more = 1;

	for (at = 0; more; at++) {
		for (uint32_t i = 0; i < 2; i++) {
			struct pv_look_record *record = pv_look_at(head, i);

			must(pv_ring_create(&record->ring, pages[i], PV_PAGE_BYTES, ENTRY, ENTRY, 8, NULL, 0) == 0);
			pv_look_begin(record, i);
		}
		n_pushed = n_read = 0;
		push_one();
		more = interrupted(call, by);
		for (int i = 0; i < 4; i++)
			read_log();
		must(n_read == n_pushed && head->tap_lost == 0);
	}
}

int main(void)
{
	head = aligned_alloc(PV_PAGE_BYTES, PV_LOOK_BYTES);
	if (!head)
		return 1;
	memset(head, 0, PV_LOOK_BYTES);
	look_while(end);
	look_while(end_and_label);
	look_while(change_hands);
	for (uint32_t i = 0; i < 2; i++)
		pv_look_want(head, i, PV_LOOK_TAP, UINT64_MAX);
	log_while(push_one, push_another);
	log_while(push_one, read_on);
	log_while(read_log, push_one);
	printf("%ld places\n", places);
	free(head);
	return 0;
}
