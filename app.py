#!/usr/bin/env python
"""Serves mmchat's page: python app.py [--preset smol] [--weights runs/first] [--port 7860]."""

import argparse
import logging
import os
import sys
from pathlib import Path

from mmchat.errors import MmchatError
from mmchat.presets import DEFAULT_PRESET, PRESETS

EXAMPLES = Path(__file__).resolve().parent / "examples"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serve mmchat's page.")
    parser.add_argument(
        "--preset",
        default=os.environ.get("MMCHAT_PRESET", DEFAULT_PRESET),
        help=f"which models to use: {', '.join(PRESETS)} (default: MMCHAT_PRESET, or {DEFAULT_PRESET})",
    )
    parser.add_argument("--weights", help="a folder that training wrote (default: the preset's own)")
    parser.add_argument("--host", help="the address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, help="the port to listen on (default: the first free one from 7860)")
    return parser.parse_args()


def main() -> None:
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.info("Loading the models of '%s' …", options.preset)

    from mmchat import load, ui

    try:
        engine = load(options.preset, options.weights)
        engine.warm_up()
    except MmchatError as error:
        sys.exit(str(error))
    try:
        ui.launch(ui.build(engine, EXAMPLES), server_name=options.host, server_port=options.port)
    except OSError as error:
        logging.debug("launch", exc_info=error)
        sys.exit("That address or port cannot be used, perhaps because it is taken. Name another with --port.")


if __name__ == "__main__":
    main()
