"""Fine-tunes the projector and a LoRA adapter on transformers' Trainer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..errors import BadInput
from ..language_model import add_adapter, load_language_model
from ..model import MultimodalModel, load_model
from ..presets import Preset
from ..projector import ProjectorConfig, build_projector
from ..prompt import CHAT_FORMATS
from .data import ConversationDataset, FeatureStore, collate, read_conversations


class MultimodalTrainer(Trainer):
    """A Trainer with one learning rate for the projector and one for the adapter, whose checkpoints chat."""

    def __init__(self, *, preset: Preset, projector_learning_rate: float, **options):
        super().__init__(data_collator=collate, **options)
        self.preset = preset
        self.projector_learning_rate = projector_learning_rate

    def create_optimizer(self, model=None):
        """AdamW on what is trained, in two groups: the projector starts from nothing and needs larger steps."""
        if self.optimizer is None:
            adapter = [weight for weight in self.model.language_model.parameters() if weight.requires_grad]
            groups = [
                {"params": list(self.model.projector.parameters()), "lr": self.projector_learning_rate},
                {"params": adapter, "lr": self.args.learning_rate},
            ]
            self.optimizer = torch.optim.AdamW(groups, weight_decay=self.args.weight_decay)
        return self.optimizer

    def _get_train_sampler(self, train_dataset=None):
        """Batches of similar length, so that little is padding."""
        dataset = train_dataset or self.train_dataset
        lengths = [dataset.length(index) for index in range(len(dataset))]
        return LengthGroupedSampler(self.args.train_batch_size, lengths=lengths)

    def _save(self, output_dir=None, state_dict=None):
        self.model.save(output_dir or self.args.output_dir, self.preset)


def fresh_model(preset: Preset, *, rank: int, alpha: int, dropout: float) -> tuple[MultimodalModel, object]:
    """A model with an untrained projector and adapter, and its tokenizer."""
    language_model, tokenizer = load_language_model(preset.language_model, torch.float32)
    config = ProjectorConfig(
        kind=preset.projector.kind,
        image_width=preset.image_encoder.width,
        hidden_width=preset.projector.hidden_width,
        token_width=language_model.config.hidden_size,
    )
    base_name = preset.language_model.name
    adapted = add_adapter(language_model, rank=rank, alpha=alpha, dropout=dropout, base_name=base_name)
    return MultimodalModel(adapted, build_projector(config), config), tokenizer


def finetune(
    preset: Preset,
    arguments: TrainingArguments,
    *,
    train_file: str | Path,
    eval_file: str | Path | None,
    features: str | Path,
    projector_learning_rate: float,
    rank: int,
    alpha: int,
    dropout: float,
    start_from: str | Path | None = None,
) -> None:
    """Trains, and leaves a folder that chats in ``arguments.output_dir``.

    Args:
        train_file, eval_file: LLaVA-Instruct JSON.
        features: a folder written by ``FeatureStore.write`` with the preset's image encoder.
        rank, alpha, dropout: of a fresh adapter.
        start_from: a weights folder to go on from; fresh weights if None.

    Raises:
        BadInput: the features come from another image encoder.
    """
    store = FeatureStore(features)
    if store.encoder != preset.image_encoder.name:
        raise BadInput(f"The features were made by {store.encoder}; {preset.name} uses {preset.image_encoder.name}.")
    if start_from:
        model, tokenizer = load_model(preset, start_from, torch.float32, trainable=True)
    else:
        model, tokenizer = fresh_model(preset, rank=rank, alpha=alpha, dropout=dropout)
    chat_format = CHAT_FORMATS[preset.language_model.chat_format]

    def dataset(path):
        return ConversationDataset(read_conversations(path), store, tokenizer, chat_format)

    trainer = MultimodalTrainer(
        preset=preset,
        projector_learning_rate=projector_learning_rate,
        model=model,
        args=arguments,
        train_dataset=dataset(train_file),
        eval_dataset=dataset(eval_file) if eval_file else None,
    )
    trainer.train()
    trainer.model.save(arguments.output_dir, preset, torch.float16)  # checkpoints beside it keep full precision
