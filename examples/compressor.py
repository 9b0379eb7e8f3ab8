# SPDX-License-Identifier: MIT
"""A whole new device class: a compressor that works in place on pages its guest grants.

Run it for a host, a guest and its device in one process. As daemons, from this directory:

    paravirt up --device compressor:ZipBack &
    paravirt domain create guest
    paravirt device attach guest vzip level=9
    paravirt run guest -- python3 compressor.py guest
"""

import asyncio
import errno
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import paravirt
from paravirt import DeviceBackend, DeviceFrontend, DeviceProtocol
from paravirt.backend.driver import Request
from paravirt.errors import InvalidRequest
from paravirt.protocol.device import U8, U32

COMPRESS, EXPAND = 0, 1
PAGES = 16


@dataclass(frozen=True)
class Config:  # what the toolstack says to the backend
    level: int = 6


@dataclass(frozen=True)
class Offer:  # what the backend says to the frontend
    max_bytes: int


@dataclass
class Ask:
    operation: U8
    length: U32


@dataclass
class Answer:
    length: U32


VZIP = DeviceProtocol("vzip", request=Ask, response=Answer, pages=PAGES, config=Config, offer=Offer)


class ZipBack(DeviceBackend):
    protocol = VZIP

    def open(self) -> Offer:
        if not 0 <= self.config.level <= 9:
            raise InvalidRequest(f"level is {self.config.level}, not 0 to 9")
        self.pool = ThreadPoolExecutor(2)
        return Offer(max_bytes=PAGES * 4096)

    def answer(self, request: Request) -> None:
        self.pool.submit(request.defer().finish, self.work)  # answered later, from a thread of the pool

    def work(self, request: Request) -> Answer:
        ask, pages = request.message, request.pages()  # the guest's own memory
        if ask.length > len(pages) or ask.operation not in (COMPRESS, EXPAND):
            raise InvalidRequest("more bytes than pages, or no such operation")
        data = bytes(pages[: ask.length])  # a copy: the guest may change its pages at any time
        if ask.operation == COMPRESS:
            done = zlib.compress(data, self.config.level)
        else:
            try:
                done = zlib.decompressobj().decompress(data, len(pages) + 1)
            except zlib.error as error:
                raise InvalidRequest(str(error)) from error  # EINVAL for the guest; any other error is ours: EIO
        if len(done) > len(pages):
            raise OSError(errno.ENOSPC, "the result does not fit")
        pages[: len(done)] = done
        return Answer(length=len(done))

    def close(self) -> None:
        self.pool.shutdown()


class ZipFront(DeviceFrontend):
    protocol = VZIP

    def compress(self, data: bytes) -> bytes:
        with self.buffer(self.offer.max_bytes) as buffer:
            buffer.write(data)
            done = self.call(Ask(COMPRESS, len(data)), buffer=buffer)
            return buffer.read(done.length)

    async def expand(self, data: bytes) -> bytes:
        with self.buffer(self.offer.max_bytes) as buffer:
            buffer.write(data)
            done = await self.send(Ask(EXPAND, len(data)), buffer=buffer)
            return buffer.read(done.length)


def use(domain: paravirt.Domain) -> None:
    texts = [bytes(f"{i} green bottles, ", "ascii") * 1000 for i in range(8)]

    async def expand_all(device: ZipFront, packed: list[bytes]) -> list[bytes]:
        return await asyncio.gather(*(device.expand(each) for each in packed))

    with domain.open(ZipFront) as device:
        packed = [device.compress(text) for text in texts]
        assert asyncio.run(expand_all(device, packed)) == texts
        print(f"{sum(map(len, texts))} bytes were {sum(map(len, packed))} on the way; {device}")
        print(device.statistics())


def main() -> None:
    if sys.argv[1:] == ["guest"]:
        with paravirt.Domain.from_environment() as domain:
            use(domain)
        return
    with paravirt.Host() as host:
        domain = host.create_domain("guest")
        host.attach(domain, ZipBack, level=9)
        use(domain)


if __name__ == "__main__":
    main()
