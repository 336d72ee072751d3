"""The Voice tab."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr


@dataclass(frozen=True)
class VoiceTab:
    """Components of the Voice tab that events need."""

    recording: gr.Audio
    send: gr.Button


def build_voice_tab() -> VoiceTab:
    """Places the microphone and its button; the pictures of the Text tab go with the recording."""
    recording = gr.Audio(
        type="filepath",
        sources=["microphone", "upload"],
        label="Speak your question",
        elem_id="mic",
        waveform_options=gr.WaveformOptions(sample_rate=16000),
        buttons=[],
    )
    return VoiceTab(recording, gr.Button("Send recording", variant="primary", size="sm"))
