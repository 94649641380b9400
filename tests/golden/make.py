"""Makes the golden stores of this release, and the fingerprint of what stands in stores:

    python -m tests.golden.make stores|fingerprint

A store is one that was killed: part of it stands in the log or the journal only. With it comes a
backup of it, which is a format too. Times and keys are always the same; the id of the store is not,
and neither is what SQLite draws for its log. The stores of a released version are never made again.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from perdure.engines import open_engine
from perdure.proving.file_stories import small_journals
from perdure.surfaces.state import LAYOUTS
from tests.golden.contents import AT_S, Then, begin, go_on, listing
from tests.golden.fingerprint import fingerprint

HERE = Path(__file__).parent
FINGERPRINT = HERE / "fingerprint.txt"
NOW = HERE / "format-1"
"""The stores of this release, in the directory of the format they are in."""

LISTING = "stored.txt"
PLACES = {"sqlite": "perdure.db", "files": "store"}


def url_of(engine_name: str, home: Path) -> str:
    """Where the store of an unpacked archive is."""
    scheme = "file" if engine_name == "files" else engine_name
    return f"{scheme}:///{home / 'data' / PLACES[engine_name]}"


async def stores() -> None:
    """Make one of each engine. All hold the same."""
    NOW.mkdir(exist_ok=True)
    held = set()
    for name in PLACES:
        with tempfile.TemporaryDirectory() as scratch, small_journals():
            held.add(await _store(name, Path(scratch)))
    (text,) = held
    (NOW / LISTING).write_text(text)


async def _store(engine_name: str, home: Path) -> str:
    engine = await open_engine(url_of(engine_name, home / "living"), LAYOUTS, clock=Then())
    await begin(engine)
    await engine.usage()  # what was committed until now is in the files
    await go_on(engine)
    backup = home / "killed" / "backup"
    backup.mkdir(parents=True)
    shutil.copytree(home / "living" / "data", home / "killed" / "data")
    await engine.backup(backup, lambda done, total: None)
    text = await listing(engine)
    await engine.close()
    _pack(home / "killed", NOW / f"{engine_name}.tar.xz")
    return text


def _pack(root: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:xz", preset=9) as packed:
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.name.endswith(("lock", "-shm")):
                info = tarfile.TarInfo(str(path.relative_to(root)))
                info.size, info.mtime = path.stat().st_size, AT_S
                with path.open("rb") as file:
                    packed.addfile(info, file)


def unpack(archive: Path, home: Path) -> None:
    """A store as it was left, and its backup."""
    with tarfile.open(archive) as packed:
        packed.extractall(home, filter="data")


if __name__ == "__main__":
    if sys.argv[1:] == ["stores"]:
        asyncio.run(stores())
    elif sys.argv[1:] == ["fingerprint"]:
        FINGERPRINT.write_text(fingerprint())
    else:
        sys.exit(__doc__)
