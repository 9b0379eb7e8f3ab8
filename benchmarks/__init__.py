# SPDX-License-Identifier: MIT
"""Benchmarks: one question a file, asked by `python -m benchmarks`.

Before you read a number: on virtual machines the distance between the two CPUs moves results 5- to 30-fold within
seconds, so nothing here is compared across runs. Both sides of a comparison run in turn, close together, each sample is
tagged with the round trip of a cache line at that moment, and only samples of one class are compared. Where the machine
did not hold still the verdict is "inconclusive". Nothing fails on a time.

`python -m benchmarks.xenstore` compares xenstore daemons at length; `python -m benchmarks xenstore` in short.

A file with a `QUESTION` (one line) and `ask(bench: Bench) -> Iterable[Answer]` is found by itself.
"""
