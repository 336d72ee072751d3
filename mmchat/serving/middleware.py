"""What the operator's settings put between the page and the models: cache, observers, filter."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial

from ..conversation import Engine
from .caching import CachingEngine, answers_cached
from .filtering import FilteringEngine, load_filter
from .observing import HELD, ObservedEngine, Observer, tell_refusal

DEFAULT_ANSWERS = "256"  # kept by the cache; five megabytes at most


def build_middleware(observers: Sequence[Observer] = ()) -> Callable[[Engine], Engine]:
    """Reads MMCHAT_ANSWER_CACHE and MMCHAT_FILTER, and returns what they do to an engine.

    Args:
        observers: told about each request, and about what the filter holds back.

    Raises:
        BadInput: a setting is wrong.
    """
    answers = answers_cached(os.environ.get("MMCHAT_ANSWER_CACHE") or DEFAULT_ANSWERS)
    name = os.environ.get("MMCHAT_FILTER")
    is_held = load_filter(name) if name and name != "0" else None

    def wrapped(engine: Engine) -> Engine:
        if answers:
            engine = CachingEngine(engine, answers)
        if observers:
            engine = ObservedEngine(engine, observers)
        return FilteringEngine(engine, is_held, partial(tell_refusal, observers, HELD)) if is_held else engine

    return wrapped
