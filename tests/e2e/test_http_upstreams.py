"""Several upstreams behind one server, as the official SDK and a configuration file meet them."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest

from perdure.proving.upstream import ScriptedUpstream
from tests.e2e.http_server import serving


# proves R12
async def test_upstreams_of_the_file_are_merged_and_asked_by_name(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream(models=("small",)) as left,
        ScriptedUpstream(models=("large",)) as right,
    ):
        (tmp_path / "perdure.toml").write_text(
            f"""
            [[upstreams]]
            name = "left"
            url = "{left.url}"
            [[upstreams]]
            name = "right"
            url = "{right.url}"
            aliases = {{best = "large"}}
            """
        )
        async with serving(tmp_path / "data") as server, server.sdk() as sdk:
            listed = [(model.id, model.owned_by) async for model in sdk.models.list()]
            assert listed == [("small", "left"), ("best", "right"), ("large", "right")]
            made = await sdk.responses.create(model="best", input="echo hi")
            assert (made.model, made.output_text) == ("best", "hi")
            assert [sent["model"] for sent in await right.received()] == ["large"]
            with pytest.raises(openai.BadRequestError, match="There are: small, best, large"):
                await sdk.responses.create(model="huge", input="echo hi")
