# SPDX-License-Identifier: MIT
"""Write the inputs that the fuzz targets start with: `python -m tests.xenstore.fuzz.make_seeds`.

For the engine they are stories of the tests, as the bytes of their clients; for the others small files in the form
that their comments tell.
"""

import ast
import re
import struct
from pathlib import Path

from paravirt.xenstore.wire import Op, encode

HERE = Path(__file__).parent
STORIES = ("test_stories", "test_watches", "test_advisories", "test_permissions")
STORY_MIN_REQUESTS = 8
SEED_MAX_BYTES = 1400
N_STORIES = 14
CLIENTS = {"0": (0, 1), "1": (2, 3), "2": (4, 5), "3": (6, 6)}


def kinds(target: str) -> dict[str, int]:
    """The steps of a target by name, as its source numbers them."""
    source = (HERE / f"fuzz_{target}.c").read_text()
    match = re.search(r"enum step \{(.*?)\}", source, re.DOTALL)
    assert match
    return {name.strip(): number for number, name in enumerate(match[1].split(",")) if name.strip()}


def stories() -> list[list[tuple[str, bytes]]]:
    """(client, packet) of the requests of stories, with the fuzz target's domains 1 to 3 in place of theirs."""
    found = []
    for name in STORIES:
        tree = ast.parse((HERE.parent / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "> " in node.value:
                text = re.sub(r"(?<!\d)([567])(?!\d)", lambda match: str(int(match[1]) - 4), node.value)
                found.append(requests(text))
    return sorted((story for story in found if len(story) >= STORY_MIN_REQUESTS), key=len)


def requests(story: str) -> list[tuple[str, bytes]]:
    packets = []
    for line in story.splitlines():
        match = re.match(r"\s*(dom[0-3]b?)> (\w+)(?:@(\d+))? ?([^#]*)", line)
        if match and (match[2] in Op.__members__ or match[2].isdigit()):
            op = int(match[2]) if match[2].isdigit() else Op[match[2]]
            payload = match[4].rstrip("\n").rstrip(" ").replace("|", "\0").encode("latin-1")
            packets.append((match[1], encode(op, len(packets), int(match[3] or 0), payload)))
    return packets


def engine_seeds() -> list[bytes]:
    kind = kinds("engine")
    seeds = []
    for story in stories():
        seed = bytes([kind["JOURNAL"]])
        for name, packet in story:
            client = CLIENTS[name[3]][name.endswith("b")]
            seed += bytes([kind["RAW"], client]) + struct.pack("<H", len(packet)) + packet
            seed += bytes([kind["SEND_ALL"], client])
        seed += bytes([kind["SNAPSHOT"], kind["STEP"], 2, kind["ADOPT"], kind["RELOAD"]])
        if len(seed) <= SEED_MAX_BYTES:
            seeds.append(seed)
    return seeds[-N_STORIES:]


def node(path: bytes, value: bytes = b"", owner: int = 0) -> bytes:
    return b"\1" + struct.pack("<HHI", len(path), 1, len(value)) + path + struct.pack("<HH", owner, 3) + value


def journal_seeds() -> list[bytes]:
    removed = b"\2" + struct.pack("<H", 2) + b"/a"
    special = b"\3\1" + struct.pack("<HHH", 1, 5, 1)
    domain = b"\4" + struct.pack("<IBBBB4I10I", 5, 1, 1, 0, 1, 15, 6, 7, 8, *range(10))
    no_target = b"\4" + struct.pack("<IBBBB4I10I", 6, 1, 1, 0, 1, 15, 1 << 20, 7, 8, *range(10))
    quota = b"\5" + struct.pack("<II", 3, 1000)
    generation = b"\6" + struct.pack("<Q", 77)
    frames = [node(b"/") + node(b"/a", b"one") + node(b"/a/b", b"", 5), domain + quota, special + generation, removed]
    journal = b"".join(bytes([len(frame)]) + frame for frame in frames)
    watch = struct.pack("<HHHHi", 2, 1, 0, 0, -1) + b"/at"
    ring = struct.pack("<IiIIIIII", 5, -1, 3, 4, 3, 2, 1, 2) + b"abcde" + watch + struct.pack("<II", 1, 2)
    socket = struct.pack("<IiIIIIII", 0, 9, 4, 1, 18, 0, 0, 0) + encode(Op.READ, 1, 0, b"/\0")
    return [
        b"\1" + journal,
        b"\2" + ring + socket,
        b"\3" + journal + b"\0" + ring,
        b"\0PVXSJRNL\1\0\0\0\0\0\0\0",
        b"\1" + bytes([len(no_target)]) + no_target,
    ]


def ring_seeds() -> list[bytes]:
    kind = kinds("ring")

    def steps(*names: str, guest: int = 0) -> bytes:
        arguments = {"ASK": b"\1", "ASK2": b"\3", "ASK3": b"\4", "TAKE": b"\xff\3", "HOSTILE": b"\6"}
        return b"".join(bytes([kind[name], guest]) + arguments.get(name, b"") for name in names)

    good = steps("ASK2", "POLL", "TAKE", "DOM0", "ASK", "POLL", "TAKE", "ASK3", "POLL", "TAKE")
    hostile = steps("ASK", "HOSTILE", "POLL", "RECONNECT", "POLL", "ASK2", "POLL", guest=1)
    return [good, hostile, good + hostile + steps("FORGET", "STOP"), steps("STOP", "FORGET", "LOOK", "POLL")]


def main() -> None:
    for target, seeds in (("engine", engine_seeds()), ("journal", journal_seeds()), ("ring", ring_seeds())):
        folder = HERE / "seeds" / target
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for number, seed in enumerate(seeds):
            (folder / f"{number:02}").write_bytes(seed)


if __name__ == "__main__":
    main()
