"""Start an installed `perdure serve`, see it ready, stop it with SIGTERM, demand exit code 0.

Uses the standard library alone: it runs in the clean environment that holds nothing but the wheel.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

READY_S = 30
STOP_S = 30


def main(perdure: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as data:
        command = [perdure, "serve", "--data", data, "--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen(command)
        try:
            wait_ready(server, f"http://127.0.0.1:{port}/readyz")
            server.send_signal(signal.SIGTERM)
            code = server.wait(STOP_S)
        finally:
            if server.poll() is None:
                server.kill()
                server.wait()
    if code != 0:
        sys.exit(f"perdure serve ended with code {code} after SIGTERM, not 0.")
    print("perdure serve: ready, then stopped with code 0.")


def wait_ready(server: subprocess.Popen[bytes], url: str) -> None:
    deadline_s = time.monotonic() + READY_S
    seen = "no answer"
    while time.monotonic() < deadline_s:
        if server.poll() is not None:
            sys.exit(f"perdure serve ended with code {server.returncode} before it was ready.")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                print(f"{url}: {answer.status} {answer.read().decode()}")
                return
        except urllib.error.HTTPError as error:
            seen = f"{error.code} {error.read().decode()}"
        except OSError as error:
            seen = str(error)
        time.sleep(0.1)
    sys.exit(f"perdure serve was not ready after {READY_S} s; the last answer: {seen}")


if __name__ == "__main__":
    main(sys.argv[1])
