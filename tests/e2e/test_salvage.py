"""A store that was damaged on purpose, salvaged and served: what is sound is answered byte for byte
as before, what is not is named."""

from __future__ import annotations

from pathlib import Path

import apsw
import httpx

from perdure.core import keys
from perdure.engines.sqlite_driver import PAGE_BYTES, connect
from tests.e2e.http_server import perdure, serving

RESPONSES = 24


async def stored(client: httpx.AsyncClient) -> dict[str, bytes]:
    """Everything that is kept, by its path: responses, a conversation, files with their bytes."""
    made = await client.post("/v1/conversations", json={"metadata": {"kind": "salvage"}})
    paths = [f"/v1/conversations/{made.json()['id']}"]
    for number in range(RESPONSES):
        body = {"model": "perdure-extract", "input": f"Number {number} is kept. " + "x" * 700}
        answer = await client.post("/v1/responses", json=body)
        paths.append(f"/v1/responses/{answer.json()['id']}")
    for number in range(3):
        sent = {"file": (f"{number}.txt", f"bytes of file {number} " * 40)}
        file = await client.post("/v1/files", data={"purpose": "user_data"}, files=sent)
        paths += [f"/v1/files/{file.json()['id']}", f"/v1/files/{file.json()['id']}/content"]
    return {path: await body_of(client, path) for path in paths}


async def body_of(client: httpx.AsyncClient, path: str) -> bytes:
    answer = await client.get(path)
    assert answer.status_code == 200, answer.text
    return answer.content


def change_a_row(path: Path, response_id: str) -> None:
    """Through SQLite, so that page checksums fit and only the row's own does not."""
    connection = connect(str(path))
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0)
    connection.execute(
        "UPDATE records_responses SET attachment = x'7b7d' WHERE key = ?",
        (keys.join(("default", response_id)),),
    )
    connection.close()


def page_with(path: Path, text: bytes) -> int:
    """Where the page begins in which a text stands."""
    return path.read_bytes().index(text) // PAGE_BYTES * PAGE_BYTES


def everything(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not path.name.endswith("-shm")
    }


# proves C7
async def test_what_is_sound_in_a_damaged_store_is_served_again(tmp_path: Path) -> None:
    data, into = tmp_path / "data", tmp_path / "salvaged"
    async with serving(data) as server, server.client() as client:
        before = await stored(client)
    hurt = list(before)[3]
    change_a_row(data / "perdure.db", hurt.rpartition("/")[2])
    database = bytearray((data / "perdure.db").read_bytes())
    zeroed = page_with(data / "perdure.db", b"Number 20 is kept.")
    database[zeroed : zeroed + PAGE_BYTES] = bytes(PAGE_BYTES)
    (data / "perdure.db").write_bytes(database)
    blob = min(path for path in (data / "blobs").glob("??/*"))
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    damaged = everything(data)

    told = await perdure("salvage", "--data", str(data), "--into", str(into), "--json")
    assert told.code == 6, told.err
    assert everything(data) == damaged
    report = told.json()
    lost = report["lost"]
    named = {one["key"] for one in lost if one["collection"] == "responses"}
    assert hurt.rpartition("/")[2] in named
    assert blob.name in {one["key"] for one in lost if one["collection"] == "blobs"}
    assert (await perdure("verify", "--data", str(into))).out.startswith("nothing is damaged")

    async with serving(into) as server, server.client() as client:
        gone = set()
        for path, body in before.items():
            answer = await client.get(path)
            if answer.status_code == 404:
                gone.add(path.split("/")[3])
            else:
                assert (answer.status_code, answer.content) == (200, body), path
        assert gone == {one["key"] for one in lost if one["collection"] in ("responses", "files")}
        assert len(gone) <= 6
        body = {"model": "perdure-extract", "input": "And it goes on?"}
        assert (await client.post("/v1/responses", json=body)).status_code == 200
    assert report["kept"]["responses"] == RESPONSES - len(gone) + 1  # of the gone one is a file


async def test_of_a_sound_store_nothing_is_lost_and_no_target_is_overwritten(
    tmp_path: Path,
) -> None:
    data, into = tmp_path / "data", tmp_path / "salvaged"
    async with serving(data) as server, server.client() as client:
        before = await stored(client)
        held = await perdure("salvage", "--data", str(data), "--into", str(into))
        assert held.code == 5, held
    told = await perdure("salvage", "--data", str(data), "--into", str(into))
    assert (told.code, told.out.splitlines()[-1]) == (0, "nothing is lost"), told
    again = await perdure("salvage", "--data", str(data), "--into", str(into))
    assert again.code == 2
    assert "never overwrites" in again.err
    async with serving(into) as server, server.client() as client:
        assert {path: await body_of(client, path) for path in before} == before
