/* SPDX-License-Identifier: MIT */
#include "pv_netctrl.h"

#include <string.h>

#include "pv_offload.h"

#define ALL_FLAGS (PV_NETHASH_IPV4 | PV_NETHASH_IPV4_TCP | PV_NETHASH_IPV6 | PV_NETHASH_IPV6_TCP)
#define PAGE_BYTES 4096u
#define MACS 12u
#define TCP 6

/* ---- requests ---- */

/* n bytes of the guest's page, from its first on: 1 or 0. */
static int copy_table(struct pv_mapper *mapper, uint32_t gref, void *to, uint32_t n)
{
	struct pv_grant_copy_op op = { .gref = gref, .length = (uint16_t)n };

	if (!n)
		return 1;
	pv_grant_copy(mapper, &op, 1, to, n, 0);
	return !op.status;
}

static uint32_t set_flags(struct pv_nethash *hash, uint32_t flags)
{
	if (flags & ~(uint32_t)ALL_FLAGS || hash->algorithm == PV_NETHASH_NONE)
		return PV_NETCTRL_INVALID;
	hash->flags = flags;
	return PV_NETCTRL_SUCCESS;
}

static uint32_t set_key(struct pv_nethash *hash, struct pv_mapper *mapper, uint32_t gref, uint32_t n)
{
	uint8_t key[PV_NETHASH_KEY_BYTES] = { 0 };

	if (n > PV_NETHASH_KEY_BYTES)
		return PV_NETCTRL_OVERFLOW;
	if (!copy_table(mapper, gref, key, n))
		return PV_NETCTRL_INVALID;
	memcpy(hash->key, key, sizeof(key));
	return PV_NETCTRL_SUCCESS;
}

static uint32_t set_mapping_size(struct pv_nethash *hash, uint32_t size)
{
	if (size > PV_NETHASH_MAPPING)
		return PV_NETCTRL_INVALID;
	hash->mapping_size = size;
	memset(hash->mapping, 0, sizeof(hash->mapping));
	return PV_NETCTRL_SUCCESS;
}

static uint32_t set_mapping(struct pv_nethash *hash, struct pv_mapper *mapper, uint32_t gref, uint32_t n, uint32_t from)
{
	uint32_t table[PV_NETHASH_MAPPING];

	if (n > PV_NETHASH_MAPPING)
		return PV_NETCTRL_OVERFLOW;
	if (from > hash->mapping_size || n > hash->mapping_size - from)
		return PV_NETCTRL_INVALID;
	if (!copy_table(mapper, gref, table, n * (uint32_t)sizeof(*table)))
		return PV_NETCTRL_INVALID;
	for (uint32_t i = 0; i < n; i++)
		if (table[i] >= hash->n_queues)
			return PV_NETCTRL_INVALID;
	memcpy(&hash->mapping[from], table, n * sizeof(*table));
	return PV_NETCTRL_SUCCESS;
}

static uint32_t set_algorithm(struct pv_nethash *hash, uint32_t algorithm)
{
	if (algorithm > PV_NETHASH_TOEPLITZ)
		return PV_NETCTRL_INVALID;
	hash->algorithm = algorithm;
	return PV_NETCTRL_SUCCESS;
}

struct pv_netctrl_response pv_netctrl_answer(struct pv_netctrl *ctrl, const struct pv_netctrl_request *request)
{
	struct pv_nethash *hash = ctrl->hash;
	struct pv_mapper *mapper = ctrl->mapper;
	struct pv_netctrl_response response = { .id = request->id, .type = request->type };
	const uint32_t *data = request->data;

	switch (request->type) {
	case PV_NETCTRL_GET_HASH_FLAGS:
		response.status = hash->algorithm == PV_NETHASH_NONE ? PV_NETCTRL_NOT_SUPPORTED : PV_NETCTRL_SUCCESS;
		response.data = response.status ? 0 : ALL_FLAGS;
		break;
	case PV_NETCTRL_SET_HASH_FLAGS:
		response.status = set_flags(hash, data[0]);
		break;
	case PV_NETCTRL_SET_HASH_KEY:
		response.status = set_key(hash, mapper, data[0], data[1]);
		break;
	case PV_NETCTRL_GET_MAPPING_SIZE:
		response.data = PV_NETHASH_MAPPING;
		break;
	case PV_NETCTRL_SET_MAPPING_SIZE:
		response.status = set_mapping_size(hash, data[0]);
		break;
	case PV_NETCTRL_SET_MAPPING:
		response.status = set_mapping(hash, mapper, data[0], data[1], data[2]);
		break;
	case PV_NETCTRL_SET_HASH_ALGORITHM:
		response.status = set_algorithm(hash, data[0]);
		break;
	case PV_NETCTRL_GET_GREF_MAPPING_SIZE:
		response.status = data[0] < ctrl->grefs->n_queues ? PV_NETCTRL_SUCCESS : PV_NETCTRL_INVALID;
		response.data = response.status ? 0 : PV_NETGREFS_MAX;
		break;
	case PV_NETCTRL_ADD_GREF_MAPPING:
		response.status = pv_netgrefs_add(ctrl->grefs, data[0], data[1], data[2]);
		break;
	case PV_NETCTRL_DEL_GREF_MAPPING:
		response.status = pv_netgrefs_del(ctrl->grefs, data[0], data[1], data[2], &response.data);
		break;
	default:
		response.status = PV_NETCTRL_NOT_SUPPORTED;
		break;
	}
	return response;
}

int64_t pv_netctrl_serve(struct pv_netctrl *ctrl)
{
	struct pv_netctrl_request requests[PV_NETCTRL_TAKE];
	struct pv_netctrl_response responses[PV_NETCTRL_TAKE];
	int64_t n = pv_ring_take(ctrl->ring, requests, PV_NETCTRL_TAKE), pushed;

	if (n <= 0)
		return n;
	for (int64_t i = 0; i < n; i++) {
		responses[i] = pv_netctrl_answer(ctrl, &requests[i]);
		ctrl->refused += responses[i].status != PV_NETCTRL_SUCCESS;
	}
	ctrl->requests += (uint64_t)n;
	pushed = pv_ring_push(ctrl->ring, responses, (uint32_t)n);
	if (pushed < 0)
		return pushed;
	if (pushed >> 32 & PV_RING_STALE)
		ctrl->stale = 1;
	return n;
}

/* ---- hashes ---- */

/* Of IP: bit number of its flag with TCP where that is, and the bytes to hash. 0: it is none. */
static uint32_t look(const uint8_t *bytes, uint32_t n, uint8_t input[36], uint32_t *is_v6, uint32_t *is_tcp)
{
	uint32_t at = MACS, l4;

	*is_tcp = 0;
	if (n >= at + 6 && bytes[at] == 0x81 && !bytes[at + 1])
		at += 4;
	if (n < at + 2)
		return 0;
	if (bytes[at] == 0x08 && !bytes[at + 1]) {
		const uint8_t *ip = bytes + at + 2;

		if (n < at + 2 + 20 || ip[0] >> 4 != 4 || (ip[0] & 15) < 5)
			return 0;
		*is_v6 = 0;
		memcpy(input, ip + 12, 8);
		l4 = at + 2 + (ip[0] & 15u) * 4;
		/* Of a fragment no port is known. */
		if (ip[9] == TCP && !((ip[6] & 0x3F) | ip[7]) && n >= l4 + 4) {
			*is_tcp = 1;
			memcpy(input + 8, bytes + l4, 4);
		}
		return 8;
	}
	if (bytes[at] == 0x86 && bytes[at + 1] == 0xDD) {
		const uint8_t *ip = bytes + at + 2;

		if (n < at + 2 + 40 || ip[0] >> 4 != 6)
			return 0;
		*is_v6 = 1;
		memcpy(input, ip + 8, 32);
		l4 = at + 2 + 40;
		if (ip[6] == TCP && n >= l4 + 4) {
			*is_tcp = 1;
			memcpy(input + 32, bytes + l4, 4);
		}
		return 32;
	}
	return 0;
}

void pv_nethash_of(const struct pv_nethash *hash, const uint8_t *bytes, struct pv_frame *frame)
{
	uint32_t is_v6 = 0, is_tcp = 0, n;
	uint8_t input[36];

	frame->flags &= (uint16_t)~PV_FRAME_HASH;
	frame->hash = 0;
	n = look(bytes, frame->length, input, &is_v6, &is_tcp);
	if (!n)
		return;
	if (is_tcp && hash->flags & (is_v6 ? PV_NETHASH_IPV6_TCP : PV_NETHASH_IPV4_TCP)) {
		frame->hash_type = is_v6 ? 3 : 1;
		n += 4;
	} else if (hash->flags & (is_v6 ? PV_NETHASH_IPV6 : PV_NETHASH_IPV4)) {
		frame->hash_type = is_v6 ? 2 : 0;
	} else {
		return;
	}
	frame->flags |= PV_FRAME_HASH;
	frame->hash = pv_toeplitz(hash->key, input, n);
}

uint32_t pv_nethash_queue(const struct pv_nethash *hash, const struct pv_frame *frame)
{
	if (hash->mapping_size)
		return hash->mapping[frame->hash % hash->mapping_size];
	return frame->hash % hash->n_queues;
}
