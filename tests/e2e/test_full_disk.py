"""A disk that is really full, under the real server: a small file system of its own.

The server runs in a mount namespace in which its data lies on a tmpfs of a few megabytes; the test
frees space there through the server's own view of the file system.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from perdure.proving.waiting import wait_until
from tests.e2e.http_server import Server, serving

SMALL = "size=4m"
BALLAST_BYTES = 2 * 1024 * 1024


# proves C10
async def test_a_full_disk_is_refused_by_name_and_writes_resume_by_themselves(
    tmp_path: Path,
) -> None:
    assert shutil.which("unshare"), "unshare is part of util-linux"
    small = tmp_path / "small"
    small.mkdir()
    script = (
        f"mount -t tmpfs -o {SMALL} tmpfs {small} && "
        f'head -c {BALLAST_BYTES} /dev/zero > {small}/ballast && exec "$@"'
    )
    around = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh")
    async with serving(small / "data", around=around) as server, server.client() as client:
        conversation = (await client.post("/v1/conversations", json={})).json()["id"]
        route = f"/v1/conversations/{conversation}/items"
        item = {"items": [{"role": "user", "content": "x" * 4000}]}
        acknowledged: list[str] = []

        async def refused_and_unready() -> bool:
            """Fill the disk, again where a checkpoint made room in the log for smaller writes."""
            while (answer := await client.post(route, json=item)).status_code == 200:
                acknowledged.append(answer.json()["data"][0]["id"])
                assert len(acknowledged) < 2000
            assert answer.status_code == 507
            assert answer.json()["error"]["code"] == "storage_full"
            assert answer.headers["x-should-retry"] == "false"
            return await readiness(server, 503)

        await wait_until(refused_and_unready, 60, "unreadiness")
        assert (await client.get(f"{route}/{acknowledged[-1]}")).status_code == 200
        assert (await client.get("/livez")).status_code == 200
        Path(f"/proc/{server.pid}/root{small}/ballast").unlink()
        await wait_until(lambda: readiness(server, 200), 30, "readiness")
        resumed = await client.post(route, json=item)
        assert resumed.status_code == 200
        acknowledged.append(resumed.json()["data"][0]["id"])
        listed: list[str] = []
        while True:
            query = {"limit": "100", "order": "asc"} | ({"after": listed[-1]} if listed else {})
            page = (await client.get(route, params=query)).json()
            listed += [one["id"] for one in page["data"]]
            if not page["has_more"]:
                break
        assert listed == acknowledged
        assert await server.end() == 0


async def readiness(server: Server, status: int) -> bool:
    async with server.client() as client:
        return (await client.get("/readyz")).status_code == status
