"""Routes of the Uploads API: files in parts."""

from __future__ import annotations

from perdure.frontends.http.call import Answer, Call
from perdure.frontends.http.multipart import Form
from perdure.frontends.http.routes import Route
from perdure.frontends.http.schemas import AddPartBody
from perdure.frontends.http.service import Service
from perdure.wire.errors import WireError
from perdure.wire.files import (
    PART_BYTES_MAX,
    CompleteUpload,
    CreateUpload,
    UploadObject,
    UploadPartObject,
)


async def create(service: Service, call: Call) -> Answer:
    caller, sent = await service.named(call)
    return Answer(await service.node.uploads.create(caller, sent))


async def add_part(service: Service, call: Call) -> Answer:
    form = Form(call, "data", (), file_bytes_max=PART_BYTES_MAX)
    await form.begin()
    return Answer(
        await service.node.uploads.add(
            call.tenant,
            call.param("upload_id"),
            form.file(),
            lambda sent: service.caller(call, sent),
        )
    )


async def complete(service: Service, call: Call) -> Answer:
    caller, sent = await service.named(call)
    return Answer(await service.node.uploads.complete(caller, call.param("upload_id"), sent))


async def cancel(service: Service, call: Call) -> Answer:
    caller, sent = await service.named(call)
    if sent not in (None, {}):
        raise WireError("A cancellation has no body.", code="unknown_parameter")
    return Answer(await service.node.uploads.cancel(caller, call.param("upload_id")))


ROUTES = (
    Route(
        method="POST",
        path="/v1/uploads",
        name="create_upload",
        summary="Announce a file of up to 8 GB that will come in parts, within an hour.",
        handler=create,
        body=CreateUpload,
        answer=UploadObject,
        gives={"upload_id": "/id"},
        idempotent=True,
    ),
    Route(
        method="POST",
        path="/v1/uploads/{upload_id}/parts",
        name="add_upload_part",
        summary="Keep a part of up to 64 MB. Parts may be sent side by side, in any order.",
        handler=add_part,
        body=AddPartBody,
        body_media="multipart/form-data",
        answer=UploadPartObject,
        gives={"part_id": "/id"},
        statuses=(404,),
        idempotent=True,
    ),
    Route(
        method="POST",
        path="/v1/uploads/{upload_id}/complete",
        name="complete_upload",
        summary="Make the file of the parts named, in the order named.",
        handler=complete,
        body=CompleteUpload,
        answer=UploadObject,
        gives={"file_id": "/file/id"},
        builds={"part_id": {"part_ids": ["$response.body#/id"]}},
        statuses=(404,),
        idempotent=True,
    ),
    Route(
        method="POST",
        path="/v1/uploads/{upload_id}/cancel",
        name="cancel_upload",
        summary="Give an upload up, with its parts.",
        handler=cancel,
        answer=UploadObject,
        statuses=(404, 413),
        idempotent=True,
    ),
)
