# SPDX-License-Identifier: MIT
"""The pure layers, which do not import the core, use the numbers and layouts of its headers."""

from enum import IntEnum

import numpy as np
import pytest

from paravirt.hypervisor import arenas, rules
from paravirt.hypervisor.domains import SHUTDOWN_NONE, DomainState
from paravirt.hypervisor.events import VIRQ_DOM_EXC, PortState
from paravirt.protocol import blkif
from paravirt.ring._core import ffi, lib


@pytest.mark.parametrize(
    ("values", "prefix"),
    [
        (DomainState, "PV_DOMAIN_"),
        (PortState, "PV_EVTCHN_"),
        ([member for member in blkif.Operation if member is not blkif.Operation.RESERVED], "PV_BLKIF_OP_"),
        (blkif.Status, "PV_BLKIF_RSP_"),
    ],
    ids=["domains", "ports", "blkif operations", "blkif statuses"],
)
def test_enumerations(values: list[IntEnum], prefix: str) -> None:
    known = {name.removeprefix(prefix): getattr(lib, name) for name in dir(lib) if name.startswith(prefix)}
    assert {member.name: member.value for member in values} == known


def test_constants() -> None:
    assert lib.PV_SHUTDOWN_NONE == SHUTDOWN_NONE
    assert lib.PV_VIRQ_DOM_EXC == VIRQ_DOM_EXC
    assert (rules.DOMID_SELF, rules.DOMID_XEN) == (lib.PV_DOMID_SELF, lib.PV_DOMID_XEN)
    assert rules.MAX_SLOTS == lib.PV_INBOX_SLOTS
    assert (arenas.NOTIFY_CLEAR_BYTE, arenas.NOTIFY_SEND_EVENT) == (lib.PV_NOTIFY_CLEAR_BYTE, lib.PV_NOTIFY_SEND_EVENT)
    assert blkif.MAX_SEGMENTS == lib.PV_BLKIF_MAX_SEGMENTS


@pytest.mark.parametrize(
    ("dtype", "struct"),
    [
        (blkif.SEGMENT, "struct pv_blkif_segment"),
        (blkif.REQUEST, "struct pv_blkif_request"),
        (blkif.RESPONSE, "struct pv_blkif_response"),
    ],
)
def test_layouts(dtype: "np.dtype[np.void]", struct: str) -> None:
    fields = dict(ffi.typeof(struct).fields)
    assert dtype.itemsize == ffi.sizeof(struct)
    assert dtype.fields is not None
    for name, (kind, offset) in ((name, field[:2]) for name, field in dtype.fields.items()):
        assert (offset, kind.itemsize) == (fields[name].offset, ffi.sizeof(fields[name].type)), name
