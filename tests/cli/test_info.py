# SPDX-License-Identifier: MIT
"""`info` says what is claimed, in shared mode that nothing is, and what the kernel gives."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paravirt.host import kernel
from tests.cli.test_main import paravirt


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = str(tmp_path_factory.mktemp("run"))
    return json.loads(paravirt("--host", "one", "--run", run, "info", "--json").stdout)


def test_the_host(answer: Any) -> None:
    assert answer["host"]["name"] == "one"
    assert answer["host"]["running"] is False
    assert answer["host"]["domains"] == []


def test_shared_mode_claims_nothing(answer: Any) -> None:
    claims = {level["level"]: level["claim"] for level in answer["isolation"]}
    assert claims["shared"].startswith("NO isolation claim is made")
    assert "NO isolation claim is made" in paravirt("info").stdout


def test_every_probe_has_a_name_and_a_detail(answer: Any) -> None:
    names = [offer["name"] for offer in answer["kernel"]]
    assert len(set(names)) == len(names)
    assert {"namespaces", "memfd memory", "posix memory", "/dev/shm", "membarrier", "io_uring", "cores"} <= set(names)
    assert all(offer["detail"] for offer in answer["kernel"])


def test_what_the_kernel_refuses_is_named(short_path: Path) -> None:
    """In a user namespace whose limit of further ones is 0."""
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -m paravirt --run "$1" info --json'
    if kernel.can_isolate() is not None:
        pytest.skip("the kernel gives no user namespaces to try this in")
    done = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", script, sys.executable, str(short_path / "run")],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    answer = json.loads(done.stdout)
    namespaces = next(offer for offer in answer["kernel"] if offer["name"] == "namespaces")
    assert namespaces["offered"] is False
    assert "only shared domains (--shared), no isolation" in namespaces["detail"]
    isolated = next(level for level in answer["isolation"] if level["level"] == "isolated")
    assert isolated["possible"] is False
    assert isolated["claim"].startswith("not possible here")


def test_probing_leaves_nothing() -> None:
    before = os.listdir("/proc/self/fd"), os.listdir("/dev/shm")
    kernel.probe()
    assert (os.listdir("/proc/self/fd"), os.listdir("/dev/shm")) == before


def test_a_refused_memory_provider_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("paravirt.ring.memory.create_object", refuse)
    offers = {offer.name: offer for offer in kernel.probe()}
    assert offers["posix memory"].offered is False
    assert offers["posix memory"].detail == "Permission denied: sealed memfd serves instead"
