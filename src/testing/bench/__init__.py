# SPDX-License-Identifier: MIT
"""Measuring rings fairly: sides that are measured in turn on the same two CPUs, and a judgement of what was seen.

On virtual machines the distance between two CPUs moves results 5- to 30-fold within seconds, so nothing is compared
across runs: both sides of a comparison run close together, each round is tagged with the round trip of a cache line at
that moment, and only rounds of one class are compared. Where the machine did not hold still, the verdict is
"inconclusive".
"""
