# SPDX-License-Identifier: MIT
"""Disks on top of another disk."""
