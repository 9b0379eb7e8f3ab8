# SPDX-License-Identifier: MIT
"""Xen's paravirtual split drivers between ordinary Linux processes."""

__version__ = "0.1.0"
