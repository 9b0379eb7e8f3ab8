/* SPDX-License-Identifier: MIT */
/*
 * Model of a ring with an event channel at each end: pv_ring.c's push, take, final check and wait over pv_event.c's
 * pending, asleep and doorbell.
 *
 * What spin looks for: an end that sleeps for ever (invalid end state), a message that is read before it is written or
 * overwritten before it is read, and a good peer that is called a liar (assertions).
 *
 *   -DMESSAGES=n    requests, each with one response; the ring has four slots
 *   -DTSO           each end has a FIFO buffer of stores (x86); without it memory is sequentially consistent
 *   -DASYMMETRIC    publishing has no barrier: the end that falls asleep drains both buffers (membarrier)
 *   -DHALF          the front asks for an event after half of what is outstanding, not with the next response
 *   -DBUG_...       one seeded bug each, which has to be found
 *
 * Indexes are bytes that wrap within the run.
 */
#ifndef MESSAGES
#define MESSAGES 12
#endif
#define SIZE 4
#ifdef BUG_NO_ROOM_CHECK
#define FULL (SIZE + 1)
#else
#define FULL SIZE
#endif
#define START 250
#define LAST U8(START + MESSAGES)
#define U8(x) ((x) & 255)

#define FRONT 0
#define BACK 1
#define PEER (1 - me)

/* Addresses: what `side` writes, the inbox of `side`, slots. */
#define PROD(side) (side)
#define EVENT(side) (2 + (side))
#define PENDING(side) (4 + (side))
#define ASLEEP(side) (6 + (side))
#define SLOT(index) (8 + ((index) & (SIZE - 1)))
#define MESSAGE(side, index) (U8(index) ^ ((side) * 64))

byte memory[8 + SIZE];
bit bell[2];

#ifdef TSO
chan buffer[2] = [3] of { byte, byte };
#define DRAINED empty(buffer[me])

proctype drain(byte side)
{
	byte address, value;

end:	do
	:: atomic { buffer[side] ? address, value -> memory[address] = value; address = 0; value = 0 }
	od
}

/* No end reads what it wrote itself, so loads need not look into the buffer; `load` holds that. */
inline store(address, value) { buffer[me] ! address, value }
#define NOT_OWN(address) (!(buffer[me] ?? [eval(address), _]))
#else
#define DRAINED true
#define NOT_OWN(address) true
inline store(address, value) { memory[address] = value }
#endif

inline load(into, address)
{
	atomic { assert(NOT_OWN(address)); into = memory[address] }
}

/* A locked instruction. */
inline exchange(into, address, value)
{
	atomic { DRAINED -> into = memory[address]; memory[address] = value }
}

inline fence()
{
	DRAINED
}

#ifdef TSO
/* A barrier here, and one on the peer's processor at some moment before this returns. */
inline membarrier()
{
	DRAINED;
	atomic {
		do
		:: buffer[PEER] ? address, value -> memory[address] = value
		:: empty(buffer[PEER]) -> break
		od;
		address = 0; value = 0
	}
}
#else
inline membarrier() { skip }
#endif

/* -- push */

inline write_entries()
{
	do
	:: atomic { i != next -> store(SLOT(i), MESSAGE(me, i)); i = U8(i + 1) }
	:: atomic { i == next -> i = 0; break }
	od
}

inline notify()
{
#ifdef BUG_ASLEEP_BEFORE_PENDING
	load(asleep, ASLEEP(PEER));
#endif
	exchange(was, PENDING(PEER), 1);
	if
	:: was -> skip
	:: else ->
#ifndef BUG_ASLEEP_BEFORE_PENDING
		load(asleep, ASLEEP(PEER));
#endif
		if
		:: asleep -> atomic { DRAINED -> bell[PEER] = 1 }
		:: else -> skip
		fi
	fi;
	was = 0; asleep = 0
}

inline push()
{
	/* From one message to as many as there is room for. */
	atomic {
		next = U8(prod + 1); i = prod;
		do
		:: room > 1 -> next = U8(next + 1); room--
		:: room = 0; break
		od
	};
#ifdef BUG_PUBLISH_FIRST
	store(PROD(me), next);
	write_entries();
#else
	write_entries();
	store(PROD(me), next);
#endif
#if !defined(ASYMMETRIC) && !defined(BUG_NO_FENCE_IN_PUBLISH)
#ifdef BUG_FENCE_AT_ONE_END
	if
	:: me == BACK -> fence()
	:: else -> skip
	fi;
#else
	fence();
#endif
#endif
	atomic {
		load(event, EVENT(PEER));
#ifdef BUG_NOTIFY_WHEN_EQUAL
		was = (next == event);
#else
		was = (U8(next - event) < U8(next - prod));
#endif
		prod = next; event = 0; next = 0
	};
	if
	:: was -> notify()
	:: else -> skip
	fi
}

/* -- take */

/* known = what can be taken. */
inline poll()
{
	atomic {
		load(event, PROD(PEER));
		known = U8(event - cons);
		event = 0;
		assert(me == BACK || known <= U8(prod - cons));
		assert(me == FRONT || known <= SIZE - U8(cons - prod))
	}
}

inline take()
{
	do
	:: atomic {
		known ->
		load(i, SLOT(cons));
		assert(i == MESSAGE(PEER, cons));
		i = 0; cons = U8(cons + 1); known--;
		if
		:: known = 0	/* not all of them */
		:: known
		:: !known
		fi }
	:: atomic { !known -> break }
	od
}

/* -- wait */

inline final_check()
{
#ifdef BUG_EVENT_AT_CONS
	store(EVENT(me), cons);
#else
#ifdef HALF
	if
	:: me == FRONT -> store(EVENT(me), U8(cons + (U8(prod - cons) >> 1) + 1))
	:: else -> store(EVENT(me), U8(cons + 1))
	fi;
#else
	store(EVENT(me), U8(cons + 1));
#endif
#endif
#ifndef BUG_NO_FENCE_IN_FINAL_CHECK
#if defined(ASYMMETRIC) && !defined(BUG_NO_MEMBARRIER)
	membarrier();
#else
	fence();
#endif
#endif
#ifndef BUG_NO_RECHECK
	poll()
#endif
}

/* was = 1: the pending bit was set and is taken. */
inline look()
{
	exchange(was, PENDING(me), 0)
}

inline sleep_for_event()
{
	look();
	do
	:: was -> was = 0; break
	:: else ->
#ifdef BUG_ARM_BY_STORE
		store(ASLEEP(me), 1);
		load(was, PENDING(me));
		if
		:: was -> look()
		:: else -> skip
		fi;
#else
		exchange(asleep, ASLEEP(me), 1);
		asleep = 0;
#ifndef BUG_NO_LOOK_AFTER_ARM
		look();
#endif
#endif
		if
		:: was -> skip
		:: else -> atomic { bell[me] -> bell[me] = 0 }
		fi;
		store(ASLEEP(me), 0);
		if
		:: was -> skip
		:: else -> look()
		fi
	od
}

inline wait()
{
#ifndef BUG_PENDING_AFTER_DRAIN
	look();
	was = 0;
#endif
	poll();
#ifdef BUG_PENDING_AFTER_DRAIN
	look();
	was = 0;
#endif
	do
	:: known -> break
	:: else ->
#ifdef BUG_NO_FINAL_CHECK_AT_BACK
		if
		:: me == FRONT -> final_check()
		:: else -> skip
		fi;
#else
		final_check();
#endif
#ifdef BUG_PENDING_AFTER_DRAIN
		look();
		was = 0;
#endif
		if
		:: known -> skip
		:: else -> sleep_for_event(); poll()
		fi
	od
}

proctype ring_end(bit me)
{
	byte prod = START, cons = START, next, known, room, event, i;
	bit was, asleep;
#ifdef TSO
	byte address, value;
#endif

	do
	:: cons == LAST && prod == LAST -> break
	:: me == FRONT && cons != prod -> wait(); take()
	:: me == BACK && cons == prod && cons != LAST -> wait(); take()
	:: me == BACK && cons != prod && cons != LAST -> poll(); take()
	:: atomic {
		me == FRONT && prod != LAST && U8(prod - cons) != FULL ->
		room = FULL - U8(prod - cons);
		room = (room < U8(LAST - prod) -> room : U8(LAST - prod)) };
		push()
	:: atomic { me == BACK && cons != prod -> room = U8(cons - prod) };
		push()
	od
}

init {
	atomic {
		memory[PROD(FRONT)] = START; memory[PROD(BACK)] = START;
		memory[EVENT(FRONT)] = U8(START + 1); memory[EVENT(BACK)] = U8(START + 1);
		memory[SLOT(0)] = 100; memory[SLOT(1)] = 100; memory[SLOT(2)] = 100; memory[SLOT(3)] = 100;
#ifdef TSO
		run drain(FRONT);
		run drain(BACK);
#endif
		run ring_end(FRONT);
		run ring_end(BACK)
	}
}
