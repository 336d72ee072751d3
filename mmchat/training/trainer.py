"""Trains the projector and a LoRA adapter with transformers' Trainer; every checkpoint is a folder ready for chat."""

from __future__ import annotations

import logging
import math
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints.weights_folder import load_weights, save_weights, trained_state
from ..device import choose_device
from ..errors import WeightsError
from ..models.vision_language_model import IGNORE_INDEX, VisionLanguageModel
from ..presets import Preset
from .data.packing import collate
from .loss import next_token_loss
from .recipe import Recipe

logger = logging.getLogger(__name__)

STAGING = ".unfinished"  # checkpoints are written here and renamed when they are complete


def training_arguments(recipe: Recipe, preset: Preset) -> TrainingArguments:
    """Translates a recipe into the Trainer's arguments.

    A language model that overflows in fp16 is trained in bf16.
    """
    precision = recipe.precision
    if precision == "fp16" and preset.language_model.overflows_float16:
        logger.warning("%s overflows in fp16: training in bf16", preset.language_model.name)
        precision = "bf16"
    eval_strategy = "steps" if recipe.eval else "no"
    return TrainingArguments(
        output_dir=recipe.out,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.lr or recipe.projector_lr,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(recipe.lr_scheduler_type, recipe.lr_scheduler_type),
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        use_cpu=choose_device().type == "cpu",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        logging_steps=recipe.log_steps,
        logging_first_step=True,
        eval_strategy=eval_strategy,
        eval_steps=recipe.eval_steps,
        save_steps=recipe.save_steps,
        save_total_limit=recipe.save_total_limit,
        metric_for_best_model="loss" if recipe.eval else None,
        greater_is_better=False if recipe.eval else None,
        load_best_model_at_end=recipe.patience > 0,
        remove_unused_columns=False,  # the collator needs them: dataset columns are not the arguments of forward
        label_names=["labels"],
        prediction_loss_only=True,
        report_to=[] if recipe.report_to == ["none"] else recipe.report_to,
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=recipe.seed,
    )


class EpochSampler(Sampler[int]):
    """Draws sequences in an order that depends only on the seed and the epoch, so that a resumed run repeats it.

    A step holds sequences of similar length, which saves padding; the steps come in random order. (transformers'
    LengthGroupedSampler orders each fifty batches by length, so kinds of data with different lengths come in blocks.)
    """

    POOL = 50  # steps whose sequences are sorted by length together

    def __init__(self, step_size: int, lengths: Sequence[int], seed: int):
        self.step_size, self.lengths, self.seed = step_size, lengths, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random_numbers = random.Random(f"{self.seed} {self.epoch}")
        order = random_numbers.sample(range(len(self)), len(self))
        pool = self.POOL * self.step_size
        order = [
            index
            for start in range(0, len(order), pool)
            for index in sorted(order[start : start + pool], key=lambda index: self.lengths[index])
        ]
        full = len(order) // self.step_size * self.step_size  # sequences in full steps
        steps = [order[start : start + self.step_size] for start in range(0, full, self.step_size)]
        random_numbers.shuffle(steps)
        yield from (index for step in [*steps, order[full:]] for index in step)


class VisionLanguageTrainer(Trainer):
    """A Trainer with separate learning rates and log columns for projector and adapter.

    A checkpoint is written under a temporary name, read back, compared, and renamed, so every ``checkpoint-N`` is
    complete.

    These private hooks of transformers' Trainer are overridden, and a minor version may change them. The suite passes
    with transformers 5.23, and the requirements allow no other minor version:

        _get_train_sampler: an order that a resumed run repeats
        _clip_grad_norm: records each part's gradient norm before clipping
        _save: writes a weights folder instead of the whole model
        _get_output_dir, _save_checkpoint: write aside, compare, rename
        _load_from_checkpoint, _load_best_model: read a weights folder
    """

    def __init__(self, *, recipe: Recipe, preset: Preset, **options: Any):
        super().__init__(args=training_arguments(recipe, preset), data_collator=collate, **options)
        self.model_accepts_loss_kwargs = True  # tells the Trainer to count num_items_in_batch
        self.recipe = recipe
        self.preset = preset
        self.parts = {
            "projector": [weight for weight in self.model.projector.parameters() if weight.requires_grad],
            "adapter": [weight for weight in self.model.language_model.parameters() if weight.requires_grad],
        }
        self.parts = {name: weights for name, weights in self.parts.items() if weights}
        self._start = {name: [weight.detach().clone() for weight in part] for name, part in self.parts.items()}
        self._gradient_norms: dict[str, torch.Tensor] = {}
        self._has_seen_picture = self._has_checked_gradients = False
        self._answer_tokens = 0
        self._logged_at = time.monotonic()

    # Optimizer, sampling, loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            rates = {"projector": self.recipe.projector_lr, "adapter": self.recipe.lr}
            groups = [{"params": weights, "lr": rates[name], "name": name} for name, weights in self.parts.items()]
            self.optimizer = torch.optim.AdamW(groups, weight_decay=self.args.weight_decay)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        lengths = [len(row) for row in (train_dataset or self.train_dataset).rows]
        # One step spans accumulated batches and all devices, so their lengths are matched, too.
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return EpochSampler(step, lengths, self.args.seed)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if model.training:
            self._has_seen_picture |= "image_features" in inputs
            self._answer_tokens += int((inputs["labels"] != IGNORE_INDEX).sum())
            probability = scheduled_sampling_probability(self.state.global_step, self.recipe)
            if probability > 0:
                inputs = self._with_predicted_tokens(inputs, probability)
        loss, outputs = self._loss_and_outputs(model, inputs, num_items_in_batch)
        if num_items_in_batch is not None:  # it spans all processes, and DDP averages their gradients
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _loss_and_outputs(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """The loss of a batch, and what the model returned: logits and labels."""
        outputs = model(**{name: tensor for name, tensor in inputs.items() if name != "label_weights"})
        loss = next_token_loss(
            *outputs,
            num_items_in_batch=num_items_in_batch,
            label_weights=inputs.get("label_weights"),
            label_smoothing=self.recipe.label_smoothing if model.training else 0.0,
        )
        return loss, outputs

    @torch.no_grad()
    def _with_predicted_tokens(self, inputs: dict[str, Any], probability: float) -> dict[str, Any]:
        """Replaces each answer token, with this probability, by the model's own prediction; labels stay."""
        model = self.accelerator.unwrap_model(self.model)
        logits, _ = VisionLanguageModel.forward(model, **inputs)  # [labels, vocabulary], without accelerate's autocast
        is_label = inputs["labels"] != IGNORE_INDEX  # [batch, length]
        predicted = torch.zeros_like(inputs["input_ids"]).masked_scatter(is_label, logits.argmax(dim=-1))
        is_replaced = is_label & (torch.rand(is_label.shape, device=is_label.device) < probability)
        return {**inputs, "input_ids": inputs["input_ids"].where(~is_replaced, predicted)}

    # Gradient checks and logging

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._gradient_norms = {name: _norm([weight.grad for weight in part]) for name, part in self.parts.items()}
        if self._has_seen_picture and not self._has_checked_gradients:  # the projector's gradients need a picture
            self._check_gradients()
            self._has_checked_gradients = True
        return super()._clip_grad_norm(model)

    def _check_gradients(self) -> None:
        """Raises WeightsError unless exactly the trainable parameters have gradients."""
        trained = {id(weight) for part in self.parts.values() for weight in part}
        named = list(self.accelerator.unwrap_model(self.model).named_parameters())
        without = [name for name, weight in named if id(weight) in trained and weight.grad is None]
        frozen = [name for name, weight in named if id(weight) not in trained and weight.grad is not None]
        if without or frozen:
            raise WeightsError(
                f"After the first step {len(without)} trainable parameters have no gradient "
                f"({', '.join(without[:3])}), and {len(frozen)} frozen ones have one ({', '.join(frozen[:3])})."
            )
        for name, part in self.parts.items():
            if not self._gradient_norms[name] > 0:
                raise WeightsError(f"After the first step the gradient of the {name} is {self._gradient_norms[name]}.")
            count = sum(weight.numel() for weight in part)
            logger.info("%s: all %d tensors (%s parameters) have gradients", name, len(part), f"{count:,}")
        logger.info("The other %d tensors are frozen and have no gradients", len(named) - len(trained))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            seconds = time.monotonic() - self._logged_at
            logs["answer_tokens_per_second"] = round(self._answer_tokens / max(seconds, 1e-9), 1)
            self._answer_tokens, self._logged_at = 0, time.monotonic()
            logs.pop("learning_rate", None)
            for group in self.optimizer.param_groups:
                name = group["name"]
                logs[f"{name}_learning_rate"] = group["lr"]
                logs[f"{name}_gradient_norm"] = float(self._gradient_norms[name])
                logs[f"{name}_change"] = self._change(name)
            if self.recipe.scheduled_sampling:
                logs["scheduled_sampling"] = scheduled_sampling_probability(self.state.global_step, self.recipe)
        super().log(logs, start_time)

    def _change(self, name: str) -> float:
        """Distance of a part's weights from the start, relative to their norm at the start."""
        moved = [
            now.detach() - then.to(now.device) for now, then in zip(self.parts[name], self._start[name], strict=True)
        ]
        return float(_norm(moved) / _norm(self._start[name]).to(moved[0].device).clamp(min=1e-12))

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        save_weights(model, output_dir or self.args.output_dir, self.preset)

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(super()._get_output_dir(trial), STAGING)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        out = Path(self.args.output_dir)
        best = self.state.best_global_step
        best_folder = out / f"{PREFIX_CHECKPOINT_DIR}-{best}"
        if best == self.state.global_step or best_folder.exists():
            self.state.best_model_checkpoint = str(best_folder)  # the Trainer would name the staging folder
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                staged = out / STAGING / name
                self._compare_with_disk(staged)
                shutil.rmtree(out / name, ignore_errors=True)
                staged.rename(out / name)
        except (OSError, RuntimeError, SafetensorError) as error:  # libraries report a full disk in different ways
            raise WeightsError(_not_written(name, checkpoints(out))) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(out / STAGING, ignore_errors=True)
        if self.args.should_save:
            self._prune(out)
        self.accelerator.wait_for_everyone()

    def _compare_with_disk(self, folder: Path) -> None:
        """Raises WeightsError unless the written tensors equal those in memory."""
        for name, tensors in trained_state(self.accelerator.unwrap_model(self.model)).items():
            written = load_file(folder / name)
            same = written.keys() == tensors.keys() and all(
                torch.equal(written[key], tensor.cpu()) for key, tensor in tensors.items()
            )
            if not same:
                raise WeightsError(f"{name} of {folder.name} differs from memory after writing: check the disk.")

    def _prune(self, out: Path) -> None:
        """Removes the oldest checkpoints beyond ``save_total_limit``, never the best one."""
        best = Path(self.state.best_model_checkpoint).name if self.state.best_model_checkpoint else None
        others = [folder for folder in checkpoints(out) if folder.name != best]
        for folder in others[: -self.recipe.save_total_limit or None]:
            shutil.rmtree(folder, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.accelerator.unwrap_model(model or self.model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        logger.info("Loading the best weights, from %s", Path(self.state.best_model_checkpoint).name)
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def checkpoints(folder: str | Path) -> list[Path]:
    """Complete checkpoints in a run's output folder, the newest last."""
    found = Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json")
    return sorted((path.parent for path in found), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def _not_written(name: str, complete: list[Path]) -> str:
    advice = f"resume from {complete[-1].name} with --resume" if complete else "start the run again"
    return f"{name} could not be written. If the disk is full, free some space and {advice}."


def scheduled_sampling_probability(step: int, recipe: Recipe) -> float:
    """The probability of feeding the model its own prediction: a cosine cycle, 0 to ``scheduled_sampling`` and back.

    Scheduled sampling: Bengio et al. 2015, arXiv 1506.03099.
    """
    return recipe.scheduled_sampling * 0.5 * (1 - math.cos(2 * math.pi * step / recipe.scheduled_sampling_cycle))


def _norm(tensors: list[torch.Tensor | None]) -> torch.Tensor:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(present)).float()) if present else torch.zeros(())
