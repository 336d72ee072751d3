"""Runs a script and logs every address that it looks up or connects to: python -m tests.watched LOG app.py …"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

log = Path(sys.argv[1]).open("a", buffering=1)  # noqa: SIM115 (open for as long as the script runs)


def watch(event: str, arguments: tuple) -> None:
    if event == "socket.getaddrinfo":
        print(arguments[0], file=log)
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        print(arguments[1][0], file=log)


sys.addaudithook(watch)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
