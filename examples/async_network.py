# SPDX-License-Identifier: MIT
"""Clients of a server that answers what it hears, all of them tasks of one event loop."""

import asyncio

import paravirt
from paravirt.frontend.vif import Vif

TYPE = b"\x88\xb5"  # for local experiments
N_CLIENTS = 3
N_QUESTIONS = 5


def frame(to: bytes, source: bytes, text: bytes) -> bytes:
    return (to + source + TYPE + text).ljust(60, b"\0")


async def serve(vif: Vif) -> None:
    async for burst in vif.aio.bursts():
        questions = [
            packet for packet in burst if packet[:6] == vif.mac
        ]  # others come as long as nobody knows whose they are
        await vif.aio.send([frame(packet[6:12], vif.mac, packet[14:].upper()) for packet in questions])


async def ask(vif: Vif, server: bytes, name: str) -> None:
    for i in range(N_QUESTIONS):
        await vif.aio.send([frame(server, vif.mac, f"{name} asks {i}".encode())])
        answer = b""
        async with asyncio.timeout(10.0):
            while answer[:6] != vif.mac:
                (answer,) = await vif.aio.receive(1)
    print("the last answer:", answer[14:].rstrip(b"\0").decode())


async def main() -> None:
    with paravirt.Host() as host:
        vifs = []
        for name in ["server", *(f"client {i}" for i in range(N_CLIENTS))]:
            domain = host.create_domain(name.replace(" ", "-"))
            host.attach_vif(domain)
            vifs.append(await asyncio.to_thread(domain.open_vif))
        server, *clients = vifs
        serving = asyncio.create_task(serve(server))
        await asyncio.gather(*(ask(vif, server.mac, f"client {i}") for i, vif in enumerate(clients)))
        await asyncio.to_thread(server.close)
        await serving
        print(f"the server sent {N_CLIENTS * N_QUESTIONS} answers and has closed")


asyncio.run(main())
