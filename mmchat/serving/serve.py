"""mmchat serve: the port answers at once, the page follows gradio's import, and the engine loads in the background."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..bundle import bundled
from ..conversation import Engine
from ..errors import BadInput, MmchatError
from ..presets import AUTO, SMOL, get_preset
from .middleware import build_middleware
from .observing import Observer, log, tell_refusal
from .opening import Opening
from .rate_limit import RateLimit, questions_per_minute

if TYPE_CHECKING:
    from .feedback import FeedbackStore

HEAD_START = 1.0  # seconds for the first page: it would wait for the interpreter, which importing torch keeps busy


def serve(options: argparse.Namespace) -> int:
    """Serves the page until it is stopped.

    Args:
        options: the flags of `mmchat serve`.

    Raises:
        MmchatError: a flag is wrong, the models cannot be loaded, or the address or port is not available.
    """
    observers: list[Observer] = []
    per_minute = questions_per_minute(options.rate_limit)
    limit = RateLimit(per_minute, refused=partial(tell_refusal, observers, RateLimit.__name__))
    for client in ("httpx", "httpx2"):  # one line per request to the Hub, and from gradio to itself
        logging.getLogger(client).setLevel(logging.WARNING)
    opening = Opening(options.host, options.port)
    if os.environ.get("SPACES_ZERO_GPU"):
        import spaces  # noqa: F401 (must be imported before torch, which it patches)
    import gradio

    from ..device import keep_less_memory, on_zero_gpu
    from . import page, routes
    from .loading import LoadingEngine
    from .request_queue import Busy, Gate, QueuedEngine

    keep_less_memory()
    gate = Gate(page.MAX_CONCURRENT, page.MAX_WAITING, partial(tell_refusal, observers, Busy.__name__))
    engine = LoadingEngine(lambda: wrap(load_engine(options)), notify=gradio.Info)
    beside = [routes.health(lambda: engine.is_ready)]
    if os.environ.get("MMCHAT_LOG") == "json":
        from .json_log import log_as_json

        log_as_json()
        observers.append(log)
    if routes.is_on(options.metrics, "MMCHAT_METRICS"):
        from .metrics import Metrics

        metrics = Metrics(lambda: gate.waiting + len(demo._queue))
        observers.append(metrics.observe)
        beside.append(metrics.route(routes.api_key(sign_in())))
    if routes.is_on(options.api, "MMCHAT_API"):
        from .openai_api import OpenAiApi

        beside += OpenAiApi(engine, model_name(options), gate, limit, routes.api_key(sign_in())).routes()
    wrap = build_middleware(observers)
    if options.preset != AUTO:
        get_preset(options.preset)  # report a wrong name before the page opens
    if on_zero_gpu():  # models must load before the page starts, in the thread that imported spaces
        engine.load_here()
    demo = page.build(QueuedEngine(engine, gate), bundled("examples"), limit, feedback_store())
    launch = partial(page.launch, demo, server_name=options.host, auth=sign_in(), prevent_thread_lock=True)
    opening.close()
    open_page(partial(launch, app_kwargs={"routes": beside}), opening.port, options.port)
    if not on_zero_gpu():
        time.sleep(HEAD_START)
        engine.start()
    engine.wait()
    logging.info("Ready")
    demo.block_thread()
    return 0


def open_page(launch: Callable[..., object], port: int, chosen: int | None) -> None:
    """Launches the page on the port that the opening had, or on the next free one if another program was faster.

    Args:
        launch: takes ``server_port``; gradio looks for a free port if it is None.
        chosen: the port that the user asked for: no other will do.

    Raises:
        MmchatError: the address or port is not available.
    """
    try:
        try:
            launch(server_port=port)
        except OSError:
            if chosen is not None:
                raise
            launch(server_port=None)
    except OSError as error:
        logging.debug("launch", exc_info=error)
        raise MmchatError("That address or port is not available. Choose another with --host or --port.") from error


def feedback_store() -> FeedbackStore | None:
    """Where visitors' feedback goes: the folder MMCHAT_FEEDBACK; None if it is not set.

    Raises:
        BadInput: the folder cannot be made.
    """
    from .feedback import FeedbackStore

    folder = os.environ.get("MMCHAT_FEEDBACK")
    return FeedbackStore(folder) if folder else None


def model_name(options: argparse.Namespace) -> str:
    """The name under which the API lists the model: that of the weights folder, or of the preset."""
    if options.server:
        return os.environ.get("MMCHAT_MODEL") or "mmchat"
    return Path(options.weights).resolve().name if options.weights else options.preset


def sign_in() -> tuple[str, str] | None:
    """The name and password that visitors need, from MMCHAT_SIGN_IN="name:password"; None if it is not set.

    It is not a flag, because other users of the machine can see the flags of a process.

    Raises:
        BadInput: MMCHAT_SIGN_IN does not have this form.
    """
    credentials = os.environ.get("MMCHAT_SIGN_IN")
    if not credentials:
        return None
    name, _, password = credentials.partition(":")
    if not name or not password:
        raise BadInput("MMCHAT_SIGN_IN must be a name and a password with a colon between them.")
    return name, password


def load_engine(options: argparse.Namespace) -> Engine:
    """Loads local models, or connects to a model server."""
    if options.server:
        from ..models.speech_recognition import find_speech_model
        from .remote import RemoteEngine

        speech = find_speech_model(options.speech) if options.speech else SMOL.speech
        engine: Engine = RemoteEngine(options.server, os.environ.get("MMCHAT_MODEL"), speech=speech)
    else:
        from ..engine import load
        from .zero_gpu import lend_gpu

        logging.info("Loading the models of '%s' …", options.preset)
        engine = lend_gpu(load(options.preset, options.weights, options.quantization, options.speech))
    engine.warm_up()
    if options.speech:
        engine.load_speech()  # whoever names a model reads at once whether it can be used
    return engine
