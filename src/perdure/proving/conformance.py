"""Hold an engine to the rules of `core.engine`.

Somebody with an engine of their own writes a `Subject`, whose `open` makes one in a directory:

    await conformance.prove(Subject("mine", open_mine), directory)

runs every rule on it, prints what was run and raises at the end if a rule did not hold. Test
suites run `RULES` one by one through `run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from perdure.core.errors import Invalid
from perdure.engines.checked import Broken
from perdure.proving.rules import Rule
from perdure.proving.rules.commits import commits
from perdure.proving.rules.lifetimes import lifetimes
from perdure.proving.rules.logs import logs
from perdure.proving.rules.moving import moving
from perdure.proving.rules.scans import scans
from perdure.proving.subject import Store, Subject

RULES: tuple[Rule, ...] = (
    *commits.rules,
    *logs.rules,
    *scans.rules,
    *moving.rules,
    *lifetimes.rules,
)

ENGINES = "PERDURE_ENGINES"
"""Environment variable: the engines a test run asks for, by name, with commas between."""


async def applies(rule: Rule, subject: Subject, directory: Path) -> bool:
    """Whether a rule is about this engine at all; what it survives is read from the engine."""
    if (rule.damaging and not subject.damage) or (rule.copying and not subject.copy):
        return False
    if not rule.durable:
        return True
    engine = await Store(subject, directory).open()
    await engine.close()
    return engine.survives.process_crash


async def run(rule: Rule, subject: Subject, directory: Path) -> None:
    """Run one rule on a fresh store in an empty directory. Raises whatever shows it broken."""
    store = Store(subject, directory)
    try:
        await rule.check(store)
    finally:
        await store.close()


async def first_broken(
    subject: Subject, directory: Path, rules: Sequence[Rule] = RULES
) -> str | None:
    """The first rule that an engine does not keep, and how; None where it keeps them all."""
    for number, rule in enumerate(rules):
        fresh = _fresh(directory, number)
        if await applies(rule, subject, fresh / "asked"):
            try:
                await run(rule, subject, fresh)
            except Exception as error:
                return f"{rule.name}: {type(error).__name__}: {error}"
    return None


async def prove(subject: Subject, directory: Path, rules: Sequence[Rule] = RULES) -> None:
    """Run every rule, each in its own directory under `directory`, and print what came out.

    Raises `Broken` naming the rules that do not hold, after all of them ran.
    """
    failed: list[str] = []
    skipped: list[str] = []
    for number, rule in enumerate(rules):
        fresh = _fresh(directory, number)
        if not await applies(rule, subject, fresh / "asked"):
            skipped.append(rule.name)
            continue
        try:
            await run(rule, subject, fresh)
        except Exception as error:
            failed.append(rule.name)
            print(f"{subject.name}: BROKEN {rule.name}: {type(error).__name__}: {error}")
    ran = len(rules) - len(skipped)
    print(f"{subject.name}: {ran - len(failed)} of {ran} rules hold; not applicable: {skipped}")
    if failed:
        raise Broken(f"{subject.name} does not keep: {'; '.join(failed)}")


def asked_for(known: Mapping[str, Subject], environment: Mapping[str, str]) -> list[Subject]:
    """The subjects that `ENGINES` names, all that are known where it is not set.

    Raises `Invalid` for one that is not known: a run never quietly proves another engine.
    """
    names = environment.get(ENGINES, ",".join(known)).split(",")
    absent = [name for name in names if name not in known]
    if absent:
        raise Invalid(
            f"{ENGINES} asks for {', '.join(map(repr, absent))}, and only {', '.join(known)} can "
            "be proven here. Install its driver, or ask for another."
        )
    return [known[name] for name in names]


def _fresh(directory: Path, number: int) -> Path:
    """The directory of one rule, with one in it for asking whether the rule applies."""
    fresh = directory / f"{number}"
    for part in (fresh, fresh / "asked"):
        part.mkdir(parents=True)
    return fresh
