"""Trains by several recipes, one after another: ``accelerate launch … -m tests.pair FOLDER recipe.yaml …``.

Two processes start once for all of them, which takes as long as many tiny runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mmchat.presets import PRESETS
from mmchat.training.recipe import Recipe, read_recipe
from mmchat.training.run import run_from_terminal
from tests.tiny import presets

if __name__ == "__main__":
    PRESETS.update(presets(Path(sys.argv[1])))
    for path in sys.argv[2:]:
        run_from_terminal(Recipe(**read_recipe(path)))
