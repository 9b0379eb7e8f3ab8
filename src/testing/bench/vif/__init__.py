# SPDX-License-Identifier: MIT
"""Network devices, measured: ours and their peers."""
