#!/usr/bin/env python
"""Serves mmchat's page: python app.py [--preset smol] [--weights runs/first] [--port 7860]."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

from mmchat.errors import BadInput, MmchatError
from mmchat.presets import AUTO, DEFAULT_PRESET, PRESETS, get_preset
from mmchat.serving.rate_limit import RateLimit, questions_per_minute

EXAMPLES = Path(__file__).resolve().parent / "examples"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve mmchat's page.")
    parser.add_argument(
        "--preset",
        default=os.environ.get("MMCHAT_PRESET", DEFAULT_PRESET),
        help=f"which models to use: {', '.join([AUTO, *PRESETS])} (default: MMCHAT_PRESET, or {DEFAULT_PRESET})",
    )
    parser.add_argument("--weights", help="a folder that training wrote (default: the preset's own)")
    parser.add_argument(
        "--quantization",
        default=os.environ.get("MMCHAT_QUANTIZATION", "auto"),
        help="of the language model: auto, none, 8bit, 4bit or 4bit-double (default: MMCHAT_QUANTIZATION, or auto)",
    )
    parser.add_argument(
        "--speech",
        default=os.environ.get("MMCHAT_SPEECH"),
        help="another Whisper model: a size such as base.en, a repository, a folder or a .pt file (MMCHAT_SPEECH)",
    )
    parser.add_argument(
        "--server",
        default=os.environ.get("MMCHAT_SERVER"),
        help="in place of a model here: a server that speaks OpenAI's API, as http://localhost:8000/v1 (MMCHAT_SERVER)",
    )
    parser.add_argument(
        "--rate-limit",
        default=os.environ.get("MMCHAT_RATE_LIMIT") or "0",
        help="questions that one address may ask in a minute; 0 for any number (default: MMCHAT_RATE_LIMIT, or 0)",
    )
    parser.add_argument("--host", help="the address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, help="the port to listen on (default: the first free one from 7860)")
    options = parser.parse_args()
    try:
        options.rate_limit = questions_per_minute(options.rate_limit)
    except BadInput as error:
        sys.exit(str(error))
    return options


def main() -> None:
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for client in ("httpx", "httpx2"):  # a line for each request to the Hub, and from gradio to itself
        logging.getLogger(client).setLevel(logging.WARNING)
    if os.environ.get("SPACES_ZERO_GPU"):
        import spaces  # noqa: F401 (it has to come before torch, which it changes)
    from mmchat.device import on_zero_gpu
    from mmchat.serving import page
    from mmchat.serving.loading import LoadingEngine

    engine = LoadingEngine(lambda: load_engine(options), notify=page.gr.Info)
    try:
        if options.preset != AUTO:
            get_preset(options.preset)  # a mistake is said before a page is shown
        if on_zero_gpu():  # models have to be there before the page is
            engine.start()
            engine.wait()
        demo = page.build(engine, EXAMPLES, RateLimit(options.rate_limit))
        address = {"server_name": options.host, "server_port": options.port}
        page.launch(demo, **address, auth=sign_in(), prevent_thread_lock=True)
        if not on_zero_gpu():
            engine.start()
        engine.wait()
    except MmchatError as error:
        sys.exit(str(error))
    except OSError as error:
        logging.debug("launch", exc_info=error)
        sys.exit("That address or port cannot be used, perhaps because it is taken. Name another with --port.")
    logging.info("Ready")
    demo.block_thread()


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
        from mmchat.serving.remote import RemoteEngine

        engine = RemoteEngine(options.server, os.environ.get("MMCHAT_MODEL"))
    else:
        from mmchat import load
        from mmchat.serving.zero_gpu import lend_gpu

        logging.info("Loading the models of '%s' …", options.preset)
        engine = lend_gpu(load(options.preset, options.weights, options.quantization, options.speech))
    engine.warm_up()
    return engine


if __name__ == "__main__":
    main()
