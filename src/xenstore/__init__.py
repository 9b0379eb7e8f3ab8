# SPDX-License-Identifier: MIT
"""The xenstore daemon, its client, and the handling of xenbus keys.

Pure parts, from the bottom up: `wire` (packets), `paths`, `permissions`, `limits`, `store` and `transaction` (the tree
and its views), `tree` (what a request does to a view), `watches`, `domains`, `requests` (the operations), `session`
(one connection), `hub` (what all connections share). Thin shells around them: `server`, `links`, `guests` and `client`.
"""
