# SPDX-License-Identifier: MIT
"""A store and its clients: calls, a pipeline, transactions, watches, and the same with asyncio."""

import asyncio
import tempfile
from pathlib import Path

from paravirt.errors import NoSuchNode
from paravirt.xenstore import AsyncXenstoreClient, XenstoreClient, XenstoreServer
from paravirt.xenstore.client import Transaction


def calls(store: XenstoreClient) -> None:
    store.write("/tool/example/name", "paravirt")
    print("read:", store.read_text("/tool/example/name"))
    try:
        store.read("/tool/example/nothing")
    except NoSuchNode as error:
        print("refused:", error)
    with store.pipeline() as pipeline:  # a few writes to the socket, however many calls
        for number in range(1000):
            pipeline.write(f"/tool/example/numbers/{number}", str(number))
        numbers = pipeline.ls("/tool/example/numbers")
    print("pipeline:", len(numbers.value), "nodes")


def transactions(store: XenstoreClient) -> None:
    with store.transaction(attempts=5) as transaction:  # all or nothing
        transaction.write("/tool/example/counter", "0")
        transaction.rm("/tool/example/numbers")

    def count_up(transaction: Transaction) -> int:  # runs again when somebody was quicker
        value = int(transaction.read("/tool/example/counter")) + 1
        transaction.write("/tool/example/counter", str(value))
        return value

    print("counter:", store.transact(count_up))


def watches(store: XenstoreClient) -> None:
    with store.watch("/tool/example/state") as events:
        print("first:", next(events).path)  # a new watch fires at once
        store.write("/tool/example/state", "4")
        print("changed:", next(events).path)
    print("state:", store.wait_for("/tool/example/state", lambda value: value == b"4", timeout_s=10))


async def with_asyncio(path: Path) -> None:
    async with AsyncXenstoreClient.connect(path, reconnect=True) as store:
        async with store.transaction() as transaction:
            await transaction.write("/tool/example/name", "asyncio")
        names = await asyncio.gather(*(store.read_text("/tool/example/name") for _ in range(100)))
        print("gathered:", len(names), names[0])
        async with store.watch("/tool/example") as events:
            async for event in events:
                print("event:", event.path)
                if event.path.endswith("/last"):
                    break
                await store.write("/tool/example/last", "1")


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "xenstored.sock"
        with XenstoreServer(path).start(), XenstoreClient.connect(path) as store:
            calls(store)
            transactions(store)
            watches(store)
            asyncio.run(with_asyncio(path))


if __name__ == "__main__":
    main()
