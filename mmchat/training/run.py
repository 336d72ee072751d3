"""Runs a recipe: loads data and model, trains, and writes weights and samples."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, set_seed

from ..checkpoints.weights_folder import load_model, preset_for_weights, save_weights
from ..device import choose_device, keep_freed_memory
from ..errors import BadInput, MmchatError
from ..models.chat_formats import chat_format_of
from ..models.image_encoder import find_image_encoder, load_image_encoder
from ..models.language_model import add_adapter, load_language_model
from ..models.projector import ProjectorConfig, build_projector, init_end_of_image
from ..models.prompt import no_text
from ..models.tagger import load_tagger
from ..models.vision_language_model import VisionLanguageModel
from ..presets import HubRepository, Preset, get_preset
from .callbacks import HistoryCallback, StopOnSignal
from .data.features import FeatureStore, PictureFolder
from .data.llava_json import read_conversations
from .data.packing import ConversationDataset
from .evaluation.evaluator import Evaluator
from .evaluation.samples import write_samples
from .fit_tagger import TrainingTags
from .int8 import use_faster_multiplication
from .recipe import CPU_INT8, Recipe, write_recipe
from .self_critical import SelfCriticalTrainer
from .sharding import shard_base
from .trainer import VisionLanguageTrainer, checkpoints

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.yaml"
INTERRUPTED = 130  # exit status, as of a command that Ctrl-C ends, so that scripts stop, too


def train(recipe: Recipe) -> bool:
    """Trains, and writes weights ready for chat, checkpoints, the recipe, history and samples to ``recipe.out``.

    Returns:
        Whether training ran to its end; False after Ctrl-C.

    Raises:
        BadInput: the data or the features are unusable.
        WeightsError: the weights to start from do not fit the model.
    """
    set_seed(recipe.seed)
    preset = chosen_preset(recipe)
    features = open_features(recipe, preset)
    model, tokenizer = build_model(recipe, preset)
    tags = no_text
    if model.tagger:
        tags = TrainingTags(model.tagger, Path(recipe.tagger or recipe.start_from), features, recipe.seed)

    def dataset(paths: list[str]) -> ConversationDataset:
        return ConversationDataset(
            chain.from_iterable(read_conversations(path) for path in paths),
            features,
            tokenizer,
            chat_format_of(preset),
            model.tokens_per_image,
            max_length=recipe.max_length,
            pack=recipe.pack_conversations,
            image_text=tags,
        )

    train_set = dataset(recipe.train)
    logger.info("Training on %d conversations in %d sequences", train_set.count, len(train_set))
    stop = StopOnSignal()
    callbacks = [HistoryCallback(), stop]
    if recipe.patience:
        callbacks.append(EarlyStoppingCallback(recipe.patience))
    if recipe.shard:
        shard_base(model)
    trainer_class, options = VisionLanguageTrainer, {}
    if recipe.scst_samples:
        trainer_class, options = SelfCriticalTrainer, {"tokenizer": tokenizer}
    trainer = trainer_class(
        **options,
        recipe=recipe,
        preset=preset,
        model=model,
        train_dataset=train_set,
        eval_dataset=dataset(recipe.eval) if recipe.eval else None,
        callbacks=callbacks,
    )
    out = Path(recipe.out)
    if trainer.is_world_process_zero():
        out.mkdir(parents=True, exist_ok=True)
        write_recipe(recipe, out / RECIPE_FILE)
    trainer.train(resume_from_checkpoint=_newest_checkpoint(recipe))
    is_first = trainer.is_world_process_zero()
    if is_first:
        save_weights(model, out, preset, torch.float16)  # checkpoints keep full precision
    if recipe.eval and recipe.samples and (is_first or recipe.shard):  # a sharded model needs every process
        evaluator = Evaluator(model, tokenizer, chat_format_of(preset))
        write_samples(evaluator, recipe.eval[0], features, recipe.samples, out if is_first else None)
    return not stop.is_requested


def _newest_checkpoint(recipe: Recipe) -> str | None:
    found = checkpoints(recipe.out)
    if found and not recipe.resume:
        raise BadInput(
            f"{recipe.out} holds checkpoints of an earlier run: add --resume to continue it, or choose another --out."
        )
    if recipe.resume:
        logger.info("Resuming from %s", found[-1].name if found else "the start: there is no checkpoint yet")
    return str(found[-1]) if found else None


def chosen_preset(recipe: Recipe) -> Preset:
    """The recipe's preset, with the image encoder of the recipe or of the weights it starts from."""
    preset = get_preset(recipe.preset)
    if start := recipe.start_from or _llava(preset):
        preset = preset_for_weights(preset, start)
        if preset.language_model.is_llava:
            logger.info("Training on the LLaVA model %s with its own image encoder", preset.language_model.name)
    if recipe.image_encoder:
        encoder = find_image_encoder(
            HubRepository(recipe.image_encoder), recipe.image_features, recipe.image_layer, recipe.class_token
        )
        return replace(preset, image_encoder=encoder)
    return preset


def open_features(recipe: Recipe, preset: Preset) -> FeatureStore | PictureFolder:
    """Opens the features or the picture folder of a recipe.

    Raises:
        BadInput: the features come from another image encoder.
    """
    if recipe.images:
        return PictureFolder(recipe.images, load_image_encoder(preset.image_encoder))
    store = FeatureStore(recipe.features)
    store.check(preset.image_encoder)
    return store


def build_model(recipe: Recipe, preset: Preset) -> tuple[VisionLanguageModel, Any]:
    """Builds the model, with fresh weights or those of ``start_from``, and its tokenizer.

    A learning rate of 0 freezes its part; with ``lr`` 0 no fresh adapter is added.
    """
    dtype = _base_dtype(recipe)
    quantization = "none" if recipe.quantization == CPU_INT8 else recipe.quantization  # cpu-int8 is applied below
    start = recipe.start_from or (None if recipe.projector else _llava(preset))
    if start:
        model, tokenizer = load_model(
            preset,
            start,
            dtype,
            quantization=quantization,
            trainable=True,
            any_encoder=recipe.image_encoder is not None,
        )
    else:
        language_model, tokenizer = load_language_model(preset.language_model, dtype, quantization)
        config = ProjectorConfig(
            kind=recipe.projector or preset.projector.kind,
            image_dim=preset.image_encoder.image_dim,
            intermediate_size=recipe.intermediate_size or preset.projector.intermediate_size,
            hidden_size=language_model.config.hidden_size,
            feature_count=preset.image_encoder.feature_count,
            end_of_image_token=recipe.end_of_image_token,
            depth=recipe.projector_depth,
            dropout=recipe.projector_dropout,
        )
        projector = build_projector(config)
        if config.end_of_image_token:
            init_end_of_image(projector, language_model, tokenizer)
        model = VisionLanguageModel(language_model, projector, config)
    if recipe.tagger:
        model.tagger = load_tagger(recipe.tagger, preset.image_encoder)
        if not model.tagger:
            raise BadInput(f"'{recipe.tagger}' holds no tagger: write one with fit_tagger.py.")
    if recipe.lr and not model.has_adapter:
        model.language_model = add_adapter(
            model.language_model,
            rank=recipe.rank,
            alpha=recipe.alpha,
            dropout=recipe.dropout,
            base_name=preset.language_model.name,
            target_modules="all-linear" if recipe.target_modules == ["all-linear"] else recipe.target_modules,
        )
    if recipe.quantization == CPU_INT8:
        if choose_device().type == "cpu":
            use_faster_multiplication(model.unwrapped_language_model.get_decoder(), Path(recipe.out))
        else:
            logger.warning("cpu-int8 works on CPUs only: the base model stays in full precision")
    for weight in model.parameters():  # trainable weights are float32, whatever the precision of the base
        if weight.requires_grad:
            weight.data = weight.data.float()
    model.projector.requires_grad_(recipe.projector_lr > 0)
    if not recipe.lr:
        model.language_model.requires_grad_(False)
    if recipe.gradient_checkpointing:
        model.unwrapped_language_model.gradient_checkpointing_enable({"use_reentrant": False})
    if recipe.compile:  # layer by layer: all layers share one compilation
        for layer in model.unwrapped_language_model.get_decoder().layers:
            layer.compile(dynamic=True)
    return model.train(), tokenizer


def _llava(preset: Preset) -> HubRepository | None:
    """The LLaVA model of a preset: training continues from its projector."""
    source = preset.language_model.source
    return source if preset.language_model.is_llava and isinstance(source, HubRepository) else None


def _base_dtype(recipe: Recipe) -> torch.dtype:
    if recipe.precision == "fp32":
        return torch.float32
    device = choose_device()
    return device.dtype if device.type == "cuda" else torch.float32


def run_from_terminal(recipe: Recipe) -> None:
    """Calls ``train`` from a script: logs to the terminal and exits with one sentence on an error.

    After Ctrl-C, the exit status is 130.
    """
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"  # only the first of several processes logs
    logging.basicConfig(level=logging.INFO if is_first else logging.WARNING, format="%(message)s")
    keep_freed_memory()
    try:
        is_finished = train(recipe)
    except MmchatError as error:
        sys.exit(str(error))
    if not is_finished:
        logger.info("Stopped before the last step; --resume continues")
        sys.exit(INTERRUPTED)
    logger.info("Chat with the weights: python app.py --weights %s", recipe.out)
