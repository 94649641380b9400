"""The drills, in the order of the fault model: one file for each fault."""

from __future__ import annotations

from perdure.proving.drills.accepted import KilledInput
from perdure.proving.drills.blob_cuts import CutBlobs
from perdure.proving.drills.calls import FailedSystemCalls, FullSystem, KilledCalls
from perdure.proving.drills.clocks import JumpedBlobs, JumpedEngine, JumpedServer
from perdure.proving.drills.crashes import KilledServer, KilledWriter
from perdure.proving.drills.cuts import CutEngine, CutServer
from perdure.proving.drills.damage import DamagedBlobs, DamagedEngine
from perdure.proving.drills.damaged_server import DamagedServer
from perdure.proving.drills.database import FailingDatabase
from perdure.proving.drills.drill import Drill
from perdure.proving.drills.ext4 import CutExt4
from perdure.proving.drills.failing_blobs import FAILING_BLOBS
from perdure.proving.drills.failing_server import FAILING_SERVERS
from perdure.proving.drills.failures import FailedCalls, FullDisk
from perdure.proving.drills.file_cuts import CutFiles
from perdure.proving.drills.file_damage import DamagedFiles
from perdure.proving.drills.file_failures import FAILING_FILES
from perdure.proving.drills.full_database import FullDatabase
from perdure.proving.drills.histories import ContendingClients
from perdure.proving.drills.owned_server import OwnedServer
from perdure.proving.drills.owners import KilledBlobs, OwnedBlobs, OwnedEngine
from perdure.proving.drills.read_only import LookedAtEngine, ReadOnlyEngine, ReadOnlyExt4
from perdure.proving.drills.requests import ContendingRequests
from perdure.proving.drills.shards import KilledMoves
from perdure.proving.drills.slow import SlowBlobs, SlowEngine
from perdure.proving.drills.slow_server import SlowServer

DRILLS: tuple[Drill, ...] = (
    KilledWriter(),
    KilledWriter("files"),
    KilledCalls(),
    KilledCalls(subject="files-process"),
    KilledInput(),
    KilledInput("engine"),
    ContendingClients(),
    KilledBlobs(),
    ContendingRequests(),
    KilledServer(),
    FailingDatabase(),
    KilledMoves(),
    CutEngine(),
    CutFiles(),
    CutBlobs(),
    CutServer(),
    CutExt4(),
    CutExt4(subject="files-ext4"),
    FailedCalls(),
    FailedSystemCalls(),
    FailedSystemCalls(subject="files-process"),
    FullDisk(),
    FullSystem(),
    FullDatabase(),
    FullSystem(subject="files-process"),
    *FAILING_FILES,
    *FAILING_BLOBS,
    *FAILING_SERVERS,
    ReadOnlyEngine(),
    ReadOnlyEngine("files"),
    LookedAtEngine(),
    LookedAtEngine(subject="files-process"),
    ReadOnlyExt4(),
    ReadOnlyExt4(subject="files-ext4"),
    DamagedEngine(),
    DamagedFiles(),
    DamagedBlobs(),
    DamagedServer(),
    JumpedEngine(),
    JumpedEngine("files"),
    JumpedBlobs(),
    JumpedServer(),
    OwnedEngine(),
    OwnedEngine(subject="files"),
    OwnedBlobs(),
    OwnedServer(),
    SlowEngine(),
    SlowEngine("files"),
    SlowBlobs(),
    SlowServer(),
)
