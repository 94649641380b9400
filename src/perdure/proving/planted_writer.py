"""The writer with a planted bug: `python -m perdure.proving.planted_writer PLANT ARGUMENTS`."""

from __future__ import annotations

import sys

from perdure.proving import writer
from perdure.proving.planted import PLANTS

if __name__ == "__main__":
    plant, *arguments = sys.argv[1:]
    PLANTS[plant].patch()
    writer.main(arguments)
