"""Actors: one for each surface that promises to survive something (see `proving.workload`)."""

from __future__ import annotations

from perdure.proving.actors.blobs import BlobsActor
from perdure.proving.actors.boots import BootsActor
from perdure.proving.actors.conversations import ConversationsActor
from perdure.proving.actors.files import FilesActor
from perdure.proving.actors.idempotency import IdempotencyActor
from perdure.proving.actors.items import ItemsActor
from perdure.proving.actors.jobs import JobsActor
from perdure.proving.actors.responses import ResponsesActor
from perdure.proving.actors.retentions import RetentionsActor
from perdure.proving.actors.seals import SealsActor
from perdure.proving.actors.workers import WorkersActor
from perdure.proving.workload import Actor


def actors() -> list[Actor]:
    """A fresh actor for every surface, in the order in which they judge."""
    return [
        ResponsesActor(),
        JobsActor(),
        ConversationsActor(),
        ItemsActor(),
        FilesActor(),
        BlobsActor(),
        IdempotencyActor(),
        SealsActor(),
        WorkersActor(),
        RetentionsActor(),
        BootsActor(),
    ]
