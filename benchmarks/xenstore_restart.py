# SPDX-License-Identifier: MIT
"""How long xenstored takes to serve again after kill -9, by the number of nodes in its journal.

    python -m benchmarks.xenstore_restart [NODES ...]

Prints a line for each: seconds from the start of the process to the first answer, with and without those of the
interpreter (the same daemon with an empty journal).
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from paravirt.xenstore.client import XenstoreClient

ROUNDS = 5
CHILDREN = 100


def start(place: Path) -> tuple["subprocess.Popen[str]", float]:
    """A daemon that has answered, and the seconds until then."""
    begin = time.perf_counter()
    command = [sys.executable, "-P", "-m", "paravirt", "--run", str(place / "run"), "xenstored"]
    command += ["--socket", str(place / "s"), "--journal", str(place / "journal")]
    daemon = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    if not daemon.stdout.readline():
        sys.exit("xenstored does not start")
    with XenstoreClient.connect(place / "s") as client:
        client.ls("/")
    return daemon, time.perf_counter() - begin


def kill(daemon: "subprocess.Popen[str]") -> None:
    daemon.kill()
    daemon.communicate()


def measure(n_nodes: int) -> tuple[float, int]:
    """(median seconds, bytes of the journal) with so many nodes."""
    with tempfile.TemporaryDirectory(prefix="pv") as directory:
        place = Path(directory)
        daemon, _ = start(place)
        with XenstoreClient.connect(place / "s") as client:
            for i in range(n_nodes // (CHILDREN + 1)):
                with client.pipeline() as pipeline:
                    for k in range(CHILDREN):
                        pipeline.write(f"/tree/{i}/{k}", "12345678")
        kill(daemon)
        n_bytes = (place / "journal" / "journal").stat().st_size
        times = []
        for _ in range(ROUNDS):
            daemon, seconds = start(place)
            kill(daemon)
            times.append(seconds)
        return statistics.median(times), n_bytes


def main() -> None:
    empty, _ = measure(0)
    print(f"        0 nodes: {empty:.3f} s")
    for n_nodes in [int(word) for word in sys.argv[1:]] or [10_000, 100_000]:
        seconds, n_bytes = measure(n_nodes)
        print(f"{n_nodes:9} nodes: {seconds:.3f} s, {seconds - empty:.3f} s of it for {n_bytes >> 10} KiB of journal")


if __name__ == "__main__":
    main()
