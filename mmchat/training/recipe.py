"""Settings of a training run: one dataclass, filled from flags, a YAML file, or Python.

The module imports nothing heavy, so that ``--help`` answers at once.
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
from ..presets import PROJECTOR_KINDS, SMOL

logger = logging.getLogger(__name__)

CPU_INT8 = "cpu-int8"
OLD_NAMES = {  # old name of a setting → today's; recipes and flags accept both
    "accumulate": "gradient_accumulation_steps",
    "decay": "lr_scheduler_type",
    "hidden_width": "intermediate_size",
    "keep": "save_total_limit",
    "marker": "end_of_image_token",
    "own_answers": "scst_samples",
    "own_tokens": "scheduled_sampling",
    "own_tokens_cycle": "scheduled_sampling_cycle",
    "share_rows": "pack_conversations",
}
OLD_VALUES = {"quantization": {"int8": CPU_INT8}}
DATA, MODEL, SCHEDULE, RUN = "data", "model", "schedule", "run"
AT_LEAST_1 = (
    "max_length batch_size gradient_accumulation_steps rank projector_depth scheduled_sampling_cycle save_steps "
    "eval_steps log_steps save_total_limit"
).split()


def setting(default: Any, group: str, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A recipe field with its group, help text and choices."""
    metadata = {"group": group, "help": text, "choices": choices}
    if default is dataclasses.MISSING or not isinstance(default, list):
        return field(default=default, metadata=metadata)
    return field(default_factory=lambda: list(default), metadata=metadata)


@dataclass(kw_only=True)
class Recipe:
    """Settings of a training run. A learning rate of 0 freezes the part it belongs to."""

    train: list[str] = setting([], DATA, "conversations to train on: one or more LLaVA-Instruct JSON files")
    eval: list[str] = setting([], DATA, "conversations to compute the eval loss on")
    features: str | None = setting(None, DATA, "the folder that embed_images.py wrote")
    images: str | None = setting(None, DATA, "instead of --features: a folder of pictures to encode at every step")
    max_length: int = setting(1024, DATA, "maximum tokens in a sequence; longer conversations are truncated")
    pack_conversations: bool = setting(True, DATA, "pack all conversations about a picture into one sequence")

    preset: str = setting(SMOL.name, MODEL, "the models to train")
    image_encoder: str | None = setting(
        None,
        MODEL,
        "a CLIP or SigLIP vision model (Hub name or folder), efficientnet-lite0, efficientnet-lite2, or a folder "
        "that tune_image_encoder.py wrote; default: the preset's",
    )
    image_features: str = setting("patches", MODEL, "which of its features to use", ("patches", "pooled"))
    image_layer: int = setting(-2, MODEL, "the layer that the patches come from")
    class_token: bool = setting(False, MODEL, "put the class token before the patches")
    tagger: str | None = setting(
        None, MODEL, "the folder that fit_tagger.py wrote; default: the tagger of --start-from, if it has one"
    )
    start_from: str | None = setting(
        None, MODEL, "a weights folder or checkpoint to start from; default: fresh weights"
    )
    quantization: str = setting(
        "none",
        MODEL,
        "quantization of the frozen base model: 4bit is NF4, as in QLoRA; 4bit-double also quantizes the scales; 8bit "
        "is LLM.int8; cpu-int8 multiplies in int8 on a CPU if that is faster there",
        ("none", "4bit", "4bit-double", "8bit", CPU_INT8),
    )
    projector: str | None = setting(
        None,
        MODEL,
        "kind of a fresh projector; default: the preset's",
        PROJECTOR_KINDS,
    )
    intermediate_size: int | None = setting(None, MODEL, "inner size of a fresh projector; default: the preset's")
    end_of_image_token: bool = setting(False, MODEL, "add a learned end-of-image token to a fresh projector")
    rank: int = setting(16, MODEL, "rank of a fresh LoRA adapter")
    alpha: int = setting(32, MODEL, "alpha of a fresh LoRA adapter; its update is scaled by alpha / rank")
    dropout: float = setting(0.0, MODEL, "dropout of a fresh LoRA adapter")
    target_modules: list[str] = setting(
        ["all-linear"],
        MODEL,
        "names of the layers that a fresh LoRA adapter is on; all-linear: all but the output head",
    )
    projector_depth: int = setting(1, MODEL, "residual blocks of a fresh projector of the kind normblocks")
    projector_dropout: float = setting(0.0, MODEL, "dropout in a fresh projector, after each GELU")

    epochs: float = setting(1.0, SCHEDULE, "passes over the data")
    max_steps: int = setting(-1, SCHEDULE, "stop after N steps; -1: no limit")
    batch_size: int = setting(16, SCHEDULE, "sequences in a batch on one device")
    gradient_accumulation_steps: int = setting(1, SCHEDULE, "batches per optimizer step")
    lr: float = setting(3e-4, SCHEDULE, "learning rate of the adapter; 0 freezes it")
    projector_lr: float = setting(1e-3, SCHEDULE, "learning rate of the projector; 0 freezes it")
    warmup: float = setting(0.03, SCHEDULE, "warmup steps; below 1: a fraction of all steps")
    lr_scheduler_type: str = setting(
        "cosine", SCHEDULE, "learning rate schedule after the warmup", ("cosine", "linear", "constant")
    )
    weight_decay: float = setting(0.0, SCHEDULE, "weight decay of AdamW")
    label_smoothing: float = setting(
        0.0, SCHEDULE, "share of the target probability that is spread evenly over all tokens, the true one included"
    )
    max_grad_norm: float = setting(1.0, SCHEDULE, "clip the gradient to this norm")
    precision: str = setting("fp32", SCHEDULE, "precision of the training computation", ("fp32", "bf16", "fp16"))
    gradient_checkpointing: bool = setting(False, SCHEDULE, "recompute activations in the backward pass to save memory")
    compile: bool = setting(False, SCHEDULE, "torch.compile each layer (a minute; needs a C++ compiler on a CPU)")
    shard: bool = setting(False, SCHEDULE, "shard the frozen language model over the processes (FSDP) to save memory")
    patience: int = setting(
        0, SCHEDULE, "early stopping: stop after N evaluations without a better eval loss; 0: never"
    )
    scheduled_sampling: float = setting(
        0.0,
        SCHEDULE,
        "the highest probability of feeding the model its own prediction instead of the true token",
    )
    scheduled_sampling_cycle: int = setting(
        200, SCHEDULE, "steps in which that probability rises from 0 and returns to it"
    )
    scst_samples: int = setting(
        0,
        SCHEDULE,
        "self-critical sequence training: answers sampled per question that has several human answers, rewarded by "
        "CIDEr-D and BLEU-4 against these; 0: cross-entropy alone",
    )

    out: str = setting("runs/train", RUN, "the folder for weights, checkpoints and logs")
    resume: bool = setting(False, RUN, "resume from the newest complete checkpoint in --out; start over without one")
    save_steps: int = setting(200, RUN, "steps between checkpoints")
    eval_steps: int = setting(200, RUN, "steps between evaluations")
    log_steps: int = setting(10, RUN, "steps between log lines")
    save_total_limit: int = setting(2, RUN, "checkpoints to keep besides the best one")
    samples: int = setting(3, RUN, "pictures of --eval to show with sample answers at the end")
    report_to: list[str] = setting(["tensorboard"], RUN, "also log to: tensorboard, wandb, …, or none")
    workers: int = setting(0, RUN, "data loader processes")
    seed: int = setting(0, RUN, "random seed for fresh weights and for the order of the data")

    def __post_init__(self):
        for name, values in OLD_VALUES.items():
            setattr(self, name, values.get(getattr(self, name), getattr(self, name)))
        for setting_ in dataclasses.fields(self):
            value = getattr(self, setting_.name)
            choices = setting_.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise BadInput(f"{setting_.name} must be one of {', '.join(choices)}, not '{value}'.")
        if not self.train:
            raise BadInput("There is nothing to train on: name a file of conversations with --train.")
        if bool(self.features) == bool(self.images):
            raise BadInput("Name either --features, written by embed_images.py, or --images.")
        if self.lr == 0 and self.projector_lr == 0:
            raise BadInput("Both learning rates are 0, so nothing would be trained: set --lr or --projector-lr.")
        for name in AT_LEAST_1:
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be 1 or more.")
        if self.lr < 0 or self.projector_lr < 0:
            raise BadInput("A learning rate must be 0 or more.")
        if self.patience and (not self.eval or self.save_steps % self.eval_steps):
            raise BadInput("patience needs --eval, and save_steps must be a multiple of eval_steps.")
        if self.shard and (self.quantization != "none" or self.scst_samples or self.compile):
            raise BadInput("shard works only with quantization none, and without scst_samples and compile.")
        if not 0 <= self.label_smoothing < 1:
            raise BadInput("label_smoothing must be at least 0 and below 1.")
        if not 0 <= self.scheduled_sampling <= 1:
            raise BadInput("scheduled_sampling must be a probability between 0 and 1.")
        if self.scst_samples == 1 or self.scst_samples < 0:
            raise BadInput("scst_samples are compared with each other: use 2 or more, or 0 for none.")


def parse_recipe(description: str, arguments: list[str] | None = None, **defaults: Any) -> Recipe:
    """A recipe from the command line: flags override the YAML file of ``--recipe``, which overrides the defaults.

    Args:
        description: the first lines of ``--help``.
        arguments: parsed instead of the command line.
        defaults: override the dataclass's own.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--recipe", metavar="FILE", help="a YAML file of the settings below; flags override it")
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
        BadInput: the file is unreadable, or names an unknown setting.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise BadInput(f"{path.name} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path.name} is not a text file.") from error
    except yaml.YAMLError as error:
        raise BadInput(f"{path.name} is not YAML: {error}.") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path.name} must be a YAML mapping of setting names to values.")
    for old in OLD_NAMES.keys() & content.keys():
        logger.warning("%s: '%s' is now called '%s'", path.name, old, OLD_NAMES[old])
        content.setdefault(OLD_NAMES[old], content.pop(old))
    types_of = typing.get_type_hints(Recipe)
    unknown = content.keys() - types_of.keys()
    if unknown:
        raise BadInput(f"{path.name} has unknown settings: {', '.join(sorted(unknown))}. --help lists the known ones.")
    return {name: _converted(value, types_of[name], f"{path.name}, {name}") for name, value in content.items()}


def write_recipe(recipe: Recipe, path: str | Path) -> None:
    """Writes every setting, so that the run can be reproduced."""
    Path(path).write_text(yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))


def _default(setting_: dataclasses.Field) -> Any:
    return setting_.default if setting_.default is not dataclasses.MISSING else setting_.default_factory()


def _scalar_type(hint: Any) -> type:
    """``str`` for ``str``, ``str | None`` and ``list[str]``."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is list:
        return typing.get_args(hint)[0]
    return hint


def _renamed(name: str) -> Callable[[str], str] | None:
    """A parser that maps a setting's old values to today's; None if no value of it was renamed."""
    return (lambda value: OLD_VALUES[name].get(value, value)) if name in OLD_VALUES else None


def _converted(value: Any, hint: Any, label: str) -> Any:
    """Converts a YAML value to its type: YAML reads 1e-4 as text, and a single file need not be a list.

    Args:
        label: names the setting in errors.
    """
    scalar = _scalar_type(hint)
    if typing.get_origin(hint) is list:
        return [scalar(member) for member in (value if isinstance(value, list) else [value])]
    if value is None and scalar is not hint:
        return None
    if scalar is bool and not isinstance(value, bool):
        raise BadInput(f"{label} must be true or false, not '{value}'.")
    try:
        return scalar(value)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{label}: '{value}' is not a valid {scalar.__name__}.") from error


def _add_flag(group: Any, setting_: dataclasses.Field, hint: Any, default: Any, old: str | None = None) -> None:
    """Adds a setting's flag; ``old`` adds a hidden alias under the setting's old name."""
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
