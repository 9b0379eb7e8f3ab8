# SPDX-License-Identifier: MIT
"""A whole host, a domain and its disk in one process."""

import tempfile
from pathlib import Path

import paravirt


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory) / "disk.img"
        with open(image, "wb") as file:
            file.truncate(1 << 20)
        with paravirt.Host() as host:
            domain = host.create_domain("guest")
            host.attach_disk(domain, str(image))
            with domain.open_disk("xvda") as disk:
                disk.pwrite(b"hello".ljust(512, b"\0"), 4096)
                disk.flush()
                print(disk.pread(512, 4096).rstrip(b"\0").decode(), "from", disk)
        print("the file has it too:", image.read_bytes()[4096:4101].decode())


if __name__ == "__main__":
    main()
