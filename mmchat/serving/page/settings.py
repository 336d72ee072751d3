"""The visitor's settings: how an answer is written."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ...conversation import SamplingOptions


def build_settings() -> list[Any]:
    """Places the settings and returns their components, in the order of the arguments of ``read_settings``."""
    defaults = SamplingOptions()
    return [
        gr.Slider(0, 1.5, defaults.temperature, step=0.1, label="Temperature", info="0 is the likeliest answer"),
        gr.Slider(16, 1024, defaults.max_new_tokens, step=16, label="Longest answer", info="in tokens"),
        gr.Checkbox(label="Rewrite answers", info="in better English, by the same model without its adapter"),
    ]


def read_settings(
    temperature: float | None = None, max_new_tokens: float | None = None, rewrite: bool = False
) -> tuple[SamplingOptions, bool]:
    """The options that the settings ask for, and whether to rewrite the answer.

    Raises:
        BadInput: a value is out of range, which only a raw request sends.
    """
    given = {"temperature": temperature, "max_new_tokens": max_new_tokens and int(max_new_tokens)}
    return SamplingOptions(**{name: value for name, value in given.items() if value is not None}), bool(rewrite)
