"""The visitor's settings: how an answer is written. The browser keeps them; page.js has that part."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ...conversation import SamplingOptions
from ...errors import BadInput

MAX_SYSTEM = 2000  # characters


def build_settings() -> list[Any]:
    """Places the settings and returns their components, in the order of the arguments of ``read_settings``."""
    defaults = SamplingOptions()
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        return [
            gr.Slider(0, 1.5, defaults.temperature, step=0.1, label="Temperature", info="0 is the likeliest answer"),
            gr.Slider(16, 1024, defaults.max_new_tokens, step=16, label="Longest answer", info="in tokens"),
            gr.Checkbox(label="Rewrite answers", info="in better English, by the same model without its adapter"),
            gr.Slider(0.05, 1, defaults.top_p, step=0.05, label="Top-p", info="share of probability to sample from"),
            gr.Slider(
                1, 8, defaults.beams, step=1, label="Careful", info="above 1: beam search; the answer comes all at once"
            ),
            gr.Checkbox(label="Exact", info="always the likeliest word, so an answer is repeatable"),
            gr.Number(None, label="Seed", info="makes a varied answer repeatable", precision=0),
            gr.Textbox(
                label="System prompt", info="for conversations without pictures", lines=2, max_length=MAX_SYSTEM
            ),
        ]


def default_settings() -> list[Any]:
    """The values of a first visit."""
    defaults = SamplingOptions()
    return [defaults.temperature, defaults.max_new_tokens, False, defaults.top_p, defaults.beams, False, None, ""]


def read_settings(
    temperature: float | None = None,
    max_new_tokens: float | None = None,
    rewrite: bool = False,
    top_p: float | None = None,
    beams: float | None = None,
    exact: bool = False,
    seed: float | None = None,
    system: str | None = None,
) -> tuple[SamplingOptions, bool, str]:
    """The options that the settings ask for, whether to rewrite the answer, and the system prompt.

    Raises:
        BadInput: a value is out of range.
    """
    system = (system or "").strip()
    if len(system) > MAX_SYSTEM:
        raise BadInput(f"Please write at most {MAX_SYSTEM} characters as the system prompt.")
    given = {
        "temperature": 0.0 if exact else temperature,
        "max_new_tokens": max_new_tokens and int(max_new_tokens),
        "top_p": top_p,
        "beams": beams and int(beams),
        "seed": None if seed is None else abs(int(seed)) % 2**31,
    }
    options = SamplingOptions(**{name: value for name, value in given.items() if value is not None})
    return options, bool(rewrite), system
