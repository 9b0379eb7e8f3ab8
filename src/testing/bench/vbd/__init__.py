# SPDX-License-Identifier: MIT
"""Block devices, measured in turn with others that move the same blocks; see docs/benchmarks.md."""
