"""Going on with a message that was cut short: which can be, how a model server is asked to, and
whether it did.

No standard says how to ask, and a server that cannot do it does not refuse: it answers from the
beginning. So the operator says which way an upstream knows, and what it then says is believed only
once it is text beyond what is stored. Until then nothing of it is told, and in any doubt the answer
is begun anew, where nothing can be lost or said twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from perdure.core.errors import PerdureError
from perdure.wire.fold import View
from perdure.wire.items import text_of
from perdure.wire.responses import CreateResponse

Continues = Literal["no", "continue_final_message", "prefill", "prefix", "prefix_repeated"]

NOT_CONTINUED = "not_continued"
"""Why an attempt is over that was to go on with a message; the next begins anew."""

_RECOGNISED_CHARS = 16
"""An answer that begins with so much of what is stored is taken for one from the beginning."""

_SHAPES = ("grammar", "json_schema", "regex", "ebnf", "structural_tag", "structured_outputs")
"""Fields of model servers' own that constrain the output from its first token on."""


class NotContinued(PerdureError):
    """The upstream does not, or not for certain, go on with the message it was given."""

    code = NOT_CONTINUED


class Way(msgspec.Struct, frozen=True):
    """How a continuation is asked for: fields of the request and of its last message. `repeats`:
    the answer says the message once more before it goes on."""

    fields: Mapping[str, Any] = {}
    marks: Mapping[str, Any] = {}
    repeats: bool = False


WAYS: dict[Continues, Way] = {
    "continue_final_message": Way({"continue_final_message": True, "add_generation_prompt": False}),
    "prefill": Way(),
    "prefix": Way(marks={"prefix": True}),
    "prefix_repeated": Way(marks={"prefix": True}, repeats=True),
}
"""In this order: vLLM and SGLang; llama.cpp, and Ollama where a model's template does it; DeepSeek;
Mistral."""


class Partial(msgspec.Struct, frozen=True):
    """A message to go on with: the item it is, what it says so far, and what was thought before."""

    output_index: int
    text: str
    thought: str = ""


def partial_message(view: View, request: CreateResponse) -> Partial | None:
    """What of a response that was cut short can be gone on with: a message of plain text that is
    all its last attempt has said, but for thoughts before, under a request that constrains no
    output from its beginning."""
    *before, place = sorted(index for index in view.items if index >= view.first) or [-1]
    thoughts = [view.items[index].item for index in before]
    if view.open_indexes() != [place] or _constrained(request):
        return None
    open = view.items[place]
    if open.item["type"] != "message" or list(open.content) != [0]:
        return None
    part = open.content[0]
    plain = part.part["type"] == "output_text" and not part.part.get("annotations")
    if part.done or not plain or part.logprobs or not part.text().strip():
        return None
    if any(item["type"] != "reasoning" for item in thoughts):
        return None
    return Partial(place, part.text(), "\n".join(map(text_of, thoughts)))


def _constrained(request: CreateResponse) -> bool:
    """Whether an answer in two pieces might not be what was asked for: a limit counts tokens of one
    request, a schema describes the whole, log probabilities belong to tokens."""
    format = (request.text or {}).get("format") or {"type": "text"}
    return (
        request.max_output_tokens is not None
        or request.logprobs
        or format["type"] != "text"
        or request.tool_choice not in (None, "auto", "none")
        or any(name in _SHAPES or name.startswith("guided_") for name in request.extra)
    )


def asked_to_go_on(asked: dict[str, Any], partial: Partial, way: Way) -> dict[str, Any]:
    """A chat request as one to go on with a message. White space at its end is not sent: templates
    trim it, and models rarely go on behind it. Thoughts go with it, as with calls. Raises
    `NotContinued` where the messages end with an assistant's already."""
    messages = asked["messages"]
    if messages and messages[-1]["role"] == "assistant":
        raise NotContinued("the input ends with a message of the assistant.")
    last = {"role": "assistant", "content": partial.text.rstrip(), **way.marks}
    if partial.thought:
        last["reasoning_content"] = partial.thought
    return {**asked, **way.fields, "messages": [*messages, last]}


class Continuation:
    """Listens to an answer until it has said something new. What of the stored text the model was
    not given, or is known to repeat, has to come first, exactly, and is left out."""

    def __init__(self, partial: Partial, way: Way) -> None:
        self.output_index = partial.output_index
        text = partial.text
        self._again = text if way.repeats else text[len(text.rstrip()) :]
        self._repeated_chars = 0
        self._beginning = "" if way.repeats else text[:_RECOGNISED_CHARS]
        self._new = ""

    def new(self, said: str) -> str:
        """What is new of everything said so far; empty as long as it may be a repetition. Raises
        `NotContinued` where it is one, or anything but a continuation."""
        at = self._repeated_chars
        again = self._again[at : at + len(said)]
        self._repeated_chars += len(again)
        self._new += said[len(again) :]
        begins = self._beginning and self._new.startswith(self._beginning)
        if begins or not said.startswith(again):
            raise NotContinued("the upstream answers from the beginning.")
        return "" if self._beginning.startswith(self._new) else self._new
