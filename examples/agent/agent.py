"""An agent that may be killed at any moment and goes on where it was.

It asks a model over a gateway, runs the tool that the model calls, and keeps what was said in files
that it opens itself. What comes next is told by the transcript alone: a step ends with one commit,
and a step that was cut off is done again under the name it had. Nothing else is remembered.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

import perdure

RUNTIME, WORKER = "desk", "clerk"
AT = (RUNTIME, WORKER)

Item = dict[str, Any]
Tool = Callable[..., str]

NOTE: Any = {
    "type": "function",
    "name": "note",
    "description": "Write a line into the notebook. Returns how many lines it has.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"text": {"type": "string"}},
        "required": ["text"],
        "additionalProperties": False,
    },
}


def notebook(path: Path) -> Tool:
    """The tool. It may be called again under an operation's name, if the process died before the
    result was committed; so a line and the name of its operation are one write, and a name that is
    in the notebook already is not written again."""

    def note(operation: str, text: str) -> str:
        with path.open("a+") as file:
            file.seek(0)
            lines = [json.loads(line) for line in file]
            if operation not in [line["operation"] for line in lines]:
                lines.append({"operation": operation, "text": text})
                file.write(json.dumps(lines[-1]) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return f"the notebook has {len(lines)} lines"

    return note


def told(transcript: list[Any]) -> tuple[list[Any], Item | None]:
    """What a model is told, in its order, and the call of a tool that has no result yet. An input
    that came in the middle of a turn is told when that is over."""
    items: list[Any] = []
    later: list[Item] = []
    calls: list[Item] = []
    busy = False
    for said in transcript:
        if said.role == "user":
            later.append({"role": "user", "content": said.content})
        elif said.role == "tool":
            items.append(said.content)
            calls.pop(0)
        else:
            items += said.content
            calls = [item for item in said.content if item["type"] == "function_call"]
            busy = bool(calls)
        if later and not busy:
            items.append(later.pop(0))
            busy = True
    return items, calls[0] if calls else None


def transcript(workers: Any) -> list[Any]:
    """All that was said, page by page."""
    said: list[Any] = []
    page = workers.transcript(*AT)
    while page.data:
        said += page.data
        page = workers.transcript(*AT, after=page.cursor)
    return said


class Agent:
    """One run of the worker, which holds it until `run` returns."""

    def __init__(
        self, workers: Any, sdk: openai.OpenAI, model: str, tools: dict[str, Tool]
    ) -> None:
        self._workers = workers
        self._name = workers.events(*AT, limit=1).data[0].id  # no other worker ever has it
        self._sdk = sdk
        self._model = model
        self._tools = tools

    def run(self) -> None:
        """Take step after step until every input is answered."""
        generation = self._workers.start(*AT).generation
        try:
            while self._workers.inputs(*AT, limit=1).data:
                step = self._step()
                self._workers.progress(*AT, {"generation": generation, **step})
                if step["name"] == "failed":
                    raise SystemExit("the model has failed; run this again to ask it anew")
        finally:
            self._workers.release(*AT, {"generation": generation})

    def _step(self) -> Item:
        """Do what comes next, and say what is to be committed of it."""
        items, call = told(transcript(self._workers))
        if call is None:
            return self._ask(items)
        try:
            arguments = json.loads(call["arguments"])
            output = self._tools[call["name"]](f"{self._name}-{len(items)}", **arguments)
        except (KeyError, TypeError, ValueError) as error:
            output = f"this call is wrong: {error!r}"
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": output}
        return {"name": call["name"], "transcript": [{"role": "tool", "content": result}]}

    def _ask(self, items: list[Any]) -> Item:
        """Ask the model. The gateway answers the same request under the same name once: an answer
        that was on its way when this process died is not generated, or paid for, again."""
        failed = self._workers.state(*AT).value or 0
        answer = self._sdk.responses.create(
            model=self._model,
            input=items,
            tools=[NOTE],
            extra_headers={"Idempotency-Key": f"{self._name}-{len(items)}-{failed}"},
        )
        if answer.status != "completed":
            return {"name": "failed", "state": failed + 1}
        said = [item.to_dict(exclude_none=True) for item in answer.output]
        over = all(item["type"] != "function_call" for item in said)
        return {
            "name": "answer",
            "taken": int(over),
            "transcript": [{"role": "assistant", "content": said}],
            "usage": {"tokens": answer.usage.total_tokens if answer.usage else 0},
        }


def show(said: Any) -> str:
    """An entry of the transcript, as a line."""
    if said.role == "user":
        return f"user: {said.content}"
    if said.role == "tool":
        return f"tool: {said.content['output']}"
    parts = [
        f"calls {item['name']} {item['arguments']}"
        if item["type"] == "function_call"
        else "".join(part.get("text", "") for part in item.get("content", ()))
        for item in said.content
    ]
    return f"assistant: {' '.join(filter(None, parts))}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer inputs, or go on with those there are.")
    parser.add_argument("directory", type=Path, help="where the agent keeps all it has")
    parser.add_argument("input", nargs="?", help="what to do, if there is something new")
    parser.add_argument("--submission", help="the input's id: given twice, it is accepted once")
    parser.add_argument("--model", default="any")
    parser.add_argument("--gateway", default="http://127.0.0.1:8420/v1")
    asked = parser.parse_args()
    sdk = openai.OpenAI(base_url=asked.gateway, api_key="unused")
    with perdure.blocking(f"file:///{asked.directory / 'state'}") as state:
        state.workers.create_runtime({"id": RUNTIME})
        state.workers.create(RUNTIME, {"id": WORKER})
        if asked.input is not None:
            given = {"content": asked.input, "submission_id": asked.submission}
            state.workers.input(*AT, given)
        tools = {"note": notebook(asked.directory / "notes.jsonl")}
        Agent(state.workers, sdk, asked.model, tools).run()
        for said in transcript(state.workers):
            print(show(said))


if __name__ == "__main__":
    main()
