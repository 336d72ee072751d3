"""Routes beside the page, and the settings that switch them on."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..errors import BadInput


def is_on(flag: bool, variable: str) -> bool:
    """Whether a flag or its environment variable switches something on."""
    return flag or os.environ.get(variable, "").strip().lower() in ("1", "true", "yes", "on")


def api_key(sign_in: Any) -> str | None:
    """MMCHAT_API_KEY, which guards the API and the metrics.

    Raises:
        BadInput: visitors of the page sign in, but programs would need no key.
    """
    key = os.environ.get("MMCHAT_API_KEY") or None
    if sign_in and not key:
        raise BadInput("Visitors sign in here, so programs need a key, too: set MMCHAT_API_KEY.")
    return key


def health(is_ready: Callable[[], bool]) -> Route:
    """/healthz: 200 when the models are there, 503 while they load."""

    async def answer(_: Request) -> Response:
        ready = is_ready()
        return JSONResponse({"status": "ok" if ready else "loading"}, 200 if ready else 503)

    return Route("/healthz", answer)
