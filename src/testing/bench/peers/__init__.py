# SPDX-License-Identifier: MIT
"""What else moves messages between two processes: programs that all take the same arguments."""
