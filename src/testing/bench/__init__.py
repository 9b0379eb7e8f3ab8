# SPDX-License-Identifier: MIT
"""Measuring rings, and what to measure them against."""
