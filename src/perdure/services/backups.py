"""Backups: a directory that holds everything as of one moment, and restoring one.

    TARGET/perdure.db      what the engine wrote (its own files, whatever they are called)
    TARGET/blobs/DIGEST    every blob
    TARGET/manifest.json   what belongs here: sizes, digests, the commit, the time, its own digest

Invariants
- A backup grows under `TARGET.tmp` and gets its name when all of it is verified and durable. One
  that was cut short has no manifest and another name; the next one to the same target clears it.
- Every record's bytes are looked for first, and from then on nobody sweeps. Blobs are copied after
  the engine's moment: what a record of that moment names is there. What is newer is superfluous
  and harmless.
- Restoring believes nothing: the manifest is held to its digest, each file to the manifest, each
  blob to its name, the engine verifies every row, and the bytes that rows name are looked for. The
  store comes last, so before the end there is none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator
from contextlib import aclosing
from pathlib import Path

import msgspec

from perdure.core.blobs import Blob, Blobs
from perdure.core.clock import Clock
from perdure.core.disk import TEMPORARY, Disk
from perdure.core.engine import Engine, Snapshot
from perdure.core.errors import Damaged, Invalid, Missing, NewerFormat, Unavailable
from perdure.core.offload import off_loop, steps_off_loop
from perdure.services.blobs import BlobKeeper

FORMAT = 1
MANIFEST = "manifest.json"
BLOBS = "blobs"

_LOCK = "lock"
_CHUNK_BYTES = 4 * 1024 * 1024

Progress = Callable[[str, int, int], None]
"""Told what is being done, bytes done and bytes in all."""


class File(msgspec.Struct, frozen=True):
    """One file of a backup; that of a shard is in a directory of its own."""

    path: str
    size_bytes: int
    sha256: str


class BlobList(msgspec.Struct, frozen=True):
    """The blobs of a backup. Each is named by its digest, so a digest of the names says it all."""

    count: int = 0
    size_bytes: int = 0
    sha256: str = hashlib.sha256().hexdigest()


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup holds. `digest` is that of the manifest without it."""

    format: int = FORMAT
    taken_at_s: int
    snapshot: Snapshot
    files: tuple[File, ...]
    blobs: BlobList
    digest: str = ""

    @property
    def size_bytes(self) -> int:
        """Everything but the manifest itself."""
        return sum(file.size_bytes for file in self.files) + self.blobs.size_bytes


async def back_up(
    engine: Engine,
    keeper: BlobKeeper,
    target: Path,
    progress: Progress,
    *,
    clock: Clock,
    disk: Disk,
) -> Manifest:
    """Make a backup at `target`, which must not exist, while everything goes on. Raises what
    `Engine.backup` raises, `Damaged` for a record whose bytes are gone, and `Invalid`; then nothing
    is left."""
    _require_absent(target)
    growing = target.with_name(target.name + TEMPORARY)
    await off_loop(disk.make_directory, growing)
    lock = disk.lock(growing / _LOCK)  # whoever held it is dead, and what it left is nobody's
    try:
        await off_loop(disk.clear_directory, growing, keep=_LOCK)
        async with keeper.holding():
            progress("looking for the bytes of files", 0, 0)
            await keeper.require_bytes()
            taken_at_s = int(clock.now_s())
            snapshot = await engine.backup(
                growing, lambda done, total: progress("copying the store", done, total)
            )
            listed = await _copy_blobs(keeper.blobs, growing / BLOBS, disk, progress)
        files = await _digests(growing, progress)
        manifest = Manifest(taken_at_s=taken_at_s, snapshot=snapshot, files=files, blobs=listed)
        manifest = msgspec.structs.replace(manifest, digest=_digest(manifest))
        await off_loop(_publish, disk, growing, target, manifest)
    except BaseException:
        await off_loop(disk.remove_tree, growing)
        raise
    finally:
        lock.release()
    return manifest


def read_manifest(source: Path) -> Manifest:
    """The manifest of the backup at `source`. Raises `Missing` for what is no complete backup,
    `NewerFormat`, and `Damaged`."""
    path = source / MANIFEST
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (FileNotFoundError, NotADirectoryError):
        raise Missing(
            f"{source} is not a backup: it has no {MANIFEST}. A backup that was cut short never "
            "gets one; take another."
        ) from None
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}.") from error
    except msgspec.MsgspecError as error:
        raise Damaged(str(path), f"it is not a manifest ({error})") from None
    if manifest.format > FORMAT:
        raise NewerFormat(
            f"{source} has backup format {manifest.format}; this release knows up to {FORMAT}. "
            "Restore it with the Perdure that made it, or a newer one."
        )
    if manifest.digest != _digest(manifest):
        raise Damaged(str(path), "it does not match its own digest")
    return manifest


async def check_backup(source: Path, progress: Progress) -> Manifest:
    """The manifest, once every file in `source` is found as it says. Raises `Damaged`."""
    manifest = read_manifest(source)
    for file in manifest.files:
        if Path(file.path).is_absolute() or ".." in Path(file.path).parts:
            raise Damaged(str(source / MANIFEST), f"it names {file.path!r}")
    found = {file.path: file for file in await _digests(source, progress)}
    for file in manifest.files:
        if found.pop(file.path, None) != file:
            raise Damaged(str(source / file.path), "it is not the file that was backed up")
    if found:
        raise Damaged(str(source / min(found)), "it does not belong to the backup")
    if _list(_blobs_in(source / BLOBS)) != manifest.blobs:
        raise Damaged(str(source / BLOBS), "its blobs are not those that were backed up")
    return manifest


async def restore_blobs(source: Path, blobs: Blobs, progress: Progress) -> None:
    """Put every blob of the backup at `source` where blobs are kept. Raises `Damaged`."""
    done, listed = 0, _blobs_in(source / BLOBS)
    total = sum(blob.size_bytes for blob in listed)
    for blob in listed:
        path = source / BLOBS / blob.digest
        chunks = steps_off_loop(_read(path))
        if await blobs.put(chunks, size_bytes_max=blob.size_bytes) != blob:
            raise Damaged(str(path), "its bytes have another digest")
        done += blob.size_bytes
        progress("restoring blobs", done, total)


async def _copy_blobs(blobs: Blobs, into: Path, disk: Disk, progress: Progress) -> BlobList:
    """Copy every blob, each verified against its name as it is read. Raises `Damaged`."""
    listed = [blob async for blob in blobs.list()]
    if not listed:
        return BlobList()
    total, done = sum(blob.size_bytes for blob in listed), 0
    await off_loop(disk.make_directory, into)
    for blob in listed:
        with disk.writing(into / blob.digest) as write:
            async for chunk in blobs.read(blob.digest):
                await off_loop(write, chunk)
        await off_loop(disk.sync_file, into / blob.digest)
        done += blob.size_bytes
        progress("copying blobs", done, total)
    await off_loop(disk.sync_directory, into)
    return _list(listed)


def _publish(disk: Disk, growing: Path, target: Path, manifest: Manifest) -> None:
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    disk.write_file(growing / MANIFEST, text + b"\n")
    disk.remove(growing / _LOCK)
    disk.replace(growing, target)
    disk.sync_directory(target.parent)


def _digest(manifest: Manifest) -> str:
    bare = msgspec.structs.replace(manifest, digest="")
    return hashlib.sha256(msgspec.json.encode(bare)).hexdigest()


async def _digests(directory: Path, progress: Progress) -> tuple[File, ...]:
    """The engine's files in a backup, by name."""
    paths = _files_in(directory)
    total, done = sum(path.stat().st_size for path in paths), 0
    files = []
    for path in paths:
        seen, size_bytes = hashlib.sha256(), 0
        async with aclosing(steps_off_loop(_read(path))) as chunks:
            async for chunk in chunks:
                await off_loop(seen.update, chunk)
                size_bytes += len(chunk)
                progress("taking digests", done + size_bytes, total)
        done += size_bytes
        name = path.relative_to(directory).as_posix()
        files.append(File(name, size_bytes, seen.hexdigest()))
    return tuple(files)


def _require_absent(target: Path) -> None:
    if target.exists():
        raise Invalid(f"{target} exists, and a backup never overwrites. Name another target.")


def _files_in(directory: Path) -> list[Path]:
    names = {MANIFEST, _LOCK, BLOBS}
    return sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and path.relative_to(directory).parts[0] not in names
    )


def _read(path: Path) -> Generator[bytes, None, None]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _blobs_in(directory: Path) -> list[Blob]:
    if not directory.is_dir():
        return []
    return [Blob(path.name, path.stat().st_size) for path in sorted(directory.iterdir())]


def _list(blobs: list[Blob]) -> BlobList:
    names = hashlib.sha256()
    for blob in blobs:
        names.update(f"{blob.digest} {blob.size_bytes}\n".encode())
    return BlobList(len(blobs), sum(blob.size_bytes for blob in blobs), names.hexdigest())
