"""Calls that have one home: time, randomness, files, JSON, threads, waiting, catching all."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.tidy.tree import Source, Tree, dotted_name, plant, repository


class Ban(NamedTuple):
    """Names and method names, apart by spaces, that only `homes` may use; a home that ends in /
    is a folder. Proofs and tests observe from outside: tests are bound where `in_tests` says so.
    """

    names: str
    homes: tuple[str, ...]
    instead: str
    methods: str = ""
    in_tests: bool = False


WALL_CLOCK = """
    time.time time.time_ns datetime.datetime.now datetime.datetime.utcnow datetime.datetime.today
    datetime.date.today
"""
FILES = """
    os.fsync os.fdatasync os.sync os.replace os.rename os.remove os.unlink os.truncate os.ftruncate
    os.write os.pwrite os.mkdir os.makedirs shutil fcntl tempfile
"""
BANS = (
    Ban(
        WALL_CLOCK,
        homes=("core/clock.py",),
        instead="take a Clock (core/clock.py) and ask now_s",
    ),
    Ban(
        "uuid random secrets os.urandom",
        homes=("core/clock.py",),
        instead="take a Clock (core/clock.py) and ask new_id; compare with hmac.compare_digest",
    ),
    Ban(
        FILES,
        methods="write_text write_bytes unlink rename mkdir rmdir",
        homes=("core/disk.py",),
        instead="take a Disk (core/disk.py), so that tests see every durable edge",
    ),
    Ban(
        "json",
        homes=("core/codec.py", "wire/", "frontends/http/", "frontends/cli/"),
        instead="use core/codec.py, which is strict about what strangers send",
    ),
    Ban(
        "asyncio.to_thread concurrent.futures.ThreadPoolExecutor",
        methods="run_in_executor",
        homes=("core/offload.py",),
        instead="use off_loop (core/offload.py)",
    ),
    Ban(
        "time.sleep asyncio.sleep",
        homes=("core/clock.py",),
        instead="take a Clock and use its sleep; in tests, proving.wait_until(deadline_s)",
        in_tests=True,
    ),
)
CATCH_ALL = ("Exception", "BaseException")
CATCH_ALL_HOMES = (
    *("services/supervisor.py", "frontends/http/errors.py"),
    *("proving/conformance.py", "proving/fuzz.py", "proving/torture.py"),
)
"""Who may catch everything and go on, recording it: the task supervisor, the HTTP error wrapper,
and the proofs that report whatever does not hold."""


def banned(tree: Tree) -> list[str]:
    found = []
    for source in tree.sources:
        for ban in BANS:
            if _bound(source, ban) and not _at_home(source, ban.homes):
                found += [
                    f"{source.path}:{line} uses {what}: {ban.instead}."
                    for line, what in sorted(_uses(source, ban))
                ]
    return found


def writing_opens(tree: Tree) -> list[str]:
    return [
        f"{source.path}:{node.lineno} opens a file for writing: take a Disk (core/disk.py)."
        for source in tree.product
        if not _observes(source) and not _at_home(source, ("core/disk.py",))
        for node in ast.walk(source.syntax)
        if isinstance(node, ast.Call) and set(_mode(node)) & set("wax+")
    ]


def catch_alls(tree: Tree) -> list[str]:
    """Handlers of everything that do not raise again, wherever they stand."""
    found = []
    for source in tree.product:
        if _at_home(source, CATCH_ALL_HOMES):
            continue
        for node in ast.walk(source.syntax):
            if isinstance(node, ast.ExceptHandler):
                swallows = not isinstance(node.body[-1], ast.Raise)
                caught = [None] if node.type is None else _parts(node.type)
            elif isinstance(node, ast.Call) and dotted_name(node.func, {}) in (
                "suppress",
                "contextlib.suppress",
            ):
                swallows, caught = True, list(node.args)
            else:
                continue
            if swallows and any(p is None or dotted_name(p, {}) in CATCH_ALL for p in caught):
                found.append(
                    f"{source.path}:{node.lineno} catches everything: name the errors, raise again "
                    "at the end, or let the task supervisor or the HTTP error wrapper record it."
                )
    return found


def _uses(source: Source, ban: Ban) -> set[tuple[int, str]]:
    found = {
        (line, name)
        for line, name in source.names
        for banned_name in ban.names.split()
        if name == banned_name or name.startswith(banned_name + ".")
    }
    for node in ast.walk(source.syntax):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ban.methods.split():
                found.add((node.lineno, f".{node.func.attr}()"))
            if _is_yield(node):
                found -= {(node.lineno, "asyncio.sleep")}
    return found


def _is_yield(node: ast.Call) -> bool:
    """`asyncio.sleep(0)` gives way once; it waits for nothing."""
    return (
        dotted_name(node.func, {}) == "asyncio.sleep"
        and isinstance(node.args[0], ast.Constant)
        and node.args[0].value == 0
    )


def _mode(node: ast.Call) -> str:
    """The mode of an `open(...)` or `path.open(...)`, empty for any other call or a variable."""
    name = dotted_name(node.func, {}) or ""
    is_method = isinstance(node.func, ast.Attribute) and node.func.attr == "open"
    if name in ("open", "io.open"):
        position = 1
    elif is_method and name != "os.open":
        position = 0
    else:
        return ""
    given = [word.value for word in node.keywords if word.arg == "mode"]
    mode = given[0] if given else node.args[position] if len(node.args) > position else None
    if isinstance(mode, ast.Constant) and isinstance(mode.value, str):
        return mode.value if len(mode.value) <= 3 else ""
    return ""


def _parts(node: ast.expr) -> list[ast.expr | None]:
    return list(node.elts) if isinstance(node, ast.Tuple) else [node]


def _observes(source: Source) -> bool:
    return source.path.startswith("src/perdure/proving/")


def _bound(source: Source, ban: Ban) -> bool:
    if source.path.startswith("tests/"):
        return ban.in_tests
    return source.path.startswith("src/") and not _observes(source)


def _at_home(source: Source, homes: tuple[str, ...]) -> bool:
    inside = source.path.removeprefix("src/perdure/")
    return any(inside.startswith(home) if home[-1] == "/" else inside == home for home in homes)


def test_banned_calls_stay_at_home() -> None:
    assert banned(repository()) == []


def test_files_are_written_by_the_disk_module() -> None:
    assert writing_opens(repository()) == []


def test_nothing_catches_everything() -> None:
    assert catch_alls(repository()) == []


@pytest.mark.parametrize(
    "code",
    [
        "import time\nx = time.time()",
        "from time import time as t\nx = t()",
        "from datetime import datetime\nx = datetime.now()",
        "import uuid\nx = uuid.uuid4()",
        "import random as r\nx = r.random()",
        "from secrets import token_hex\nx = token_hex",
        "import os\nos.fsync(1)",
        "from os import replace\nreplace('a', 'b')",
        "from pathlib import Path\nPath('a').write_text('b')",
        "import shutil\nshutil.rmtree('a')",
        "import json\njson.loads('1')",
        "import asyncio\nasyncio.to_thread(print)",
        "import asyncio\nasyncio.get_running_loop().run_in_executor(None, print)",
        "import asyncio\nasyncio.sleep(0.1)",
    ],
)
def test_a_planted_call_is_found(tmp_path: Path, code: str) -> None:
    tree = plant(tmp_path, {"src/perdure/services/planted.py": code})
    assert [where.split(" ")[0] for where in banned(tree)] == ["src/perdure/services/planted.py:2"]


def test_calls_are_free_at_home(tmp_path: Path) -> None:
    tree = plant(
        tmp_path,
        {
            "src/perdure/core/clock.py": "import time\ntime.time()",
            "src/perdure/core/disk.py": "import os\nos.fsync(1)\nopen('a', 'w')",
            "src/perdure/frontends/http/a.py": "import json\njson.dumps(1)",
            "src/perdure/proving/a.py": "import random\nrandom.random()",
            "src/perdure/services/a.py": "import asyncio\nasyncio.sleep(0)\nopen('a')",
            "tests/test_a.py": "import os\nos.fsync(1)",
        },
    )
    assert banned(tree) + writing_opens(tree) == []


def test_a_planted_sleep_in_a_test_is_found(tmp_path: Path) -> None:
    tree = plant(tmp_path, {"tests/test_a.py": "import time\ntime.sleep(1)"})
    assert len(banned(tree)) == 1


@pytest.mark.parametrize(
    "code", ["open('a', 'w')", "open('a', mode='ab')", "Path('a').open('r+')", "io.open('a', 'x')"]
)
def test_a_planted_writing_open_is_found(tmp_path: Path, code: str) -> None:
    tree = plant(tmp_path, {"src/perdure/services/planted.py": code})
    assert len(writing_opens(tree)) == 1


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("try: f()\nexcept: pass", 1),
        ("try: f()\nexcept Exception as e: log(e)", 1),
        ("try: f()\nexcept (OSError, BaseException): pass", 1),
        ("with contextlib.suppress(Exception): f()", 1),
        ("try: f()\nexcept Exception: count(); raise", 0),
        ("try: f()\nexcept OSError: pass", 0),
    ],
)
def test_a_planted_catch_all_is_found(tmp_path: Path, code: str, count: int) -> None:
    tree = plant(tmp_path, {"src/perdure/services/planted.py": code})
    assert len(catch_alls(tree)) == count
