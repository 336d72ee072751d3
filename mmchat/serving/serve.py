"""mmchat serve: loads an engine behind the page and serves both."""

from __future__ import annotations

import argparse
import logging
import os
from typing import Any

from ..bundle import bundled
from ..errors import BadInput, MmchatError
from ..presets import AUTO, get_preset
from .rate_limit import RateLimit, questions_per_minute


def serve(options: argparse.Namespace) -> int:
    """Serves the page until it is stopped; ``options`` are the flags of `mmchat serve`.

    Raises:
        MmchatError: a flag is wrong, the models cannot be loaded, or the address is taken.
    """
    limit = RateLimit(questions_per_minute(options.rate_limit))
    for client in ("httpx", "httpx2"):  # a line for each request to the Hub, and from gradio to itself
        logging.getLogger(client).setLevel(logging.WARNING)
    if os.environ.get("SPACES_ZERO_GPU"):
        import spaces  # noqa: F401 (it has to come before torch, which it changes)
    import gradio

    from ..device import on_zero_gpu
    from . import page
    from .loading import LoadingEngine

    engine = LoadingEngine(lambda: load_engine(options), notify=gradio.Info)
    if options.preset != AUTO:
        get_preset(options.preset)  # a wrong name is reported before a page is shown
    if on_zero_gpu():  # models have to be there before the page is, and be loaded by this thread
        engine.load_here()
    demo = page.build(engine, bundled("examples"), limit)
    address = {"server_name": options.host, "server_port": options.port}
    try:
        page.launch(demo, **address, auth=sign_in(), prevent_thread_lock=True)
    except OSError as error:
        logging.debug("launch", exc_info=error)
        raise MmchatError(
            "That address or port cannot be used, perhaps because it is taken. Name another with --port."
        ) from error
    if not on_zero_gpu():
        engine.start()
    engine.wait()
    logging.info("Ready")
    demo.block_thread()
    return 0


def sign_in() -> tuple[str, str] | None:
    """The name and password that MMCHAT_SIGN_IN asks visitors for, as "name:password"; it is no flag, which others see.

    Raises:
        BadInput: it is not of that form.
    """
    asked = os.environ.get("MMCHAT_SIGN_IN")
    if not asked:
        return None
    name, _, password = asked.partition(":")
    if not name or not password:
        raise BadInput("MMCHAT_SIGN_IN has to be a name and a password with a colon between them.")
    return name, password


def load_engine(options: argparse.Namespace) -> Any:
    """What answers: models here, or a server that has them."""
    if options.server:
        from .remote import RemoteEngine

        engine: Any = RemoteEngine(options.server, os.environ.get("MMCHAT_MODEL"))
    else:
        from ..engine import load
        from .zero_gpu import lend_gpu

        logging.info("Loading the models of '%s' …", options.preset)
        engine = lend_gpu(load(options.preset, options.weights, options.quantization, options.speech))
    engine.warm_up()
    return engine
