"""Admission: who may call, how often, and from which pages.

Keys are compared by digest in constant time, every one of them, so that neither the time nor the
order tells anything about them. Names of keys in logs and limits are short digests. Callers whose
key is unknown share one rate among themselves; it is never one of a known key, or whoever sends
wrong ones could lock everyone out.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

import msgspec

from perdure.core.clock import Clock
from perdure.core.keys import DEFAULT_TENANT
from perdure.frontends.http.call import Call, Principal
from perdure.frontends.http.errors import Forbidden, TooManyRequests, Unauthorized

ANYONE = Principal(DEFAULT_TENANT, "anyone")
STRANGER = Principal(DEFAULT_TENANT, "stranger")
OPERATOR = Principal(DEFAULT_TENANT, "operator", operator=True)

_LOCAL_NAMES = {b"localhost", b"127.0.0.1", b"[::1]"}


class Bucket:
    """A token bucket: `burst` at once, refilled at `per_minute`."""

    __slots__ = ("_at_s", "_burst", "_per_s", "_tokens")

    def __init__(self, per_minute: int, burst: int, now_s: float) -> None:
        self._per_s = per_minute / 60
        self._burst = float(burst)
        self._tokens = self._burst
        self._at_s = now_s

    def take(self, now_s: float) -> float:
        """Take one token; 0 when there was one, else the seconds until there will be."""
        self._tokens = min(self._burst, self._tokens + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self._per_s


class Admission:
    """Admits callers of the public port."""

    def __init__(
        self,
        keys: Sequence[str],
        *,
        per_minute: int,
        burst: int,
        clock: Clock,
        stored_keys: Sequence[str] = (),
        store_always: bool = False,
    ) -> None:
        self._clock = clock
        self._per_minute = per_minute
        self._anyone = msgspec.structs.replace(ANYONE, store_always=store_always)
        self._callers = [
            (digest := _digest(key), _caller(digest, store_always or key in stored_keys))
            for key in keys
        ]
        self._buckets = {
            caller.name: Bucket(per_minute, burst, clock.monotonic_s())
            for caller in (self._anyone, STRANGER, *(caller for _, caller in self._callers))
            if per_minute
        }

    @property
    def keyed(self) -> bool:
        """Whether a key is required."""
        return bool(self._callers)

    def admit(self, call: Call) -> Principal:
        """Who calls. Raises `Unauthorized`, `Forbidden` or `TooManyRequests`."""
        try:
            caller = self._identify(call) if self._callers else self._local(call)
        except Unauthorized:
            self._take(STRANGER)
            raise
        self._take(caller)
        return caller

    def _take(self, caller: Principal) -> None:
        bucket = self._buckets.get(caller.name)
        if bucket is not None and (wait_s := bucket.take(self._clock.monotonic_s())):
            raise TooManyRequests(self._per_minute, wait_s)

    def _local(self, call: Call) -> Principal:
        _require_same_machine(call)
        return self._anyone

    def _identify(self, call: Call) -> Principal:
        scheme, _, key = call.headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key:
            raise Unauthorized(
                "You didn't provide an API key. Send it as `Authorization: Bearer KEY`."
            )
        digest = _digest(key.decode("latin-1").strip())
        found: Principal | None = None
        for known, caller in self._callers:
            if hmac.compare_digest(known, digest):
                found = caller
        if found is None:
            raise Unauthorized("Incorrect API key provided.")
        return found


class Trusted:
    """Admits everyone as the operator: the control socket's file mode has already decided."""

    keyed = False

    def admit(self, call: Call) -> Principal:
        return OPERATOR


def _caller(digest: bytes, store_always: bool) -> Principal:
    return Principal(DEFAULT_TENANT, f"key-{digest.hex()[:8]}", store_always=store_always)


def _require_same_machine(call: Call) -> None:
    """Without keys the port is loopback's, but a browser there runs pages of strangers. A page may
    call only where it was itself served from this machine: `origin` is what the browser says of
    it, `host` what the browser was told this server is called (a name rebound to loopback)."""
    host = call.headers.get(b"host", b"localhost")
    if _name(host) not in _LOCAL_NAMES:
        raise Forbidden(
            "this server has no API key, so it answers only to localhost and 127.0.0.1. "
            "Set an API key to serve it under other names."
        )
    origin = call.headers.get(b"origin")
    if origin is not None and _name(origin.partition(b"://")[2]) not in _LOCAL_NAMES:
        raise Forbidden("pages of another site may not call this server without an API key.")


def _name(host: bytes) -> bytes:
    """The name in `name`, `name:port` or `[::1]:port`."""
    return (host if host.endswith(b"]") else host.rsplit(b":", 1)[0]).lower()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
