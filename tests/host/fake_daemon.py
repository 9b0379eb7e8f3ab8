# SPDX-License-Identifier: MIT
"""A daemon for the supervisor's tests: `python fake_daemon.py NAME LOG [fail STATUS | mute | stubborn]`.

It writes lines to LOG: what it sees of itself when it starts, and its name when it is told to stop.
"""

import os
import resource
import signal
import sys
import threading

from paravirt.host.daemon import become_daemon, serve


class Service:
    def __init__(self, name: str, log: str, *, stubborn: bool) -> None:
        self._name, self._log, self._stubborn = name, log, stubborn
        self._stopped = threading.Event()

    def say(self, text: str) -> None:
        fd = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(fd, f"{self._name} {text}\n".encode())
        os.close(fd)

    def serve_forever(self) -> None:
        self._stopped.wait()

    def stop(self) -> None:
        self.say("stop")
        if not self._stubborn:
            self._stopped.set()


def main() -> None:
    name, log, *behaviour = sys.argv[1:]
    service = Service(name, log, stubborn=behaviour == ["stubborn"])
    request = become_daemon()
    if behaviour[:1] == ["fail"]:
        sys.exit(int(behaviour[1]))
    if behaviour == ["mute"]:
        signal.pause()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    service.say(f"start pid={os.getpid()} session={os.getsid(0)} limit={soft == hard}")
    serve(service, request)


main()
