"""Callbacks of a run: its history as a table and a curve, and an orderly end on Ctrl-C."""

from __future__ import annotations

import csv
import logging
import signal
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class HistoryCallback(TrainerCallback):
    """Writes history.csv and curve.png at the end of training, however it ends."""

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            write_history(state.log_history, Path(args.output_dir))


def write_history(entries: list[dict[str, float]], folder: Path) -> None:
    """One line for each step that was logged."""
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
    """Training and eval loss, and how far each part has moved, against the step."""
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
    """The first Ctrl-C ends training after the step, with a checkpoint; the second ends it at once."""

    def __init__(self):
        self.asked = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        try:
            self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: whoever runs this in a thread stops it in their own way
            logger.debug("Signals are left alone outside the main thread")

    def _ask(self, number: int, frame: Any) -> None:
        logger.warning("Stopping after this step; once more stops at once")
        self.asked = True
        signal.signal(number, self._previous[number])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.asked:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, *_: Any, **__: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
