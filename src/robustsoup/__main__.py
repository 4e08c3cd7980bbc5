"""`python -m robustsoup` is the `robustsoup` command.

Python puts the current folder first on the import path then. As with the command, that folder is
taken off again before anything else is imported, so that a `json.py` in it does not run.
"""

import os
import sys
from contextlib import suppress

with suppress(OSError):  # the current folder was removed, and is not on the path
    if sys.path[0] == os.getcwd():  # noqa: PTH109 - pathlib is not imported yet
        del sys.path[0]

from robustsoup.cli import main

main()
