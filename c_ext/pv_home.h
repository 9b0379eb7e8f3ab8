/* SPDX-License-Identifier: MIT */
/*
 * Which process an object belongs to. Shared memory is mapped MADV_DONTFORK, so a forked child that touches its parent's
 * ring would die of SIGSEGV; every entry point asks first. The answer is a word in a page that the kernel wipes in a
 * forked child (MADV_WIPEONFORK): one load, no system call, and right for a fork that nobody told us about.
 *
 * Threads: any. Not covered: vfork and clone with CLONE_VM, which share the memory and so may use the objects.
 */
#ifndef PV_HOME_H
#define PV_HOME_H

#include <stdint.h>

/* This process's mark, never 0. Store it in an object when the object is made. */
uint32_t pv_home_mark(void);
/* 1 when an object with this mark was made by this process. */
int pv_home_is_here(uint32_t mark);
/* Where the mark of the process that reads it stands, for objects that compare it in every call. */
const uint32_t *pv_home_word(void);

#endif
