# SPDX-License-Identifier: MIT
"""What Dom0's tools make of live rings: views, verdicts, recordings and their replay."""
