"""What an operator always stores, by key, as the official SDK sees it."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from tests.e2e.http_server import serving


# proves R6
async def test_a_key_may_be_stored_always(tmp_path: Path) -> None:
    config = tmp_path / "perdure.toml"
    config.write_text('[access]\napi_key_env = "KEYS"\nstored_key_env = "KEPT_KEYS"\n')
    keys = {"KEYS": "free", "KEPT_KEYS": "kept"}
    async with serving(tmp_path / "data", "--config", str(config), **keys) as server:
        async with server.sdk(api_key="kept") as sdk:
            asked = await sdk.responses.with_raw_response.create(
                model="perdure-extract", input="remember me", store=False
            )
            made = asked.parse()
            assert made.model_dump()["store"] is True
            assert asked.headers["x-perdure-store"].startswith("always")
            assert await sdk.responses.retrieve(made.id) == made
        async with server.sdk(api_key="free") as sdk:
            asked = await sdk.responses.with_raw_response.create(
                model="perdure-extract", input="forget me", store=False
            )
            assert asked.parse().model_dump()["store"] is False
            assert "x-perdure-store" not in asked.headers
            with pytest.raises(openai.NotFoundError):
                await sdk.responses.retrieve(asked.parse().id)


# proves R6
async def test_a_server_without_keys_may_store_always(tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with serving(data, PERDURE_ACCESS_STORE="always") as server, server.sdk() as sdk:
        asked = await sdk.responses.with_raw_response.create(
            model="perdure-extract", input="remember me", store=False
        )
        assert asked.headers["x-perdure-store"].startswith("always")
        assert (await sdk.responses.retrieve(asked.parse().id)).id == asked.parse().id
