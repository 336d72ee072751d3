"""OpenAI's chat API, served by the page's process: /v1/models and /v1/chat/completions."""

from __future__ import annotations

import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from threading import Event
from typing import Any

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..conversation import Engine
from ..errors import BadInput, MmchatError
from .openai_request import MAX_BODY, ChatRequest, read_request, until
from .rate_limit import RateLimit
from .request_queue import Busy, Gate

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.02  # between two checks whether it is a waiting request's turn
STATUS = {BadInput: 400, Busy: 429, MmchatError: 503}  # the first that fits an error; otherwise 500
FAILED = "Something went wrong on my side. Please try again."


class Refusal(Exception):
    """A request that is turned away, with its HTTP status and OpenAI's error code."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


def is_allowed(request: Request, key: str | None) -> bool:
    """Whether a request brings the key, if there is one."""
    given = request.headers.get("authorization", "")
    return not key or hmac.compare_digest(given.encode(), f"Bearer {key}".encode())


class OpenAiApi:
    """The API's routes.

    Args:
        engine: answers; its replies do not wait at the gate themselves.
        model: the name under which it is listed.
        gate, limit: shared with the page.
        key: what requests have to bring; nothing if None.
    """

    def __init__(self, engine: Engine, model: str, gate: Gate, limit: RateLimit, key: str | None = None):
        self.engine, self.model, self.gate, self.limit, self.key = engine, model, gate, limit, key
        self.started = int(time.time())

    def routes(self) -> list[Route]:
        """For ``launch(app_kwargs={"routes": …})``."""
        return [
            Route("/v1/models", self._answering(self._models)),
            Route("/v1/models/{name:path}", self._answering(self._model)),
            Route("/v1/chat/completions", self._answering(self._chat), methods=["POST"]),
        ]

    def _answering(self, handler: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """Asks for the key, and turns errors into OpenAI's shape."""

        async def answer(request: Request) -> Response:
            try:
                if not is_allowed(request, self.key):
                    raise Refusal(401, "This server needs its API key.", "invalid_api_key")
                return await handler(request)
            except Exception as error:
                return JSONResponse(_shape(error), _status(error))

        return answer

    def _entry(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": self.started, "owned_by": "mmchat"}

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._entry())

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.model):
            raise Refusal(404, f"This server has one model, '{self.model}'.", "model_not_found")

    async def _chat(self, request: Request) -> Response:
        try:
            self.limit.count(request.client.host if request.client else "")
        except BadInput as error:
            raise Refusal(429, str(error), "rate_limit_exceeded") from error
        body = await _json(request)
        asked = await run_in_threadpool(read_request, body)  # decodes pictures
        self._check_model(asked.model)
        pieces = self._pieces(request, asked)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.model}
        if not asked.stream:
            async with aclosing(pieces):
                text = "".join([piece async for piece in pieces])
            usage, reason = await run_in_threadpool(self._end, asked, text)
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
            return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})
        first = await anext(pieces, None)  # an error before the first word gets a status of its own
        events = self._events({**head, "object": "chat.completion.chunk"}, asked, first, pieces)
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})

    async def _pieces(self, request: Request, asked: ChatRequest) -> AsyncGenerator[str, None]:
        """The pieces of the answer. Ends, and ends the work, when the program hangs up."""
        ticket = self.gate.join()
        try:
            await self._turn(request, ticket)
            answer = self.engine.reply(asked.messages, asked.options, notify=_unheard)
            pieces = until(answer, asked.stops)
            try:
                while (piece := await run_in_threadpool(next, pieces, None)) is not None:
                    yield piece
                    if await request.is_disconnected():
                        return
            finally:
                with anyio.CancelScope(shield=True):
                    await run_in_threadpool(_close, pieces, answer)
        finally:
            self.gate.leave(ticket)

    async def _turn(self, request: Request, ticket: Event) -> None:
        while not ticket.is_set():
            if await request.is_disconnected():
                raise Refusal(499, "The request was ended.")
            await anyio.sleep(POLL_SECONDS)

    async def _events(
        self, head: dict[str, Any], asked: ChatRequest, first: str | None, pieces: AsyncGenerator[str, None]
    ) -> AsyncIterator[str]:
        def event(delta: dict[str, Any], reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
            return _event({**head, "choices": [choice]})

        text = first or ""
        try:
            async with aclosing(pieces):
                yield event({"role": "assistant", "content": text})
                async for piece in pieces:
                    text += piece
                    yield event({"content": piece})
            usage, reason = await run_in_threadpool(self._end, asked, text)
            yield event({}, reason)
            if asked.with_usage:
                yield _event({**head, "choices": [], "usage": usage})
        except Exception as error:
            yield _event(_shape(error))
        yield "data: [DONE]\n\n"

    def _end(self, asked: ChatRequest, text: str) -> tuple[dict[str, int] | None, str]:
        """Counts tokens, and says why the answer ended."""
        count = getattr(self.engine, "count_tokens", None)
        if not count:  # a model server
            return None, "stop"
        prompt, answer = count(asked.messages, text)
        usage = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
        return usage, "length" if answer >= asked.options.max_new_tokens else "stop"


async def _json(request: Request) -> Any:
    """The body as JSON. A page elsewhere cannot send this type without asking the browser's permission first."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "The request must be application/json.")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise Refusal(413, f"The request is larger than {MAX_BODY >> 20} MB.")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadInput("The request is not JSON.") from error


def _unheard(_: str) -> None:
    """Discards notices, which OpenAI's API cannot carry."""


def _close(*iterators: Iterator[str]) -> None:
    for iterator in iterators:
        iterator.close()  # type: ignore[attr-defined]


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _status(error: Exception) -> int:
    if isinstance(error, Refusal):
        return error.status
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)


def _shape(error: Exception) -> dict[str, Any]:
    """An error as OpenAI's API sends it: one sentence, nothing of the server's insides."""
    status = _status(error)
    if status == 500:
        logger.exception("A request failed", exc_info=error)
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    code = getattr(error, "code", None) or ("server_busy" if isinstance(error, Busy) else None)
    return {"error": {"message": str(error) if status != 500 else FAILED, "type": kind, "param": None, "code": code}}
