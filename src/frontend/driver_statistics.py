# SPDX-License-Identifier: MIT
"""What the frontend of a declared device counts."""

from dataclasses import dataclass

from paravirt.ring.shared import RingStatistics


@dataclass(frozen=True, slots=True)
class FrontendStatistics:
    """Counts since the device was opened."""

    requests: int
    """Handed to the device."""
    responses: int
    errors: int
    """Of the responses: with a status other than 0."""
    in_flight: int
    """Sent, not answered."""
    queued: int
    """Handed over, not sent: the ring is full, or there is none at the moment."""
    granted_pages: int
    """Pages that the backend may use now, those of the ring included."""
    kept_pages: int
    """Times a page could not be taken back after its answer, because the backend still used it."""
    reconnects: int
    """Times a new backend was connected."""
    reissued: int
    """Requests sent again after that."""
    ring: RingStatistics | None
    """Of the present ring; None while there is none."""
