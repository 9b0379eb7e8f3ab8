/* SPDX-License-Identifier: MIT */
/*
 * How fast guests may write while transactions are open: what they change makes other domains' commits fail (XSA-206).
 *
 * Each guest has a credit, in thousandths of a write; a write costs one. Credit comes at a fixed rate that all guests
 * share. What one does not use beyond its burst goes to a reserve, which helps those in debt. A guest below zero is not
 * served until it is out of debt.
 */
#include "xs_private.h"

#define WRITE 1000
#define RATE_PER_S (200 * WRITE)
#define BURST (10 * WRITE)
#define RESERVE_MAX (1000 * WRITE)
#define N_NEW_DOMAINS 5        /* so many get their first burst even from an empty reserve, which is then in debt */
#define LONGEST_MS 1000000000

static int64_t least(int64_t a, int64_t b)
{
	return a < b ? a : b;
}

static int64_t most(int64_t a, int64_t b)
{
	return a > b ? a : b;
}

void xs_join_rate(struct pv_xs *hub, struct xs_domain *domain)
{
	if (domain->has_credit || xs_privileged(domain))
		return;
	domain->has_credit = 1;
	domain->credit_ms = hub->now_ms;
	hub->n_rate_domains++;
	domain->public.credit = most(0, least(hub->reserve + N_NEW_DOMAINS * BURST, BURST));
	hub->reserve -= domain->public.credit;
}

void xs_leave_rate(struct pv_xs *hub, struct xs_domain *domain)
{
	if (!domain->has_credit)
		return;
	domain->has_credit = 0;
	hub->n_rate_domains--;
	hub->reserve += most(0, least(domain->public.credit, BURST - hub->reserve));
}

void xs_grow_credit(struct pv_xs *hub, struct xs_domain *domain)
{
	int64_t passed_ms = least(hub->now_ms - domain->credit_ms, LONGEST_MS);
	int64_t grown = passed_ms * RATE_PER_S / (1000 * (int64_t)hub->n_rate_domains);
	int64_t *credit = &domain->public.credit, surplus;

	if (grown) { /* else later, or looking often would let nothing come */
		*credit += grown;
		domain->credit_ms = hub->now_ms;
	}
	if (*credit < 0 && hub->reserve > 0) {
		int64_t helped = least(hub->reserve, -*credit);

		hub->reserve -= helped;
		*credit += helped;
	}
	surplus = *credit - BURST;
	if (surplus > 0) {
		*credit = BURST;
		hub->reserve += most(0, least(surplus, RESERVE_MAX - hub->reserve));
	}
}

void xs_debit(struct pv_xs *hub, struct xs_domain *domain)
{
	if (!domain->has_credit || !hub->n_transactions)
		return;
	xs_grow_credit(hub, domain);
	domain->public.credit -= WRITE;
}

int64_t xs_debt_ms(const struct pv_xs *hub, const struct xs_domain *domain)
{
	int64_t debt = most(0, -domain->public.credit);

	return (debt * 1000 * hub->n_rate_domains + RATE_PER_S - 1) / RATE_PER_S;
}
