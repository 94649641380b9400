"""`make recording`: run the demo and put what it printed on the README's first screen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- recorded by `make recording` -->\n", "<!-- end of the recording -->\n"


def main() -> None:
    command = (sys.executable, "-m", "perdure.frontends.cli.main", "demo")
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        sys.exit(f"{README.name} does not hold the lines between which the recording stands.")
    screen = f"```text\n$ make demo\n{printed.strip()}\n```\n"
    README.write_text(f"{before}{BEGIN}{screen}{END}{after}")


if __name__ == "__main__":
    main()
