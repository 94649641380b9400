"""The demo is what it says: a real kill, and a sentence that is read to its end."""

from __future__ import annotations

import re
import subprocess
import sys


# proves R5
def test_the_demo_kills_a_server_and_reads_the_sentence_to_its_end() -> None:
    command = (sys.executable, "-m", "perdure.frontends.cli.main", "demo")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    killed, *pids = re.findall(r"(?:kill -9|process) (\d+)", done.stdout)
    assert killed in pids
    assert "1 requeued" in done.stdout
    assert "without a hole" in done.stdout
    assert done.stdout.rstrip().endswith("the answer is whole")
