"""Configuration: the order of its sources, and refusals that name source and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perdure.core.errors import Invalid
from perdure.services import config as configuration


def load(
    tmp_path: Path, toml: str = "", env: dict[str, str] | None = None, **flags: Any
) -> configuration.Config:
    file = tmp_path / "perdure.toml"
    file.write_text(toml)
    return configuration.load(
        file=file,
        environment=env or {},
        flags={name.replace("__", "."): value for name, value in flags.items()},
    )


def test_file_then_environment_then_flags(tmp_path: Path) -> None:
    toml = (
        'port = 1\nhost = "::1"\n[limits]\nburst = 7\ndrain_s = 2\n[upstream]\nurl = "http://a/v1"'
    )
    env = {"PERDURE_PORT": "2", "PERDURE_LIMITS_DRAIN_S": "0.5", "PERDURE_LOG_REQUESTS": "false"}
    config = load(tmp_path, toml, env, port=3, host=None)
    assert config.port == 3
    assert config.host == "::1"
    assert config.loopback
    assert config.limits.burst == 7
    assert config.limits.drain_s == 0.5
    assert config.log_requests is False
    assert config.upstream.url == "http://a/v1"
    assert load(tmp_path, toml, env).port == 2


def test_the_engine_defaults_into_the_data_directory(tmp_path: Path) -> None:
    config = load(tmp_path, data="/srv/p")
    assert config.engine_url == "sqlite:////srv/p/perdure.db"
    assert load(tmp_path, engine="memory://").engine_url == "memory://"


# proves C2
@pytest.mark.parametrize(
    ("toml", "env", "flags", "told"),
    [
        ("prot = 1", {}, {}, ("perdure.toml", "prot", "did you mean port?")),
        ("[limits]\nbrust = 1", {}, {}, ("limits.brust", "did you mean limits.burst?")),
        ("[limit]\nburst = 1", {}, {}, ("limit", "did you mean limits?")),
        ("upstream = 3", {}, {}, ("upstream is a table", "[upstream]")),
        ('[upstream]\nkey = "sk-live"', {}, {}, ("upstream.key", "did you mean upstream.key_")),
        ('port = "8420"', {}, {}, ("port", "Expected `int`")),
        ("port = 70000", {}, {}, ("port", "65535")),
        ("port = ", {}, {}, ("is not TOML",)),
        ("", {"PERDURE_PROT": "1"}, {}, ("PERDURE_PROT", "did you mean PERDURE_PORT?")),
        ("", {"PERDURE_PORT": "ten"}, {}, ("PERDURE_PORT", "'ten'")),
        ("", {"PERDURE_UPSTREAM_KEY": "sk"}, {}, ("PERDURE_UPSTREAM_KEY", "KEY_ENV")),
        ("", {}, {"profile": "cluster"}, ("--profile", "cluster")),
        ("", {}, {"upstream__url": "localhost:1"}, ("upstream.url", "http://")),
        ("[[upstreams]]\nname = 'a'", {}, {}, ("perdure.toml", "upstreams[0] has no url")),
        ("upstreams = 3", {}, {}, ("upstreams are tables", "[[upstreams]]")),
        (
            '[[upstreams]]\nname = "a"\nurl = "http://a"\nkey = "sk-live"',
            {},
            {},
            ("upstreams[0].key", "did you mean upstreams[0].key_"),
        ),
        ("[[upstreams]]\nname = 'a/b'\nurl = 'http://a'", {}, {}, ("upstreams[0]", "'a/b'")),
        ("[[upstreams]]\nname = 'a'\nurl = 'a'", {}, {}, ("a.url", "http://")),
        (
            "[[upstreams]]\nname = 'a'\nurl = 'http://a'\n"
            "[[upstreams]]\nname = 'a'\nurl = 'http://b'",
            {},
            {},
            ("two upstreams are named a",),
        ),
        (
            "[upstream]\nurl = 'http://a'\naliases = {x = 'y'}\n"
            "[[upstreams]]\nname = 'b'\nurl = 'http://b'\naliases = {x = 'z'}",
            {},
            {},
            ("the alias x", "upstream and b"),
        ),
        ("", {"PERDURE_UPSTREAMS": "[]"}, {}, ("PERDURE_UPSTREAMS",)),
    ],
)
def test_what_nobody_reads_or_does_not_fit_is_refused_by_name(
    tmp_path: Path,
    toml: str,
    env: dict[str, str],
    flags: dict[str, Any],
    told: tuple[str, ...],
) -> None:
    with pytest.raises(Invalid) as caught:
        load(tmp_path, toml, env, **flags)
    for part in told:
        assert part in str(caught.value)
    assert "sk-live" not in str(caught.value)


def test_a_file_asked_for_must_exist(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"absent\.toml cannot be read"):
        configuration.load(file=tmp_path / "absent.toml", environment={})


def test_secrets_come_from_the_place_named_or_not_at_all(tmp_path: Path) -> None:
    named = load(tmp_path, '[access]\napi_key_env = "KEYS"\n[upstream]\nkey_env = "UP"')
    env = {"KEYS": "one, two", "UP": "sk"}
    assert configuration.api_keys(named, env) == ("one", "two")
    assert named.upstream.key(env) == "sk"
    with pytest.raises(Invalid, match="the environment variable KEYS is absent or empty"):
        configuration.api_keys(named, {})
    with pytest.raises(Invalid, match="the upstream's key"):
        named.upstream.key({"UP": " "})

    kept = tmp_path / "keys"
    kept.write_text("first\n\nsecond\n")
    filed = load(tmp_path, access__api_key_file=str(kept))
    assert configuration.api_keys(filed, {}) == ("first", "second")
    kept.unlink()
    with pytest.raises(Invalid, match="cannot be read"):
        configuration.api_keys(filed, {})

    plain = load(tmp_path)
    assert configuration.api_keys(plain, {}) == ()
    assert configuration.api_keys(plain, {"PERDURE_API_KEY": "k"}) == ("k",)
    assert plain.upstream.key({}) is None


def test_keys_that_are_always_stored_are_keys_as_well(tmp_path: Path) -> None:
    both = load(tmp_path, '[access]\napi_key_env = "KEYS"\nstored_key_env = "KEPT"')
    env = {"KEYS": "one", "KEPT": "two, three"}
    assert configuration.api_keys(both, env) == ("one", "two", "three")
    assert both.access.stored_keys(env) == ("two", "three")
    with pytest.raises(Invalid, match="keep one"):
        load(tmp_path, '[access]\nstored_key_env = "A"\nstored_key_file = "b"')
    with pytest.raises(Invalid, match="always stored: the environment variable KEPT is absent"):
        configuration.api_keys(both, {"KEYS": "one"})


def test_a_key_in_place_of_its_variable_is_refused_without_showing_it(tmp_path: Path) -> None:
    with pytest.raises(Invalid) as caught:
        load(tmp_path, '[upstream]\nkey_env = "sk-very-secret"')
    assert "very-secret" not in str(caught.value)


def test_a_place_for_a_secret_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="keep one"):
        load(tmp_path, '[access]\napi_key_env = "A"\napi_key_file = "b"')


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "example.org"])
def test_strangers_need_a_key(tmp_path: Path, host: str) -> None:
    config = load(tmp_path, host=host)
    with pytest.raises(Invalid, match="an API key is required"):
        configuration.api_keys(config, {})
    assert configuration.api_keys(config, {"PERDURE_API_KEY": "k"}) == ("k",)


# proves R12
def test_several_upstreams_beside_the_short_form(tmp_path: Path) -> None:
    toml = """
        [upstream]
        url = "http://first.example/v1"
        [[upstreams]]
        name = "second"
        url = "http://second.example/v1"
        key_env = "PERDURE_SECOND"
        models = ["qwen*"]
        aliases = {fast = "qwen3:4b"}
        required = true
    """
    environment = {"PERDURE_SECOND": "sk"}
    config = load(tmp_path, toml, environment)
    first, second = config.every_upstream
    assert (first.name, first.url) == ("upstream", "http://first.example/v1")
    assert second.key(environment) == "sk"
    assert (second.models, second.aliases) == (("qwen*",), {"fast": "qwen3:4b"})
    assert (first.required, second.required) == (False, True)
    assert load(tmp_path).every_upstream == ()
