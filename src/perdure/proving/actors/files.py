"""Files: sent whole or in parts, read, deleted; there with every byte, or not at all."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable

import msgspec

from perdure.proving.client import Answer, Client
from perdure.proving.oracle import Check, History, Op, Verdict
from perdure.proving.snapshot import Snapshot
from perdure.proving.workload import Scene
from perdure.surfaces.files import BLOCK_BYTES, FILES, PARTS, UPLOADS, Piece, UploadStatus

SURFACE = "files"

_SIZES = (0, 1, 700, 60_000, BLOCK_BYTES + 4_321)
_BOUNDARY = "a-boundary-that-no-file-holds"
_CHUNK_BYTES = 200_000


class Sent(msgspec.Struct):
    """A file that was sent: `data` is the whole of it, `id` what it was answered."""

    op: Op
    data: bytes
    in_parts: bool = False
    id: str | None = None
    deletion: Op | None = None


class FilesActor:
    """See `proving.workload.Actor`."""

    surface = SURFACE

    def __init__(self) -> None:
        self._sent: dict[int, list[Sent]] = defaultdict(list)

    async def act(self, client: Client) -> None:
        own = [sent for sent in self._sent[client.worker] if sent.id and not sent.deletion]
        roll = client.rng.random()
        if own and roll < 0.2:
            await delete(client, client.rng.choice(own), SURFACE)
        elif own and roll < 0.4:
            await _read(client, client.rng.choice(own))
        elif roll > 0.75:
            op = client.history.intend(SURFACE, "create", creates="file")
            sent = Sent(op, bytes_of(op.mark, client.rng.randint(3, 90_000)), in_parts=True)
            self._sent[client.worker].append(sent)
            await _send_in_parts(client, sent)
        else:
            op = client.history.intend(SURFACE, "create", creates="file")
            sent = Sent(op, bytes_of(op.mark, client.rng.choice(_SIZES)))
            self._sent[client.worker].append(sent)
            await send(client, sent)

    async def judge(self, scene: Scene) -> None:
        await judge_files(scene, SURFACE, (sent for own in self._sent.values() for sent in own))

    def audit(self, store: Snapshot, history: History, verdict: Verdict, *, settled: bool) -> None:
        kept = store.records[FILES.name]
        named = [
            (key, op) for key, it in kept.items() for op in history.named_in(it.value.filename)
        ]
        counts = Counter(op.number for _, op in named)
        for key, op in named:
            asked_for = op.detail.get("creates") == "file" and op.outcome != "refused"
            verdict.holds(
                Check.INTENDED,
                SURFACE,
                asked_for and counts[op.number] == 1,
                f"{key[-1]} is one of {counts[op.number]} files of {op}",
            )
        for key in kept.keys() - {key for key, _ in named}:
            verdict.holds(Check.INTENDED, SURFACE, False, f"{key[-1]} was never sent")
        for key, it in kept.items():
            verdict.none(Check.WHOLE, SURFACE, list(_lacks(store, key[-1], it.value.pieces)))
        uploads = store.records[UPLOADS.name]
        for key, it in store.records[PARTS.name].items():
            verdict.none(Check.WHOLE, SURFACE, list(_lacks(store, key[-1], [it.value.piece])))
            verdict.holds(Check.ATOMIC, SURFACE, key[:2] in uploads, f"{key[-1]} has no upload")
        for key, it in uploads.items():
            made = it.value.file_id
            done = it.value.status is UploadStatus.COMPLETED
            gone = any(op.detail.get("id") == made for op in history.ops if op.verb == "delete")
            there = (key[0], made) in kept
            verdict.holds(
                Check.ATOMIC,
                SURFACE,
                (there or gone) if done else made is None,
                f"{key[-1]} is {it.value.status.value}, and its file is {made}",
            )


async def send(client: Client, sent: Sent, *, repeat: bool = False) -> Answer:
    """Send a file, or send it again as the official client does when an answer was lost."""
    headers = {
        "content-type": f"multipart/form-data; boundary={_BOUNDARY}",
        "x-stainless-retry-count": "1" if repeat else "0",
    }
    answer = await client.do_raw(sent.op, "/v1/files", _form(sent), headers)
    if answer.status == 200:
        sent.id = answer.json()["id"]
    return answer


async def _send_in_parts(client: Client, sent: Sent) -> None:
    """Announce a file, send its parts at once and one of them twice, and complete it, unless the
    seed has it cancelled."""
    announced = {
        "bytes": len(sent.data),
        "filename": f"{sent.op.mark} .bin",
        "mime_type": "application/octet-stream",
        "purpose": "user_data",
    }
    upload = (await client.send("POST", "/v1/uploads", announced)).json()["id"]
    cuts = sorted(client.rng.sample(range(1, len(sent.data)), 2))
    parts = [
        sent.data[start:end] for start, end in zip((0, *cuts), (*cuts, len(sent.data)), strict=True)
    ]
    cancels = client.rng.random() < 0.2
    headers = {"content-type": f"multipart/form-data; boundary={_BOUNDARY}"}
    works = [
        client.send_raw(f"/v1/uploads/{upload}/parts", _parts(("data", "part", part)), headers)
        for part in (*parts, parts[0])
    ]
    answers = await asyncio.gather(*works, return_exceptions=True)
    part_ids = []
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
        part_ids.append(answer.json().get("id"))
    if cancels:
        sent.op.detail["creates"] = "nothing"
        await client.do(sent.op, "POST", f"/v1/uploads/{upload}/cancel")
        client.history.settle(sent.op, "refused", 200)
        return
    body = {"part_ids": part_ids[:3], "md5": hashlib.md5(sent.data).hexdigest()}
    answer = await client.do(sent.op, "POST", f"/v1/uploads/{upload}/complete", body)
    if answer.status == 200:
        sent.id = answer.json()["file"]["id"]


async def delete(client: Client, sent: Sent, surface: str) -> None:
    """Delete a file."""
    sent.deletion = op = client.history.intend(surface, "delete", id=sent.id)
    await client.do(op, "DELETE", f"/v1/files/{sent.id}")


async def judge_files(scene: Scene, surface: str, sent: Iterable[Sent]) -> None:
    """Each file is what was sent, or absent where that may be; one that is sent again is one."""
    found = {
        op.number: key[-1]
        for key, kept in scene.before.records[FILES.name].items()
        for op in scene.history.named_in(kept.value.filename)
    }
    for one in scene.chosen([(max(_operations(it), key=lambda op: op.cycle), it) for it in sent]):
        fresh = one.op.cycle == scene.history.cycle
        if one.op.outcome == "unknown" and fresh and not one.in_parts:
            answer = await send(scene.client, one, repeat=True)
            there = found.get(one.op.number)
            scene.verdict.holds(
                Check.GOES_ON,
                surface,
                answer.status == 200 and there in (None, one.id),
                f"{one.op} sent again was answered {answer.status} {one.id}, and {there} is there",
            )
        one.id = one.id or found.get(one.op.number)
        if one.id is not None:
            await _judge_one(scene, surface, one, one.id)


def bytes_of(mark: str, size_bytes: int) -> bytes:
    """Bytes that nothing else has."""
    return (hashlib.sha256(mark.encode()).digest() * (size_bytes // 32 + 1))[:size_bytes]


async def _judge_one(scene: Scene, surface: str, sent: Sent, id: str) -> None:
    holds = scene.verdict.holds
    answer = await scene.client.get(f"/v1/files/{id}/content")
    if answer.status == 404:
        gone = sent.deletion is not None and sent.deletion.outcome != "refused"
        sure = sent.op.outcome == "acknowledged"
        holds(Check.KEPT, surface, gone or not sure, f"{id} was acknowledged and is gone")
        return
    deleted = sent.deletion is not None and sent.deletion.outcome == "acknowledged"
    holds(Check.KEPT, surface, not deleted, f"{id} was deleted and is back")
    same = answer.status == 200 and answer.body == sent.data
    holds(
        Check.KEPT,
        surface,
        same,
        f"{id}: {answer.status}, {len(answer.body)} bytes, not the {len(sent.data)} of {sent.op}",
    )
    await _judge_part(scene, surface, sent, id)


async def _judge_part(scene: Scene, surface: str, sent: Sent, id: str) -> None:
    if not sent.data:
        return
    start = scene.rng.randrange(len(sent.data))
    path, headers = f"/v1/files/{id}/content", {"range": f"bytes={start}-{start + 99}"}
    part = await scene.client.send("GET", path, headers=headers)
    scene.verdict.holds(
        Check.KEPT,
        surface,
        part.status == 206 and part.body == sent.data[start : start + 100],
        f"{id} from byte {start}: {part.status}, other bytes than were sent",
    )


async def _read(client: Client, sent: Sent) -> None:
    answer = await client.get(f"/v1/files/{sent.id}/content")
    if answer.status != 200 or answer.body != sent.data:
        client.history.complaints.append(f"{sent.id} was answered {answer.status}, other bytes")


def _form(sent: Sent) -> AsyncIterator[bytes]:
    return _parts(("purpose", None, b"user_data"), ("file", f"{sent.op.mark} .bin", sent.data))


async def _parts(*parts: tuple[str, str | None, bytes]) -> AsyncIterator[bytes]:
    """A form of fields with name, filename and content, in pieces."""
    for name, filename, data in parts:
        named = f'name="{name}"' + (f'; filename="{filename}"' if filename else "")
        yield f"--{_BOUNDARY}\r\ncontent-disposition: form-data; {named}\r\n\r\n".encode()
        for at in range(0, len(data), _CHUNK_BYTES):
            yield data[at : at + _CHUNK_BYTES]
        yield b"\r\n"
    yield f"--{_BOUNDARY}--\r\n".encode()


def _lacks(store: Snapshot, id: str, pieces: Iterable[Piece]) -> Iterable[str]:
    """What is lacking of the bytes that something is made of."""
    for piece in pieces:
        data = store.blobs.get(piece.digest)
        if data is None or len(data) != piece.size_bytes:
            yield f"{id} needs {piece.digest}, of which there is {data and len(data)}"


def _operations(sent: Sent) -> list[Op]:
    return [sent.op, *filter(None, [sent.deletion])]
