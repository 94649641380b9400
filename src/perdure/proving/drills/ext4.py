"""Power cuts of a real file system: ext4 with its journal, on an image file that is mounted, told
to stop where it stands as if its power were gone, and mounted again.

Only this image is ever cut: the call is refused to whatever is not a mount of its own.
"""

from __future__ import annotations

import asyncio
import fcntl
import functools
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from perdure.core.clock import SystemClock
from perdure.core.disk import Disk
from perdure.core.errors import PerdureError
from perdure.engines import open_engine
from perdure.engines.blobs_local import LocalBlobs
from perdure.proving.drills.drill import Subject, Trial, url_in
from perdure.proving.faults import POWER_CUT
from perdure.proving.steps import LAYOUTS, troubles

_IMAGE_BYTES = 64 * 1024 * 1024
_WRITERS = 4
_ACKNOWLEDGED_MAX = 150
_BLOBS_MAX = 6
_NO_END = "1000000"

_FS_IOC_SHUTDOWN = 0x8004587D
_WITHOUT_FLUSHING_THE_JOURNAL = struct.pack("I", 2)

_ERRORS = Path("/sys/fs/ext4")

_TOOLS = {"mkfs.ext4": "e2fsprogs", "mount": "mount", "umount": "mount"}


class Image:
    """An ext4 file system in a file, mounted at `root`."""

    def __init__(self, home: Path) -> None:
        self.root = home / "mounted"
        self._file = home / "ext4.img"

    def make(self) -> None:
        """Make the file system, empty."""
        self.root.mkdir()
        with self._file.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        _call("mkfs.ext4", "-q", "-F", str(self._file))

    def mount(self) -> None:
        """Mount it; ext4 recovers from its journal."""
        _call("mount", "-o", "loop,errors=remount-ro", str(self._file), str(self.root))

    def unmount(self) -> None:
        """Let go of it, if it is mounted."""
        if os.path.ismount(self.root):
            _call("umount", str(self.root))

    def become_read_only(self) -> None:
        """Make the file system believe that it is damaged: it lets nothing be written any more."""
        self._check()
        device = os.stat(self.root).st_dev
        block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
        assert (block / "loop/backing_file").read_text().strip() == str(self._file.resolve())
        (_ERRORS / block.name / "trigger_fs_error").write_text("1")

    def cut(self) -> None:
        """Stop the file system at once: what was not synced is gone, and every call on it fails."""
        self._check()
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, _FS_IOC_SHUTDOWN, _WITHOUT_FLUSHING_THE_JOURNAL)
        finally:
            os.close(fd)

    def _check(self) -> None:
        """It is a mount of its own that is going to fail."""
        assert os.path.ismount(self.root)
        assert self.root.stat().st_dev not in (Path("/").stat().st_dev, self._file.stat().st_dev)

    def come_back(self) -> None:
        """Power again."""
        self.unmount()
        self.mount()


@contextmanager
def image(home: Path) -> Iterator[Image]:
    """An image that is mounted, and unmounted whatever happens."""
    made = Image(home)
    made.make()
    try:
        made.mount()
        yield made
    finally:
        made.unmount()


class CutExt4:
    """See `says`. `program` is the writer; a proof may give one that is wrong."""

    fault = POWER_CUT

    def __init__(
        self,
        program: Sequence[str] = (sys.executable, "-m", "perdure.proving.writer"),
        subject: Subject = "ext4",
    ) -> None:
        blob = " or in the middle of a blob," * (subject == "ext4")
        self.subject = subject
        self.says = (
            "a real ext4 file system, on an image of its own, loses its power while a writer "
            f"commits,{blob} with a log that starts over all the time or seldom; it is mounted "
            "again and judged by what was acknowledged"
        )
        self._program = program

    def lacks(self) -> str | None:
        return lacks_images()

    async def run(self, trial: Trial) -> None:
        with image(trial.home) as ext4:
            await trial.each(partial(self._judge, trial, ext4))

    async def _judge(self, trial: Trial, ext4: Image, case: int, place: Path) -> list[str]:
        part = self._blobs if case % 3 == 0 and self.subject == "ext4" else self._engine
        return await part(trial, case, ext4, place)

    async def _engine(self, trial: Trial, case: int, ext4: Image, place: Path) -> list[str]:
        """Steps until the cut. What is told after it counts as begun: it may have been on its way
        or be of a disk that is gone."""
        store = ext4.root / "store"
        steps = (_NO_END,) * (case % 2)  # told how many, the writer keeps its log small
        writer = await asyncio.create_subprocess_exec(
            *(*self._program, url_in(store, self.subject), str(_WRITERS), *steps),
            stdout=asyncio.subprocess.PIPE,
        )
        told = writer.stdout
        assert told is not None
        try:
            acknowledged = dict.fromkeys(range(_WRITERS), 0)
            for _ in range(1 + trial.rng("cut", case).randrange(_ACKNOWLEDGED_MAX)):
                _note(acknowledged, await told.readline())
            ext4.cut()
        finally:
            with suppress(ProcessLookupError):
                writer.kill()
            late = (await told.read()).splitlines(keepends=True)
            await writer.wait()
        last = dict(acknowledged)
        for line in late:
            _note(last, line)
        _come_back(ext4, store, place)
        begun = {who: number + 1 for who, number in last.items()}
        trial.count("acknowledged steps", sum(acknowledged.values()))
        try:
            url = url_in(place, self.subject)
            engine = await open_engine(url, LAYOUTS, clock=SystemClock())
        except PerdureError as error:
            return [f"the store does not open: {error}"]
        wrong = await troubles(engine, acknowledged, begun)
        await engine.close()
        return wrong

    async def _blobs(self, trial: Trial, case: int, ext4: Image, place: Path) -> list[str]:
        """Some blobs, and one whose bytes end with the power."""
        store, rng = ext4.root / "store", trial.rng("blobs", case)
        blobs = await LocalBlobs.open(store, disk=Disk(), clock=SystemClock())

        async def chunks(*, cut: bool) -> AsyncIterator[bytes]:
            yield rng.randbytes(rng.randrange(1, 100_000))
            if cut:
                ext4.cut()
            yield b"the end"

        put = set()
        for _ in range(rng.randrange(1, _BLOBS_MAX)):
            put.add((await blobs.put(chunks(cut=False), size_bytes_max=1_000_000)).digest)
        with suppress(OSError, PerdureError):
            await blobs.put(chunks(cut=True), size_bytes_max=1_000_000)
            return ["a blob was acknowledged by a disk that is gone"]
        await blobs.close()
        _come_back(ext4, store, place)
        blobs = await LocalBlobs.open(place, disk=Disk(), clock=SystemClock())
        there = {blob.digest async for blob in blobs.list()}
        wrong = [f"{digest} was acknowledged and is lost" for digest in put - there]
        wrong += [f"{digest} can be seen and was never acknowledged" for digest in there - put]
        wrong += [f"verify: {finding}" async for finding in blobs.verify()]
        await blobs.close()
        trial.count("acknowledged blobs", len(put))
        return wrong


def _note(acknowledged: dict[int, int], line: bytes) -> None:
    """Take down an acknowledgement: two numbers on a whole line."""
    who, _, number = line.partition(b" ")
    if line.endswith(b"\n") and number.strip().isdigit():
        acknowledged[int(who)] = int(number)


def _come_back(ext4: Image, store: Path, place: Path) -> None:
    """Mount the file system again, and take what is left of the store to where it is judged."""
    ext4.come_back()
    if store.exists():
        shutil.copytree(store, place, dirs_exist_ok=True)
        shutil.rmtree(store)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@functools.cache
def lacks_images() -> str | None:
    """Whether an image can be made and mounted is known only by doing so."""
    if os.geteuid() != 0:
        return "only root may mount an image: run it as root, on a machine made for tests."
    for tool, package in _TOOLS.items():
        if shutil.which(tool) is None:
            return f"{tool} is not installed: `apt-get install {package}`."
    with tempfile.TemporaryDirectory(prefix="perdure-ext4-") as home:
        try:
            with image(Path(home)):
                return None
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip()
            return f"an ext4 image cannot be mounted here, for lack of loop devices: {said}"
