# SPDX-License-Identifier: MIT
"""A guest that uses an echo device until its standard input ends, in batches and in a loop; it says how far it is."""

import asyncio
import sys
import threading

import paravirt
from tests.echo_device import ADD, FILL, EchoFront

PAGE = 4096


async def one_round(device: EchoFront, number: int) -> None:
    answers = await asyncio.gather(*(device.send(operation=ADD, value=number + i) for i in range(20)))
    assert [answer.value for answer in answers] == [number + i + 1 for i in range(20)]


def main() -> None:
    stop = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=listen, daemon=True).start()
    rounds = 0
    with paravirt.Domain.from_environment() as domain, domain.open(EchoFront) as device:
        buffers = [device.buffer(PAGE) for _ in range(4)]
        print("ready", flush=True)
        while not stop.is_set():
            rounds += 1
            asyncio.run(one_round(device, rounds))
            fills = [{"operation": FILL, "value": rounds + i & 255} for i in range(4)]
            assert device.exchange(fills, buffers)["value"].tolist() == [1] * 4
            assert all(buffer.read() == bytes([rounds + i & 255]) * PAGE for i, buffer in enumerate(buffers))
            if rounds % 5 == 0:
                print(rounds, flush=True)
        counts = device.statistics()
        print("done", rounds, counts.reconnects, counts.reissued, flush=True)


if __name__ == "__main__":
    main()
