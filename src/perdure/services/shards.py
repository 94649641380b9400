"""What is to be known of the shards of a store, for operators: in readiness, listings, `status`."""

from __future__ import annotations

from perdure.core.engine import Moving, Sharding, ShardState


def shard_warnings(sharding: Sharding | None) -> list[str]:
    """Which shards do not answer, and what is being moved; what that means, and what to do."""
    if sharding is None:
        return []
    told = [] if sharding.moving is None else [_moving(sharding.moving, sharding)]
    return told + _lacking(sharding)


def _moving(moving: Moving, sharding: Sharding) -> str:
    far = "" if moving.partitions is None else f", {moving.partitions} so far"
    drained = [shard.id for shard in sharding.shards if shard.id and shard.id not in moving.to]
    again = " ".join(["perdure reshard", *(f"--drain {id}" for id in drained)])
    who = (
        "This process is at it."
        if moving.here
        else f"If nobody is at it any more, it was cut off: run `{again}` again, and it goes on."
    )
    return (
        f"partitions are being moved from the shards {', '.join(moving.members)} to "
        f"{', '.join(moving.to)}{far}. All are readable and writable; until it has ended there is "
        f"no backup and no copy. {who}"
    )


def _lacking(sharding: Sharding) -> list[str]:
    unseen = [shard for shard in sharding.shards if shard.id is None]
    if sharding.missing and not unseen:
        return [
            f"shard {id} was added, and this process was started without it: what lives there is "
            "unavailable here. List it for this process too, and start it again."
            for id in sharding.missing
        ]
    return [_down(shard, sharding.missing) for shard in sharding.shards if shard.down]


def _down(shard: ShardState, missing: tuple[str, ...]) -> str:
    ids = (shard.id,) if shard.id else missing
    named = f"{' or '.join(ids)} at {shard.url}" if ids else f"at {shard.url}"
    if shard.primary:
        fails = "nothing works without it, as it keeps what is not partitioned"
    elif shard.member or missing:
        fails = "the partitions that live in it are unavailable until it is back; others work"
    else:
        fails = "nothing lives in it yet, and nothing is moved before it answers"
    return f"shard {named} is down: {fails}. It is tried again all the time. {shard.down}"
