#!/usr/bin/env python
"""How fast `smol` answers on this machine: start, first token, tokens per second, speech, memory.

The cache should be warm: run the app once before.

python benchmarks/chat.py
"""

import logging
import resource
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SPEECH = ROOT / "tests" / "data" / "jfk.flac"
SPEECH_SECONDS = 11.0
PHOTO = ROOT / "examples" / "astronaut.jpg"
REPEATS = 5
TEXT_QUESTION = "Tell me about the history of the bicycle."
PICTURE_QUESTION = "Describe the image."


def time_reply(engine, message, options):
    """Seconds to the first piece, and pieces per second after it; a piece is a token of plain English."""
    start = time.perf_counter()
    moments = [time.perf_counter() for _ in engine.reply([message], options)]
    speed = (len(moments) - 1) / (moments[-1] - moments[0]) if len(moments) > 1 else float("nan")
    return moments[0] - start, speed


def measure_replies(engine, message, options):
    """Medians over some runs, the first of which is not counted."""
    runs = [time_reply(engine, message, options) for _ in range(REPEATS + 1)][1:]
    return [statistics.median(column) for column in zip(*runs, strict=True)]


def main():
    logging.disable(logging.INFO)
    start = time.perf_counter()
    import mmchat
    from mmchat.language_model import load_language_model

    engine = mmchat.load("smol")
    engine.warm_up()
    rows = [("start to ready: imports and all models", f"{time.perf_counter() - start:.2f} s")]

    start = time.perf_counter()
    load_language_model(engine.preset.language_model, engine.device.dtype)
    rows.append(("of it SmolLM2 from the cache, without imports", f"{time.perf_counter() - start:.2f} s"))

    options = mmchat.SamplingOptions(temperature=0, max_new_tokens=64)
    for name, message in (
        ("text", mmchat.Message("user", TEXT_QUESTION)),
        ("picture", mmchat.Message("user", PICTURE_QUESTION, [PHOTO])),
    ):
        if message.images:  # what a person waits for: a picture never seen before
            first_sight, _ = time_reply(engine, message, options)
            rows.append((f"{name}: first token, new picture", f"{first_sight * 1000:.0f} ms"))
        first, speed = measure_replies(engine, message, options)
        rows.append((f"{name}: first token", f"{first * 1000:.0f} ms"))
        rows.append((f"{name}: speed", f"{speed:.1f} tokens/s"))

    engine.transcribe(SPEECH)
    start = time.perf_counter()
    engine.transcribe(SPEECH)
    rows.append(("speech: work per second of audio", f"{(time.perf_counter() - start) / SPEECH_SECONDS:.3f} s"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "linux" else 1 << 30)
    rows.append(("peak memory", f"{peak:.2f} GiB"))

    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
