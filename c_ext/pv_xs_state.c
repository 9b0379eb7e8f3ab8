/* SPDX-License-Identifier: MIT */
#include <errno.h>

#include "xs_private.h"

int64_t pv_xs_state_save(struct pv_xs *hub, uint8_t **state)
{
	return -ENOSYS;
}

void pv_xs_state_free(uint8_t *state)
{
	free(state);
}

int pv_xs_state_load(struct pv_xs *hub, const uint8_t *state, uint64_t n)
{
	return -ENOSYS;
}
