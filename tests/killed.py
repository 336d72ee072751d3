"""Kills a training run again and again: ``python -m tests.killed FOLDER recipe.yaml TIMES``.

The run is a fork of a process with all imports done, so a restart takes one second, not ten.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from mmchat.presets import PRESETS
from mmchat.training.recipe import Recipe, read_recipe
from mmchat.training.run import train
from tests.tiny import presets


def start(recipe: Recipe) -> int:
    """Starts a training run in a fork and returns its process id."""
    process = os.fork()
    if process == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        tqdm.set_lock(threading.RLock())  # all forks share tqdm's own: one killed while holding it blocks the others
        try:
            train(recipe)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return process


def main() -> None:
    PRESETS.update(presets(Path(sys.argv[1])))
    recipe = replace(Recipe(**read_recipe(sys.argv[2])), resume=True)
    times, kills, random_numbers = int(sys.argv[3]), 0, random.Random(0)
    train(replace(recipe, out=recipe.out + "-warm", max_steps=1, resume=False))  # imports the rest
    while kills < times:
        process = start(recipe)
        time.sleep(random_numbers.uniform(0.05, 0.9))
        if os.waitpid(process, os.WNOHANG)[0]:
            break  # it finished
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        kills += 1
    _, status = os.waitpid(start(recipe), 0)
    print(kills, "kills; the last run ended with", status)


if __name__ == "__main__":
    main()
