"""What every text in the repository keeps to: heads, names, line length, and standing alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.tidy.tree import Tree, plant, repository

LINE_MAX = 100
LINED = (".py", ".sql", "Makefile", ".ci/run")
PRAGMA = re.compile(r"  # (?:type: ignore|noqa).*")
UNMEANING_NAME = re.compile(r"utils?$|^utils?|helpers?|_part\d+|^misc|^common$")
UNFINISHED = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b")
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:work|root|home|Users|opt)/\w")
URL = re.compile(r"\bhttps?://([\w.-]+|\[[\w:]+\])")
KNOWN_HOSTS = re.compile(
    r"[\w-]+|\[::1\]|127\.0\.0\.1|0\.0\.0\.0|[\w.-]*\.(?:example|invalid|test)"
    r"|(?:www\.)?(?:example\.com|apache\.org)|json-schema\.org"
)
"""The repository points at no package registry and no machine of its makers."""

DOCUMENT = re.compile(r"[\w./-]*\w\.md\b")


def headless(tree: Tree) -> list[str]:
    return [
        f"{source.path} has no docstring at its head: say in a sentence why it exists."
        for source in tree.sources
        if source.syntax.body and ast.get_docstring(source.syntax) is None
    ]


def unmeaning_names(tree: Tree) -> list[str]:
    return [
        f"{source.path} is named for nothing: name the noun it holds."
        for source in tree.sources
        if UNMEANING_NAME.search(Path(source.path).stem)
    ]


def long_lines(tree: Tree) -> list[str]:
    return [
        f"{text.path}:{number} is over {LINE_MAX} characters: break it."
        for text in tree.texts
        if text.path.endswith(LINED)
        for number, line in text.lines()
        if len(PRAGMA.sub("", line)) > LINE_MAX
    ]


def unfinished(tree: Tree) -> list[str]:
    return [
        f"{text.path}:{number} leaves something for later: do it, or write down the limit."
        for text in tree.texts
        for number, line in text.lines()
        if not text.path.endswith(".lock") and UNFINISHED.search(line)
    ]


def foreign_places(tree: Tree) -> list[str]:
    """Paths of one machine, and hosts that are neither this machine nor an example."""
    found = []
    for text in tree.texts:
        for number, line in text.lines():
            strange = [host for host in URL.findall(line) if not KNOWN_HOSTS.fullmatch(host)]
            strange += [match.group() for match in MACHINE_PATH.finditer(line)]
            found += [
                f"{text.path}:{number} names {place}: the project stands alone; leave it out."
                for place in strange
            ]
    return found


def absent_documents(tree: Tree) -> list[str]:
    """Documents that a text names and that do not exist."""
    here = {text.path for text in tree.texts}
    return [
        f"{text.path}:{number} names {name}, which does not exist: name what does."
        for text in tree.texts
        if text.path.endswith((".md", ".py", ".toml"))
        for number, line in text.lines()
        for name in DOCUMENT.findall(line)
        if not any(f"/{path}".endswith("/" + name.lstrip("./")) for path in here)
    ]


RULES = (headless, unmeaning_names, long_lines, unfinished, foreign_places, absent_documents)


@pytest.mark.parametrize("rule", RULES)
def test_texts_keep_to(rule) -> None:
    assert rule(repository()) == []


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (headless, "src/perdure/a.py", "x = 1"),
        (unmeaning_names, "src/perdure/string_util.py", '"""Head."""'),
        (unmeaning_names, "src/perdure/test_helpers.py", '"""Head."""'),
        (unmeaning_names, "src/perdure/sqlite_part2.py", '"""Head."""'),
        (long_lines, "src/perdure/a.py", "#" * (LINE_MAX + 1)),
        (long_lines, "Makefile", "#" * (LINE_MAX + 1)),
        (unfinished, "README.md", "TO" + "DO: say more"),
        (foreign_places, "README.md", "see https://" + "registry.somewhere.org/simple"),
        (foreign_places, "src/perdure/a.py", "x = '/ro" + "ot/data'"),
        (absent_documents, "src/perdure/a.py", "# as GONE" + ".md says"),
    ],
)
def test_a_planted_text_is_found(tmp_path: Path, rule, name: str, text: str) -> None:
    assert len(rule(plant(tmp_path, {name: text}))) == 1


def test_good_texts_pass(tmp_path: Path) -> None:
    tree = plant(
        tmp_path,
        {
            "src/perdure/a.py": '"""Why."""\nx = "http://127.0.0.1:8420/v1"\n',
            "src/perdure/__init__.py": "",
            "README.md": "See docs/architecture.md and architecture.md.",
            "docs/architecture.md": "http://upstream.example/v1",
        },
    )
    assert [found for rule in RULES for found in rule(tree)] == []
