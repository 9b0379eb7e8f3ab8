# SPDX-License-Identifier: MIT
"""What a toolstack does for a domain: create, find by name, destroy.

A domain is an entry of the hypervisor and a home in xenstore. Source: Xen docs/misc/xenstore-paths.pandoc for the home.
"""

from paravirt.errors import InvalidRequest, NotFound, XenstoreError
from paravirt.host import device
from paravirt.hypervisor.client import DomainInfo, DomainState, Hypervisor
from paravirt.xenstore import xenbus
from paravirt.xenstore.client import Transaction, XenstoreClient

MAX_NAME = 63


def create(
    hypervisor: Hypervisor, store: XenstoreClient, name: str, *, isolated: bool = True, max_pages: int | None = None
) -> DomainInfo:
    """A new domain, ready for devices and processes. `AlreadyExists` for a name in use, `InvalidRequest` for a bad
    one.
    """
    if not name or len(name) > MAX_NAME or not all(c.isascii() and (c.isalnum() or c in "-_.") for c in name):
        raise InvalidRequest(f"domain name {name!r} is not 1 to {MAX_NAME} letters, digits, '-', '_' or '.'")
    if name.isdigit():
        raise InvalidRequest(f"domain name {name!r} would be taken for a domid")
    domain = hypervisor.create_domain(name, isolated=isolated, max_pages=max_pages)
    try:
        store.transact(lambda transaction: _make_home(transaction, domain))
    except BaseException:
        hypervisor.destroy_domain(domain.domid)
        raise
    return domain


def find(hypervisor: Hypervisor, name_or_domid: str, *, or_dom0: bool = False) -> DomainInfo:
    """The living domain of that name or number; `NotFound`. `or_dom0`: for what only looks, and may look at Dom0."""
    for domain in hypervisor.list_domains():
        alive = domain.state is not DomainState.DYING
        if alive and (domain.domid != 0 or or_dom0) and name_or_domid in (domain.name, str(domain.domid)):
            return domain
    raise NotFound(f"there is no domain {name_or_domid}")


def destroy(hypervisor: Hypervisor, store: XenstoreClient, domid: int) -> None:
    """End a domain: its init is killed, its devices are torn down, its home is removed. `NotFound`."""
    hypervisor.destroy_domain(domid)
    tidy(store, domid)


def tidy(store: XenstoreClient, domid: int) -> None:
    """Remove what a domain that has ended leaves in xenstore."""
    xenbus.remove(store, f"/local/domain/{domid}")
    # Its backends see the home gone and remove their side; whatever no backend serves is removed here.
    for path in device.paths(store, domid=domid):
        if device.state_name(store, path.backend) in ("initialising", "closed"):
            try:
                device.detach(store, path, name=f"{path.kind} {path.device_id}", timeout_s=0)
            except (NotFound, XenstoreError):
                continue


def _make_home(transaction: Transaction, domain: DomainInfo) -> None:
    guest = domain.domid
    home = f"/local/domain/{guest}"
    transaction.mkdir(home)
    transaction.set_perms(home, [f"n{guest}"])
    # Its name and number are Dom0's to say; the guest may read them.
    for name, value in (("name", domain.name), ("domid", str(guest))):
        transaction.write(f"{home}/{name}", value)
        transaction.set_perms(f"{home}/{name}", ["n0", f"r{guest}"])
    for directory in ("device", "control", "data"):
        transaction.mkdir(f"{home}/{directory}")
        transaction.set_perms(f"{home}/{directory}", [f"n{guest}"])
