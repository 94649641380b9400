"""A looker for which looking needs the right to write: `python wrong_looker.py URL WRITERS`."""

from __future__ import annotations

import sys

from perdure.core import disk
from perdure.proving import looker

if __name__ == "__main__":
    disk.READ_ONLY = set()
    looker.main(sys.argv[1:])
