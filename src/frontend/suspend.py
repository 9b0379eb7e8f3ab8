# SPDX-License-Identifier: MIT
"""Suspending a device with its domain, and going on: the same for every class.

Source: Linux' xenbus_probe_frontend.c and xen-blkfront.c: what connects the two ends does not outlive a suspend, so the
frontend makes new rings, says INITIALISING, and gives the backend again what was in flight.
"""

from paravirt.frontend.device import RESUME_TIMEOUT_S, FrontendDevice


class Suspendable:
    """A device that a `FrontendDevice` follows."""

    _device: FrontendDevice

    def suspend(self) -> None:
        """Leave the backend until `resume`: requests that come now wait, those in flight are kept. Harmless when
        repeated. Raises `Closed`, or what ended the device.
        """
        self._device.suspend()

    def resume(self, *, timeout_s: float = RESUME_TIMEOUT_S) -> None:
        """Connect to the backend that is there now and send it what was in flight. Harmless when nothing is suspended.

        Raises as `suspend`; `TimedOut` when the backend does not answer in time: it may still.
        """
        self._device.resume(timeout_s)
