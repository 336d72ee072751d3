"""Trainer callbacks: write the history as a table and a curve, and stop cleanly on Ctrl-C."""

from __future__ import annotations

import csv
import logging
import signal
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class HistoryCallback(TrainerCallback):
    """Writes history.csv and curve.png when training ends, even when it is stopped early."""

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            write_history(state.log_history, Path(args.output_dir))


def write_history(entries: list[dict[str, float]], folder: Path) -> None:
    """Writes history.csv, one row per logged step, and curve.png."""
    lines: dict[int, dict[str, float]] = {}
    for entry in entries:
        lines.setdefault(entry["step"], {}).update(entry)
    columns = ["step", "epoch"]
    columns += [name for line in lines.values() for name in line if name not in columns]
    columns = list(dict.fromkeys(columns))
    with (folder / "history.csv").open("w", newline="") as sink:
        writer = csv.DictWriter(sink, columns)
        writer.writeheader()
        writer.writerows(lines[step] for step in sorted(lines))
    draw_curve(list(lines.values()), folder / "curve.png")


def draw_curve(lines: list[dict[str, float]], path: Path) -> None:
    """Plots training and eval loss, and how far each part has moved, against the step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="tight")
    FigureCanvasAgg(figure)
    losses, changes = figure.subplots(1, 2)
    for axes, names in ((losses, ("loss", "eval_loss")), (changes, ("projector_change", "adapter_change"))):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axes.plot(
                    *zip(*points, strict=True), label=name.replace("_", " "), marker="." if len(points) < 30 else ""
                )
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)


class StopOnSignal(TrainerCallback):
    """On the first Ctrl-C, finishes the step and saves a checkpoint; on the second, stops at once."""

    def __init__(self):
        self.is_requested = False
        self._previous_handlers: dict[int, Any] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        try:
            self._previous_handlers = {
                one: signal.signal(one, self._request) for one in (signal.SIGINT, signal.SIGTERM)
            }
        except ValueError:  # Python handles signals in the main thread only
            logger.debug("Not in the main thread: signal handlers are unchanged")

    def _request(self, signal_number: int, frame: Any) -> None:
        logger.warning("Stopping after this step; press Ctrl-C again to stop at once")
        self.is_requested = True
        signal.signal(signal_number, self._previous_handlers[signal_number])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.is_requested:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, *_: Any, **__: Any) -> None:
        for signal_number, handler in self._previous_handlers.items():
            signal.signal(signal_number, handler)
