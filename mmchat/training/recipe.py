"""What a training run is told: one dataclass, filled from flags, from a YAML file, or from Python.

Imports nothing heavy, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import BadInput
from ..presets import SMOL

logger = logging.getLogger(__name__)

CPU_INT8 = "cpu-int8"
OLD_NAMES = {  # of settings; recipes and flags that use them still work
    "accumulate": "gradient_accumulation_steps",
    "decay": "lr_scheduler_type",
    "keep": "save_total_limit",
    "marker": "end_of_image_token",
    "own_answers": "scst_samples",
    "own_tokens": "scheduled_sampling",
    "own_tokens_cycle": "scheduled_sampling_cycle",
}
OLD_VALUES = {"quantization": {"int8": CPU_INT8}}
DATA, MODEL, SCHEDULE, RUN = "data", "model", "schedule", "run"


def setting(default: Any, group: str, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field of a recipe with what ``--help`` says about it."""
    metadata = {"group": group, "help": text, "choices": choices}
    if default is dataclasses.MISSING or not isinstance(default, list):
        return field(default=default, metadata=metadata)
    return field(default_factory=lambda: list(default), metadata=metadata)


@dataclass(kw_only=True)
class Recipe:
    """Settings of a training run. A learning rate of 0 freezes the part it belongs to."""

    train: list[str] = setting([], DATA, "conversations to learn from: LLaVA-Instruct JSON, one file or several")
    eval: list[str] = setting([], DATA, "conversations to measure the loss on")
    features: str | None = setting(None, DATA, "the folder that embed_images.py wrote")
    images: str | None = setting(None, DATA, "in place of --features: the pictures, encoded anew in every step")
    max_length: int = setting(1024, DATA, "tokens in a row; longer conversations are cut off there")
    share_rows: bool = setting(True, DATA, "conversations about one picture share a row, which reads the picture once")

    preset: str = setting(SMOL.name, MODEL, "which models to train")
    image_encoder: str | None = setting(
        None,
        MODEL,
        "a CLIP or SigLIP vision model, by its name on the Hub or its folder; efficientnet-lite0; or a folder with one "
        "that was tuned; the preset's if absent",
    )
    image_features: str = setting("patches", MODEL, "what is taken of it", ("patches", "pooled"))
    image_layer: int = setting(-2, MODEL, "whose patches are taken")
    class_token: bool = setting(False, MODEL, "its class token is taken with the patches")
    tagger: str | None = setting(
        None, MODEL, "the folder that fit_tagger.py wrote; that of the weights to start from, if they have one"
    )
    start_from: str | None = setting(
        None, MODEL, "a weights folder or checkpoint to go on from; fresh weights if absent"
    )
    quantization: str = setting(
        "none",
        MODEL,
        "of the frozen base model: 4bit is NF4, as in QLoRA; 4bit-double quantises its scales, too; 8bit is LLM.int8; "
        "cpu-int8 multiplies in 8 bits on a CPU where that measures faster",
        ("none", "4bit", "4bit-double", "8bit", CPU_INT8),
    )
    projector: str | None = setting(
        None,
        MODEL,
        "kind of a fresh projector; the preset's if absent",
        ("linear", "llava", "mlp", "resblock", "normblocks"),
    )
    hidden_width: int | None = setting(None, MODEL, "of a fresh projector; the preset's if absent")
    end_of_image_token: bool = setting(False, MODEL, "a fresh projector ends every picture with a token of its own")
    rank: int = setting(16, MODEL, "of a fresh LoRA adapter")
    alpha: int = setting(32, MODEL, "of a fresh LoRA adapter, whose update is scaled by alpha / rank")
    dropout: float = setting(0.0, MODEL, "of a fresh LoRA adapter")

    epochs: float = setting(1.0, SCHEDULE, "passes over the data")
    max_steps: int = setting(-1, SCHEDULE, "stop after so many steps; -1: no limit")
    batch_size: int = setting(16, SCHEDULE, "rows in a step on one device")
    gradient_accumulation_steps: int = setting(1, SCHEDULE, "batches whose gradients make one step")
    lr: float = setting(3e-4, SCHEDULE, "learning rate of the adapter; 0 freezes it")
    projector_lr: float = setting(1e-3, SCHEDULE, "learning rate of the projector; 0 freezes it")
    warmup: float = setting(0.03, SCHEDULE, "steps until the full rate; below 1 a share of all steps")
    lr_scheduler_type: str = setting(
        "cosine", SCHEDULE, "how the rates fall after that", ("cosine", "linear", "constant")
    )
    weight_decay: float = setting(0.0, SCHEDULE, "of AdamW")
    max_grad_norm: float = setting(1.0, SCHEDULE, "gradients are scaled down to this norm")
    precision: str = setting("fp32", SCHEDULE, "of what is computed in a step", ("fp32", "bf16", "fp16"))
    gradient_checkpointing: bool = setting(False, SCHEDULE, "compute activations twice to hold them once")
    compile: bool = setting(False, SCHEDULE, "compile each layer first (a minute; needs a C++ compiler on a CPU)")
    shard: bool = setting(False, SCHEDULE, "spread the frozen language model over the processes (FSDP) to save memory")
    patience: int = setting(0, SCHEDULE, "stop when the eval loss has not improved so many times in a row; 0: never")
    scheduled_sampling: float = setting(
        0.0,
        SCHEDULE,
        "the highest probability of feeding the model its own prediction instead of the true token",
    )
    scheduled_sampling_cycle: int = setting(
        200, SCHEDULE, "steps in which that probability rises from 0 and falls back to it"
    )
    scst_samples: int = setting(
        0,
        SCHEDULE,
        "answers that the model writes in each step to a question that people answered in several ways; those nearer "
        "to what people wrote become likelier. 0: people's answers are learnt word by word",
    )

    out: str = setting("runs/train", RUN, "the folder for weights, checkpoints and the log")
    resume: bool = setting(False, RUN, "go on from the newest whole checkpoint in --out; start afresh if there is none")
    save_steps: int = setting(200, RUN, "steps between checkpoints")
    eval_steps: int = setting(200, RUN, "steps between measurements of the eval loss")
    log_steps: int = setting(10, RUN, "steps between lines of the log")
    save_total_limit: int = setting(2, RUN, "checkpoints kept beside the best one")
    samples: int = setting(3, RUN, "pictures of --eval described at the end")
    report_to: list[str] = setting(["tensorboard"], RUN, "where the log goes, too: tensorboard, wandb, …, or none")
    workers: int = setting(0, RUN, "processes that prepare batches")
    seed: int = setting(0, RUN, "of fresh weights and of the order of the data")

    def __post_init__(self):
        for name, values in OLD_VALUES.items():
            setattr(self, name, values.get(getattr(self, name), getattr(self, name)))
        for setting_ in dataclasses.fields(self):
            value = getattr(self, setting_.name)
            choices = setting_.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise BadInput(f"{setting_.name} is one of {', '.join(choices)}, not '{value}'.")
        if not self.train:
            raise BadInput("There is nothing to learn from: name a file of conversations with --train.")
        if bool(self.features) == bool(self.images):
            raise BadInput("Name either --features, made by embed_images.py, or --images.")
        if self.lr == 0 and self.projector_lr == 0:
            raise BadInput("Both learning rates are 0, so nothing would be trained.")
        if self.patience and (not self.eval or self.save_steps % self.eval_steps):
            raise BadInput("patience needs --eval, and save_steps that are a multiple of eval_steps.")
        if self.shard and (self.quantization != "none" or self.scst_samples or self.compile):
            raise BadInput("shard is for quantization none, without scst_samples and compile.")
        if not 0 <= self.scheduled_sampling <= 1:
            raise BadInput("scheduled_sampling is a probability between 0 and 1.")
        if self.scst_samples == 1 or self.scst_samples < 0:
            raise BadInput("scst_samples are compared with one another: take two or more, or 0 for none.")


def parse_recipe(description: str, arguments: list[str] | None = None, **defaults: Any) -> Recipe:
    """A recipe from the command line: flags before the YAML file of ``--recipe``, that before the defaults.

    Args:
        description: what ``--help`` opens with.
        arguments: in place of the command line's.
        defaults: that differ from the dataclass's own.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--recipe", metavar="FILE", help="a YAML file of the settings below; flags go before it")
    groups = {name: parser.add_argument_group(name) for name in (DATA, MODEL, SCHEDULE, RUN)}
    hints = typing.get_type_hints(Recipe)
    for setting_ in dataclasses.fields(Recipe):
        default = defaults.get(setting_.name, _default(setting_))
        _add_flag(groups[setting_.metadata["group"]], setting_, hints[setting_.name], default)
    for old, name in OLD_NAMES.items():
        setting_ = next(setting_ for setting_ in dataclasses.fields(Recipe) if setting_.name == name)
        _add_flag(parser, setting_, hints[name], None, old)
    options = vars(parser.parse_args(arguments))
    try:
        recipe_file = options.pop("recipe", None)
        return Recipe(**{**defaults, **(read_recipe(recipe_file) if recipe_file else {}), **options})
    except BadInput as error:
        parser.error(str(error))


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        BadInput: it cannot be read, or names a setting there is none of.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise BadInput(f"{path.name} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path.name} is not YAML: {error}.") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path.name} is not a list of settings, each as 'name: value'.")
    for old in OLD_NAMES.keys() & content.keys():
        logger.warning("%s: '%s' is called '%s' now", path.name, old, OLD_NAMES[old])
        content.setdefault(OLD_NAMES[old], content.pop(old))
    types_of = typing.get_type_hints(Recipe)
    unknown = content.keys() - types_of.keys()
    if unknown:
        raise BadInput(f"{path.name} names settings there are none of: {', '.join(sorted(unknown))}.")
    return {name: _converted(value, types_of[name], f"{path.name}, {name}") for name, value in content.items()}


def write_recipe(recipe: Recipe, path: str | Path) -> None:
    """Writes every setting, so that the run can be repeated."""
    Path(path).write_text(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))


def _default(setting_: dataclasses.Field) -> Any:
    return setting_.default if setting_.default is not dataclasses.MISSING else setting_.default_factory()


def _scalar_type(hint: Any) -> type:
    """``str`` of ``str``, ``str | None`` and ``list[str]``."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is list:
        return typing.get_args(hint)[0]
    return hint


def _renamed(name: str) -> Callable[[str], str] | None:
    """Reads a setting's value, an old one as today's; None of settings whose values were never renamed."""
    return (lambda value: OLD_VALUES[name].get(value, value)) if name in OLD_VALUES else None


def _converted(value: Any, hint: Any, place: str) -> Any:
    """YAML reads 1e-4 as text; and one file need not be written as a list."""
    scalar = _scalar_type(hint)
    if typing.get_origin(hint) is list:
        return [scalar(member) for member in (value if isinstance(value, list) else [value])]
    if value is None and scalar is not hint:
        return None
    if scalar is bool and not isinstance(value, bool):
        raise BadInput(f"{place} is true or false, not '{value}'.")
    try:
        return scalar(value)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{place}: '{value}' is no {scalar.__name__}.") from error


def _add_flag(group: Any, setting_: dataclasses.Field, hint: Any, default: Any, old: str | None = None) -> None:
    """Adds a setting's flag, or a hidden one under its old name."""
    options: dict[str, Any] = {"help": setting_.metadata["help"]}
    shown = " ".join(default) if isinstance(default, list) else default
    if shown not in (None, "", False):
        options["help"] += f" (default: {'on' if shown is True else shown})"
    scalar = _scalar_type(hint)
    if scalar is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options |= {"type": _renamed(setting_.name) or scalar, "choices": setting_.metadata["choices"]}
        if options["choices"] is None:
            options["metavar"] = {int: "N", float: "X", str: "NAME"}[scalar]
        if typing.get_origin(hint) is list:
            options["nargs"] = "+"
    if old:
        options["help"] = argparse.SUPPRESS
    group.add_argument(f"--{(old or setting_.name).replace('_', '-')}", dest=setting_.name, **options)
