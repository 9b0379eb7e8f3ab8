# SPDX-License-Identifier: MIT
"""The frontend's half of blkif in C: slots, their grants, and the shadow of what is in flight.

A slot is a place for one request with eleven pages of its own; a larger request borrows those of other slots. Source:
Xen public/io/blkif.h.
"""

import errno
import struct
from typing import Any

import numpy as np

from paravirt.errors import InvalidRequest, PeerError
from paravirt.ring._core import ffi, lib
from paravirt.ring.blkif import RESPONSE_BYTES, bytes_of
from paravirt.ring.blkif_counters import Counting
from paravirt.ring.event import WaitResult
from paravirt.ring.grant import Granter
from paravirt.ring.shared import FrontRing

CData = Any

SLOT_PAGES = lib.PV_BLKIF_MAX_SEGMENTS

_ASK = struct.Struct("<QQQIIII")  # struct pv_blkfront_ask: offset, data, length, operation, flag, gref, first sector
_VIOLATIONS = {
    lib.PV_BLKFRONT_UNKNOWN_ID: "request {0}, which is not in flight",
    lib.PV_BLKFRONT_WRONG_OPERATION: "request {0} with operation {1}, which is not what was asked",
    lib.PV_BLKFRONT_UNKNOWN_STATUS: "request {0} with status {2}",
}
_issue, _exchange, _complete = lib.pv_blkfront_issue, lib.pv_blkfront_exchange, lib.pv_blkfront_complete


def slots_of(n_bytes: int) -> int:
    """Slots that a request of so many bytes takes."""
    n: int = lib.pv_blkfront_slots_of(n_bytes)
    return n


class Slots:
    """The slots of one disk. The caller's lock guards it, but for `watch`."""

    def __init__(self, granter: Granter, pages: CData, first_gref: int, n_slots: int, backend_domid: int) -> None:
        """`pages`: a C pointer to `n_slots` times eleven zeroed pages, which begin at `first_gref` of `granter`."""
        self._granter = granter
        self._arrays = {
            "shadow": ffi.new("struct pv_blkif_request[]", n_slots),
            "batch": ffi.new("struct pv_blkif_request[]", n_slots),
            "slots": ffi.new("struct pv_blkfront_slot[]", n_slots),
            "free": ffi.new("uint32_t[]", n_slots),
            "held": ffi.new("uint32_t[]", n_slots),
        }
        self._core: CData = ffi.new("struct pv_blkfront *")
        self._core.granter, self._core.pages = granter.core, pages
        self._core.first_gref, self._core.n_slots, self._core.backend = first_gref, n_slots, backend_domid
        for name, array in self._arrays.items():
            setattr(self._core, name, array)
        lib.pv_blkfront_init(self._core)
        self._counting = Counting(self._core)
        self._asks = ffi.new("struct pv_blkfront_ask[]", n_slots)
        self._asks_view = bytes_of(self._asks).data
        self._chosen = ffi.new("uint32_t[]", n_slots)
        # An array, because a ring remembers the addresses of arrays.
        self._responses = np.zeros(n_slots * RESPONSE_BYTES, np.uint8)
        self._responses_core = ffi.cast("struct pv_blkif_response *", ffi.from_buffer(self._responses))
        self._answers = ffi.new("struct pv_blkfront_answer[]", n_slots)
        self.taken = 0  # by `watch`, for `complete`

    @property
    def core(self) -> CData:
        """`struct pv_blkfront *`."""
        return self._core

    @property
    def counters(self) -> CData:
        """`struct pv_blkif_counters *`: what was answered, on all rings."""
        return self._counting.core

    def count_in(self, ring: FrontRing | None) -> None:
        """Count where Dom0 sees it, with `ring`, until that is closed; None: privately."""
        self._counting.show_in(ring)

    @property
    def n_slots(self) -> int:
        n_slots: int = self._core.n_slots
        return n_slots

    @property
    def free(self) -> int:
        """Slots that can be used now."""
        free: int = self._core.n_free
        return free

    @property
    def in_flight(self) -> int:
        in_flight: int = self._core.n_in_flight
        return in_flight

    @property
    def held(self) -> int:
        """Slots out of use because the backend keeps a page of an answered request."""
        held: int = self._core.n_held
        return held

    def persist(self, persistent: bool) -> None:
        """From now on pages stay granted when a request is answered, or no longer. For each new backend, before
        `reissue`.
        """
        lib.pv_blkfront_persist(self._core, persistent)

    def purge(self) -> int:
        """Take back the persistent grants that neither a request nor the backend uses; how many. `complete` does it
        every ten seconds.
        """
        purged: int = lib.pv_blkfront_purge(self._core)
        return purged

    def reclaim(self) -> int:
        """Look again at what is `held`; how many are `free` then. Nothing tells when a backend lets go of a page."""
        free: int = lib.pv_blkfront_reclaim(self._core)
        return free

    def ask(self, i: int, operation: int, offset: int, length: int, data: int = 0, flag: int = 0) -> None:
        """Prepare the `i`th request of the next `issue`: bytes on the disk, the address of what a write writes, and a
        discard's flag.
        """
        _ASK.pack_into(self._asks_view, i * _ASK.size, offset, data, length, operation, flag, 0, 0)

    def gather(self, slot: int, into: CData, n_bytes: int) -> None:
        """Copy out the first bytes of an answered read, before anything else is issued."""
        lib.pv_blkfront_gather(self._core, slot, into, n_bytes)

    def issue(self, ring: FrontRing, n: int) -> CData:
        """Send the first `n` prepared requests, which take at most `free` slots; a C array with the slot of each."""
        status = _issue(self._core, ring.core, self._asks, n, self._chosen)
        if status != n:
            self._settle(ring, status)
        return self._chosen

    def exchange(self, ring: FrontRing, spin_ns: int) -> tuple[int, int | None]:
        """With nothing in flight: send the first prepared request and spin for its answer; (slot, status or None).

        None: it is in flight. `PeerError` when the answer matches no request.
        """
        result = _exchange(self._core, ring.core, self._asks, spin_ns, self._chosen, self._answers)
        if result == lib.PV_BLKFRONT_ANSWERED:
            return self._chosen[0], self._answers[0].status
        if result == lib.PV_BLKFRONT_WRONG:
            raise self.wrong()
        if result:
            self._settle(ring, result)
        return self._chosen[0], None

    def reissue(self, ring: FrontRing) -> int:
        """Send what is in flight once more, oldest first, on a new ring; how many that are."""
        status: int = lib.pv_blkfront_reissue(self._core, ring.core)
        return self._settle(ring, status)

    def watch(self, ring: FrontRing, spin_ns: int, timeout_s: float | None) -> None:
        """Take responses for `complete`, after waiting for one; none when the wait ended for another reason.

        To be called *without* the lock, by one thread at a time. What was taken counts also when a signal handler
        raises.
        """
        core = ring.core
        before = core.consumed
        try:
            if not ring.take(self._responses, spin_ns=spin_ns) and ring.wait(timeout_s=timeout_s) is WaitResult.EVENT:
                ring.take(self._responses)
        finally:
            self.taken = core.consumed - before

    def complete(self) -> tuple[list[tuple[int, int]], PeerError | None]:
        """(slot, status) of each of the responses that `watch` took, up to the first that matches no request.

        That one is the `PeerError`.
        """
        n, self.taken = self.taken, 0
        right = _complete(self._core, self._responses_core, n, self._answers)
        answers = self._answers
        done = [(answers[i].slot, answers[i].status) for i in range(right)]
        if right == n:
            return done, None
        return done, self.wrong()

    def wrong(self) -> PeerError:
        """How an answer was wrong that C has found so."""
        wrong = self._core.wrong
        text = _VIOLATIONS[self._core.violation].format(wrong.id, wrong.operation, wrong.status)
        return PeerError(f"the backend answered {text}")

    def _settle(self, ring: FrontRing, status: int) -> int:
        if status in (-errno.ENOSPC, -errno.EBUSY, -errno.EINVAL, -errno.ENOMEM):
            raise InvalidRequest(f"the requests could not be issued: {errno.errorcode[-status]}")
        return ring.settle_push(status)
