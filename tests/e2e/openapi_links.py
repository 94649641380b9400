"""Requests that lead to an id, for judges that follow links: the schema cannot say which of all it
allows are not refused for what they name. schemathesis loads this as its hooks.
"""

from __future__ import annotations

from typing import Any

import schemathesis

DATA = b"kept"
LEADING: dict[str, dict[str, Any]] = {
    "POST /v1/responses": {"model": "m", "input": "echo hello"},
    "POST /v1/uploads": {
        "filename": "a.txt",
        "purpose": "user_data",
        "mime_type": "text/plain",
        "bytes": len(DATA),
    },
    "POST /v1/uploads/{upload_id}/parts": {"data": DATA},
}


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    leading = LEADING.get(context.operation.label)
    if leading is None:
        return body
    background = isinstance(body, dict) and body.get("background") is True
    return leading | {"background": True} if background else leading
