# SPDX-License-Identifier: MIT
"""The calls of `calls` as coroutines."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TypeVar

from paravirt.xenstore import operations
from paravirt.xenstore.operations import Call, Steps
from paravirt.xenstore.wire import Op

T = TypeVar("T")


class AsyncStoreCalls(ABC):
    """Reading and changing the tree; every call means, and raises, what the one of `StoreCalls` does."""

    @abstractmethod
    async def request(self, op: Op, payload: bytes, what: str = "") -> bytes:
        """One request and its reply's payload; `what` names it in errors."""

    async def call(self, call: Call[T]) -> T:
        """Make a call of `operations`."""
        return call.decode(await self.request(call.op, call.payload, call.what))

    async def take_steps(self, steps: Steps[T]) -> T:
        """Make calls of `operations` that depend on each other."""
        try:
            call = next(steps)
            while True:
                try:
                    reply = await self.request(call.op, call.payload, call.what)
                except Exception as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(reply)
        except StopIteration as end:
            value: T = end.value
            return value

    async def read(self, path: str) -> bytes:
        return await self.call(operations.read(path))

    async def read_text(self, path: str) -> str:
        return await self.call(operations.read_text(path))

    async def write(self, path: str, value: str | bytes) -> None:
        await self.call(operations.write(path, value))

    async def mkdir(self, path: str) -> None:
        await self.call(operations.mkdir(path))

    async def rm(self, path: str) -> None:
        await self.call(operations.rm(path))

    async def ls(self, path: str) -> list[str]:
        return await self.take_steps(operations.ls(path))

    async def exists(self, path: str) -> bool:
        return await self.take_steps(operations.exists(path))

    async def get_perms(self, path: str) -> list[str]:
        return await self.call(operations.get_perms(path))

    async def set_perms(self, path: str, permissions: Iterable[str]) -> None:
        await self.call(operations.set_perms(path, permissions))


class AsyncDomainCalls(AsyncStoreCalls):
    """Calls about domains and the daemon itself, as `DomainCalls`."""

    async def get_domain_path(self, domid: int) -> str:
        return await self.call(operations.get_domain_path(domid))

    async def introduce(self, domid: int, gfn: int, port: int) -> None:
        await self.call(operations.introduce(domid, gfn, port))

    async def release(self, domid: int) -> None:
        await self.call(operations.release(domid))

    async def resume(self, domid: int) -> None:
        await self.call(operations.resume(domid))

    async def set_target(self, domid: int, target: int) -> None:
        await self.call(operations.set_target(domid, target))

    async def is_domain_introduced(self, domid: int) -> bool:
        return await self.call(operations.is_domain_introduced(domid))

    async def get_feature(self, domid: int | None = None) -> int:
        return await self.call(operations.get_feature(domid))

    async def set_feature(self, domid: int, features: int) -> None:
        await self.call(operations.set_feature(domid, features))

    async def get_quota(self, name: str, domid: int | None = None) -> int:
        return await self.call(operations.get_quota(name, domid))

    async def set_quota(self, name: str, value: int, domid: int | None = None) -> None:
        await self.call(operations.set_quota(name, value, domid))

    async def quota_names(self) -> list[str]:
        return await self.call(operations.quota_names())

    async def control(self, *words: str) -> str:
        return await self.call(operations.control(words))
