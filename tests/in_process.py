"""Commands in the process of the tests: a new Python spends ten seconds on imports before it does anything."""

from __future__ import annotations

import io
import logging
import runpy
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from mmchat.__main__ import main
from tests.conftest import ROOT


def run_script(command: str, folder: Path = ROOT) -> CompletedProcess[str]:
    """What ``python …`` does in a folder: the same status, stdout and stderr.

    ``command`` is a line of a shell; it names a script of the repository. The script knows the presets of the test.
    """
    name, *arguments = shlex.split(command)
    script, argv, path = ROOT / name, sys.argv, list(sys.path)
    sys.argv = [name, *arguments]
    sys.path.insert(0, str(script.parent))
    try:
        with chdir(folder):
            return _completed(lambda: runpy.run_path(str(script), run_name="__main__"))
    finally:
        sys.argv, sys.path[:] = argv, path


def run_mmchat(*arguments: str) -> CompletedProcess[str]:
    """What ``mmchat …`` does."""
    return _completed(lambda: sys.exit(main(list(arguments))))


def _completed(run: Callable[[], Any]) -> CompletedProcess[str]:
    said, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(said), redirect_stderr(errors), fresh_logging():
        status = _status(run)
    return CompletedProcess(run, status, said.getvalue(), errors.getvalue())


def _status(run: Callable[[], Any]) -> int:
    try:
        run()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


@contextmanager
def fresh_logging() -> Iterator[None]:
    """Lets ``logging.basicConfig`` work as in a new process, and undoes what the command changes."""
    root = logging.getLogger()
    handlers, level, disabled = root.handlers[:], root.level, root.manager.disable
    root.handlers.clear()
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(disabled)
