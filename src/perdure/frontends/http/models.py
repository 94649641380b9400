"""Routes of the Models API: what can be asked, by the names requests use."""

from __future__ import annotations

from typing import Literal

import msgspec

from perdure.frontends.http.call import Answer, Call
from perdure.frontends.http.routes import Route
from perdure.frontends.http.service import Service, shown
from perdure.wire.errors import NotFound


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """One model, owned by the upstream that answers to its name. `created` is 0: the upstream's
    own date is not known here."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """Every model, on one page as OpenAI answers it."""

    object: Literal["list"] = "list"
    data: list[Model]


async def models(service: Service) -> list[Model]:
    offered = await service.node.gateway.models()
    return [Model(id=one.id, owned_by=one.owned_by) for one in offered]


async def list_models(service: Service, call: Call) -> Answer:
    return shown(ModelList(data=await models(service)))


async def retrieve(service: Service, call: Call) -> Answer:
    wanted = call.param("model")
    for model in await models(service):
        if model.id == wanted:
            return shown(model)
    raise NotFound("Model", wanted)


ROUTES = (
    Route(
        method="GET",
        path="/v1/models",
        name="list_models",
        summary="The models that can be asked.",
        handler=list_models,
        answer=ModelList,
        statuses=(502,),
    ),
    Route(
        method="GET",
        path="/v1/models/{model:path}",
        name="retrieve_model",
        summary="One model that can be asked; ids of model servers may hold slashes.",
        handler=retrieve,
        answer=Model,
        statuses=(404, 502),
    ),
)
