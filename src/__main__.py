# SPDX-License-Identifier: MIT
"""`python -m paravirt`: the command line."""

from paravirt.cli.main import main

main()
