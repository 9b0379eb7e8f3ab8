# SPDX-License-Identifier: MIT
"""How fast guests may write while transactions are open: what they change makes other domains' commits fail (XSA-206).

Each domain has a credit, counted in thousandths of a write; a write costs one. Credit comes at a fixed rate that all
domains share. What a domain does not use beyond its burst goes to a common reserve, which helps those in debt. A domain
below zero is not served until it is out of debt. Time is a value, in milliseconds.
"""

from typing import Final

WRITE: Final = 1000
"""One write, in the unit of credit."""
RATE_PER_S: Final = 200 * WRITE
"""Of all domains together."""
DOMAIN_BURST: Final = 10 * WRITE
RESERVE_MAX: Final = 1000 * WRITE
N_NEW_DOMAINS: Final = 5
"""So many new domains get their first burst even from an empty reserve, which is then in debt."""
_LONGEST_MS: Final = 10**9


class Credit:
    """One domain's."""

    __slots__ = ("at_ms", "balance")

    def __init__(self, now_ms: int) -> None:
        self.balance = 0
        self.at_ms = now_ms


class WriteRate:
    """The reserve, and who shares the rate."""

    def __init__(self) -> None:
        self.reserve = 0
        self.n_domains = 0

    def join(self, now_ms: int) -> Credit:
        """A domain that is new. It starts with a burst as far as the reserve may be overdrawn."""
        credit = Credit(now_ms)
        self.n_domains += 1
        credit.balance = max(0, min(self.reserve + N_NEW_DOMAINS * DOMAIN_BURST, DOMAIN_BURST))
        self.reserve -= credit.balance
        return credit

    def leave(self, credit: Credit) -> None:
        """A domain that is gone; what it had goes to the reserve, up to one burst there."""
        self.n_domains -= 1
        given = max(0, min(credit.balance, DOMAIN_BURST - self.reserve))
        self.reserve += given

    def update(self, credit: Credit, now_ms: int) -> None:
        """Add what has come since it last grew; settle with the reserve."""
        passed_ms = min(now_ms - credit.at_ms, _LONGEST_MS)
        grown = passed_ms * RATE_PER_S // (1000 * self.n_domains)
        if grown:  # else look again later, or looking often would let nothing come
            credit.balance += grown
            credit.at_ms = now_ms
        if credit.balance < 0 < self.reserve:
            helped = min(self.reserve, -credit.balance)
            self.reserve -= helped
            credit.balance += helped
        surplus = credit.balance - DOMAIN_BURST
        if surplus > 0:
            credit.balance = DOMAIN_BURST
            self.reserve += max(0, min(surplus, RESERVE_MAX - self.reserve))

    def spend(self, credit: Credit, now_ms: int) -> None:
        """Pay for one write."""
        self.update(credit, now_ms)
        credit.balance -= WRITE

    def wait_ms(self, credit: Credit) -> int:
        """How long after it last grew a domain in debt is out of it, if nobody helps; 0 if it is not in debt."""
        debt = max(0, -credit.balance)
        return -(-debt * 1000 * self.n_domains // RATE_PER_S)
