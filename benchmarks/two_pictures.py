#!/usr/bin/env python
"""Asks `smol` for picture 1 of two, for every ordered pair of the examples, with and without what leaves the other out.

python benchmarks/two_pictures.py
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WORDS = {  # example -> what a right answer may say
    "bananas": ("banana", "fruit"),
    "boat": ("boat", "yawl"),
    "bus": ("bus",),
    "camera": ("camera", "tripod", "man"),
    "coffee": ("coffee", "espresso", "cup"),
    "snail": ("snail",),
    "toaster": ("toast",),
}


def main() -> None:
    from mmchat import Message, SamplingOptions, load

    logging.basicConfig(level=logging.WARNING)
    engine, options = load("smol"), SamplingOptions(temperature=0, max_new_tokens=24)
    own = engine.preset
    seeing_both = replace(own, language_model=replace(own.language_model, mixes_up_images=False))
    for preset, shown in ((own, "the picture that is named"), (seeing_both, "both pictures")):
        engine.preset, right, other = preset, 0, 0
        for first, second in permutations(WORDS, 2):
            images = [ROOT / "examples" / f"{name}.jpg" for name in (first, second)]
            said = "".join(engine.reply([Message("user", "What is in picture 1?", images)], options)).lower()
            right += any(word in said for word in WORDS[first])
            other += any(word in said for word in WORDS[second])
        print(f"shown {shown}: names picture 1 in {right} of 42 pairs, picture 2 in {other}")


if __name__ == "__main__":
    main()
