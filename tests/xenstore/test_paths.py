# SPDX-License-Identifier: MIT
"""What a path may look like."""

import pytest

from paravirt.xenstore.paths import canonical, child_of, parent_of, quota_length, split

HOME = b"/local/domain/5"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"/", b"/"),
        (b"/a", b"/a"),
        (b"/a/B-9_@z", b"/a/B-9_@z"),
        (b"a", b"/local/domain/5/a"),
        (b"a/b@c", b"/local/domain/5/a/b@c"),
        (b"/@x", b"/@x"),
        (b"", None),
        (b"a/", None),
        (b"/a/", None),
        (b"//", None),
        (b"/a//b", None),
        (b"a//b", None),
        (b"/a b", None),
        (b"/a.b", None),
        (b"/\xe4", None),
        (b"/a\n", None),
        (b"@releaseDomain", None),
        (b"/local/domain/", None),
        (b"/" + b"x" * 3071, b"/" + b"x" * 3071),
        (b"/" + b"x" * 3072, None),
        (b"y" * 2048, HOME + b"/" + b"y" * 2048),
        (b"y" * 2049, None),
    ],
)
def test_canonical(path: bytes, expected: bytes | None) -> None:
    assert canonical(path, HOME) == expected


@pytest.mark.parametrize(
    ("path", "n_bytes"),
    [(b"/abc", 4), (b"/local/domain/5/abc", 3), (b"/local/domain/5", 15), (b"/local/domain/123456/a", 22)],
)
def test_only_the_part_below_a_home_counts_against_the_quota(path: bytes, n_bytes: int) -> None:
    assert quota_length(path) == n_bytes


def test_up_and_down() -> None:
    assert parent_of(b"/a/b") == b"/a"
    assert parent_of(b"/a") == parent_of(b"/") == b"/"
    assert child_of(b"/", b"a") == b"/a"
    assert child_of(b"/a", b"b") == b"/a/b"
    assert split(b"/a") == (b"/", b"a")
    assert split(b"/a/b") == (b"/a", b"b")
