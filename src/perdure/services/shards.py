"""What is wrong with the shards of a store, for operators: in readiness, listings and `status`."""

from __future__ import annotations

from perdure.core.engine import Sharding, ShardState


def shard_warnings(sharding: Sharding | None) -> list[str]:
    """Which shards do not answer, and what that means, one line a shard."""
    if sharding is None:
        return []
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
