"""Configuration: `perdure.toml`, then `PERDURE_*` in the environment, then flags; the last wins.

A key nobody knows is an error naming the nearest known one, because a misspelt limit would
otherwise be a limit that is not there. Secrets never stand in the file: it names the environment
variable or the file that holds them.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from perdure.core.addresses import of_shards, shards_of, without_credentials
from perdure.core.errors import Invalid
from perdure.core.limits import VALUE_BYTES_MAX
from perdure.core.promises import Profile
from perdure.services.continuing import Continues

Seconds = Annotated[float, Meta(gt=0, le=24 * 3600)]
Count = Annotated[int, Meta(ge=1, le=2**31)]
OrNone = Annotated[int, Meta(ge=0, le=2**31)]
Port = Annotated[int, Meta(ge=0, le=65535)]
OnDisconnect = Literal["continue", "cancel"]
StorePolicy = Literal["asked", "always"]
OrphanPolicy = Literal["repair", "refuse"]

ENVIRONMENT_PREFIX = "PERDURE_"
_API_KEY = "PERDURE_API_KEY"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DEFAULT_FILE = Path("perdure.toml")


class Secret(msgspec.Struct, frozen=True):
    """Where a secret is: the name of an environment variable, or a file with one per line."""

    env: str | None = None
    file: str | None = None

    def read(self, what: str, environment: Mapping[str, str]) -> tuple[str, ...]:
        """The secrets, none where neither place is named. Raises `Invalid` for a named place
        that is absent or empty: a service must not come up without the key it was told to use."""
        if self.file is not None:
            try:
                text = Path(self.file).read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise Invalid(f"{what}: the file {self.file} cannot be read: {error}.") from None
            return _secrets(text.splitlines(), what, f"the file {self.file}")
        if self.env is not None:
            text = environment.get(self.env, "")
            return _secrets(text.split(","), what, f"the environment variable {self.env}")
        return ()


class Access(msgspec.Struct, frozen=True):
    """Who may call. Several keys are separated by commas in the variable, by lines in the file.
    Where neither is named, the variable PERDURE_API_KEY is used if it is there.

    `store` says whose responses are stored: of those who do not ask otherwise, or `always`. The
    stored keys are further ones, for callers whose responses always are."""

    api_key_env: str | None = None
    api_key_file: str | None = None
    stored_key_env: str | None = None
    stored_key_file: str | None = None
    store: StorePolicy = "asked"

    def keys(self, environment: Mapping[str, str]) -> tuple[str, ...]:
        """Every accepted API key; none means that anyone who reaches the port may call."""
        env = self.api_key_env
        if env is None and self.api_key_file is None and _API_KEY in environment:
            env = _API_KEY
        plain = Secret(env, self.api_key_file).read("the API keys", environment)
        return plain + self.stored_keys(environment)

    def stored_keys(self, environment: Mapping[str, str]) -> tuple[str, ...]:
        """The API keys of callers whose responses are stored whatever they ask for."""
        place = Secret(self.stored_key_env, self.stored_key_file)
        return place.read("the API keys that are always stored", environment)


class Upstream(msgspec.Struct, frozen=True):
    """An OpenAI-compatible server that generates: the table `[upstream]` is one, each table of
    `[[upstreams]]` another. Without any the built-in model answers.

    `api` is how it is asked: by chat completions, by the Responses API, or, with `auto`, by the
    latter where it has it. `models` are names or patterns (`qwen*`) of what is asked of it,
    everything it lists if none; `aliases` other names of its models. `continues` is the way in
    which it can be asked, by chat completions, to go on with a message that was cut short.
    """

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "upstream"
    url: str | None = None
    api: Literal["chat", "responses", "auto"] = "chat"
    models: tuple[str, ...] = ()
    aliases: dict[str, str] = {}
    continues: Continues = "no"
    key_env: str | None = None
    key_file: str | None = None
    connect_timeout_s: Seconds = 5.0
    read_timeout_s: Seconds = 300.0
    attempts_max: Count = 3
    required: bool = False
    """Whether a server whose upstream does not answer is unready, or only says so."""

    def key(self, environment: Mapping[str, str]) -> str | None:
        """The bearer token to send, None for an upstream without one."""
        what = f"the upstream's key ({self.name})"
        found = Secret(self.key_env, self.key_file).read(what, environment)
        if len(found) > 1:
            raise Invalid(f"{what}: one key is needed, not several.")
        return found[0] if found else None


_BODY_BYTES_MAX = VALUE_BYTES_MAX - 1024 * 1024
"""Every event of a response's life echoes its request; what else it says must fit beside that."""


class Limits(msgspec.Struct, frozen=True):
    """What one client may take. A rate of 0 is no limit."""

    body_bytes_max: Annotated[int, Meta(ge=1024, le=_BODY_BYTES_MAX)] = _BODY_BYTES_MAX
    file_bytes_max: Annotated[int, Meta(ge=1, le=2**40)] = 512 * 1024 * 1024
    head_bytes_max: Annotated[int, Meta(ge=1024, le=2**24)] = 64 * 1024
    head_timeout_s: Seconds = 10.0
    read_timeout_s: Seconds = 30.0
    idle_timeout_s: Seconds = 75.0
    connections_max: Count = 12_000
    requests_per_minute: OrNone = 0
    burst: Count = 60
    heartbeat_s: Seconds = 15.0
    stall_timeout_s: Seconds = 30.0
    drain_s: Annotated[float, Meta(ge=0, le=3600)] = 10.0


class Jobs(msgspec.Struct, frozen=True):
    """Work that goes on while nobody waits for it. A job whose process died `attempts_max` times
    over it is given up; a stop in good order does not count. An upstream that cannot be reached, or
    is left alone for its failures, is waited for."""

    running_max: Annotated[int, Meta(ge=1, le=4096)] = 64
    attempts_max: Annotated[int, Meta(ge=1, le=100)] = 5
    upstream_wait_s: Annotated[float, Meta(ge=0)] = 600.0


class Retention(msgspec.Struct, frozen=True):
    """How much history is kept. Conversations are kept until they are deleted, and so are responses
    unless `responses_days` is set: then they go that long after they were created, but for those
    that a later response continues. What a conversation holds is its own and stays."""

    responses_days: Annotated[float, Meta(gt=0, le=36_500)] | None = None
    boots_kept: Count = 1_000


class Tools(msgspec.Struct, frozen=True):
    """Tools that clients run. `orphans` are calls of earlier turns whose output never came: they
    are given one that says so, or the request that builds on them is refused. A tool that is
    `unsupported` (nobody here can run it) has its request refused, or is dropped and named in a
    header of the answer."""

    orphans: OrphanPolicy = "repair"
    unsupported: Literal["refuse", "drop"] = "refuse"


class Config(msgspec.Struct, frozen=True):
    """Everything that can be set. Sub-tables of the file are the nested structs."""

    data: str = "./perdure-data"
    engine: str | None = None
    shards: tuple[str, ...] = ()
    """Instead of one engine: the URLs of several, in any order once they know each other."""
    blobs: str | None = None
    host: str = "127.0.0.1"
    port: Port = 8420
    profile: Profile = "local"
    workers: Annotated[int, Meta(ge=1, le=256)] = 1
    on_disconnect: OnDisconnect = "continue"
    log_requests: bool = True
    access: Access = Access()
    upstream: Upstream = Upstream()
    upstreams: tuple[Upstream, ...] = ()
    limits: Limits = Limits()
    jobs: Jobs = Jobs()
    retention: Retention = Retention()
    tools: Tools = Tools()

    @property
    def data_path(self) -> Path:
        return Path(self.data).expanduser()

    @property
    def engine_url(self) -> str:
        """The engine asked for; SQLite inside the data directory unless one was."""
        if self.shards:
            return of_shards(self.shards)
        return self.engine or f"sqlite:///{self.data_path / 'perdure.db'}"

    @property
    def shares_engine(self) -> bool:
        """Whether other processes may use the same engine at the same time."""
        urls = shards_of(self.engine_url) or [self.engine_url]
        return all(url.startswith(("postgresql:", "postgres:")) for url in urls)

    def process_lock(self, number: int) -> Path:
        """The lock of the n-th process over this data directory, where there may be several."""
        return self.data_path / f"process-{number}.lock"

    @property
    def engine_shown(self) -> str:
        """The same as people may see it."""
        return without_credentials(self.engine_url)

    @property
    def every_upstream(self) -> tuple[Upstream, ...]:
        """All that are configured, in the order in which they are asked for a model."""
        return (*((self.upstream,) if self.upstream.url else ()), *self.upstreams)

    @property
    def blobs_url(self) -> str:
        """Where the bytes of files are kept: beside the engine, in memory if that is, unless
        another place was asked for."""
        if self.blobs is None and self.engine == "memory://":
            return "memory://"
        return self.blobs or f"file:///{self.data_path.absolute() / 'blobs'}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the port."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def load(
    *,
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration in force. `file` must exist when given; else `perdure.toml` in the
    working directory is read where there is one. `flags` are dotted names; None is not given.

    Raises `Invalid` naming the source, the key and what is wrong.
    """
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {}
    for name, raw in _file_values(file):
        values[name] = _convert(name, raw, f"{file or _DEFAULT_FILE}", strict=True)
    for variable, name in _BY_VARIABLE.items():
        if variable in environment:
            source = f"the environment variable {variable}"
            values[name] = _convert(name, environment[variable], source, strict=False)
    for name, raw in (flags or {}).items():
        if raw is not None:
            values[name] = _convert(name, raw, f"--{name.split('.')[-1].replace('_', '-')}", True)
    config = msgspec.convert(_nested(values), Config)
    _check(config, environment)
    return config


def api_keys(config: Config, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The accepted API keys. Raises `Invalid` where strangers could reach a server without any."""
    keys = config.access.keys(environment)
    if not keys and not config.loopback:
        raise Invalid(
            f"host {config.host} can be reached from other machines, so an API key is required. "
            "Set access.api_key_env (or PERDURE_ACCESS_API_KEY_ENV) to the name of an environment "
            "variable that holds it, or access.api_key_file to a file; or serve on 127.0.0.1."
        )
    return keys


def _leaves(struct: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that can be set, dotted, with its type."""
    for name, kind in get_type_hints(struct, include_extras=True).items():
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            yield from _leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


KNOWN: Mapping[str, Any] = dict(_leaves(Config))
_BY_VARIABLE = {
    ENVIRONMENT_PREFIX + name.replace(".", "_").upper(): name
    for name, kind in KNOWN.items()
    if get_origin(kind) not in (tuple, dict)
}
"""What fits into a variable: single values. Lists and tables are for the file."""


def _file_values(file: Path | None) -> Iterator[tuple[str, Any]]:
    path = file or _DEFAULT_FILE
    if file is None and not path.exists():
        return
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise Invalid(f"the configuration {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Invalid(f"the configuration {path} is not TOML: {error}.") from None
    yield from _flat(table, "", str(path))


def _flat(table: dict[str, Any], prefix: str, source: str) -> Iterator[tuple[str, Any]]:
    tables = {name.rsplit(".", 1)[0] for name in KNOWN if "." in name}
    for key, raw in table.items():
        name = prefix + key
        if name in tables:
            if not isinstance(raw, dict):
                raise Invalid(f"{source}: {name} is a table: write its keys under [{name}].")
            yield from _flat(raw, name + ".", source)
        elif name in KNOWN:
            yield name, raw
        else:
            raise Invalid(_unknown(source, name, [*KNOWN, *tables]))


def _unknown(source: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(known))}."
    return f"{source}: nobody reads the key {name}{hint}"


def _convert(name: str, raw: Any, source: str, strict: bool) -> Any:
    if name == "upstreams":
        return _entries(raw, source)
    try:
        return msgspec.convert(raw, KNOWN[name], strict=strict)
    except msgspec.ValidationError as error:
        raise Invalid(f"{source}: {name} = {raw!r} does not fit: {error}.") from None


def _entries(raw: Any, source: str) -> Any:
    """The tables of `[[upstreams]]`, key by key like any other: none may be unknown."""
    if not isinstance(raw, list) or not all(isinstance(entry, dict) for entry in raw):
        raise Invalid(f"{source}: upstreams are tables: write each under [[upstreams]].")
    for place, entry in enumerate(raw):
        at = f"upstreams[{place}]"
        for key, value in entry.items():
            if f"upstream.{key}" not in KNOWN:
                known = [f"{at}.{field}" for field in Upstream.__struct_fields__]
                raise Invalid(_unknown(source, f"{at}.{key}", known))
            _convert(f"upstream.{key}", value, f"{source}: {at}", strict=True)
        for key in ("name", "url"):
            if key not in entry:
                raise Invalid(f"{source}: {at} has no {key}; every upstream needs one.")
    return raw


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in values.items():
        *path, leaf = name.split(".")
        table = made
        for part in path:
            table = table.setdefault(part, {})
        table[leaf] = value
    return made


def _check(config: Config, environment: Mapping[str, str]) -> None:
    """What no single key can get wrong."""
    if config.engine and config.shards:
        raise Invalid("engine and shards are both set; keep shards, with the engine among them.")
    places = {
        "access.api_key": (config.access.api_key_env, config.access.api_key_file),
        "access.stored_key": (config.access.stored_key_env, config.access.stored_key_file),
    }
    for upstream in (config.upstream, *config.upstreams):
        places[f"{upstream.name}.key"] = (upstream.key_env, upstream.key_file)
    for name, (env, file) in places.items():
        if env is not None and file is not None:
            raise Invalid(f"{name}_env and {name}_file are both set; keep one.")
        if env is not None and not _VARIABLE.fullmatch(env):
            raise Invalid(f"{name}_env is the name of a variable that holds the key, not the key.")
    _check_upstreams(config.every_upstream)
    if config.workers > 1 and not (config.shares_engine and config.profile == "shared"):
        raise Invalid(
            f"workers = {config.workers} are processes that share a store, so they need "
            f'an engine postgresql://... and profile = "shared"; these are {config.engine_shown} '
            f'and "{config.profile}".'
        )
    known = {*_BY_VARIABLE, _API_KEY, *(env for env, _ in places.values() if env)}
    for variable in environment:
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in known:
            raise Invalid(_unknown("the environment", variable, list(known)))


def _check_upstreams(upstreams: tuple[Upstream, ...]) -> None:
    names: set[str] = set()
    aliases: dict[str, str] = {}
    for upstream in upstreams:
        if not (upstream.url or "").startswith(("http://", "https://")):
            raise Invalid(
                f"{upstream.name}.url = {upstream.url!r} is not an http:// or https:// URL."
            )
        if upstream.name in names:
            raise Invalid(f"two upstreams are named {upstream.name}; name one of them differently.")
        names.add(upstream.name)
        if upstream.continues != "no" and upstream.api == "responses":
            raise Invalid(
                f"{upstream.name}.continues is for chat completions, and {upstream.name}.api is "
                "'responses'; use 'chat' or 'auto', or leave it out."
            )
        for alias in upstream.aliases:
            if alias in aliases:
                raise Invalid(
                    f"the alias {alias} stands at two upstreams, {aliases[alias]} and "
                    f"{upstream.name}; keep one."
                )
            aliases[alias] = upstream.name


def _secrets(lines: list[str], what: str, where: str) -> tuple[str, ...]:
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise Invalid(f"{what}: {where} is absent or empty.")
    for secret in found:
        if not secret.isascii() or not secret.isprintable() or " " in secret:
            raise Invalid(f"{what}: {where} holds a key with a space or an unprintable character.")
    return found
