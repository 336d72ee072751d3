"""Every recipe of an earlier project is read, and what it sets is what the model is built from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmchat.models.prompt import IMAGE_TOKEN_ID
from mmchat.models.vision_language_model import IGNORE_INDEX
from mmchat.presets import PRESETS
from mmchat.training.loss import next_token_loss
from mmchat.training.recipe import Recipe, read_recipe
from mmchat.training.run import build_model

RECIPES = sorted((Path(__file__).parent.parent / "training_scripts" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_tiny_model_is_built_as_the_recipe_says(tiny, tmp_path, path):
    recipe = Recipe(**read_recipe(path))
    assert recipe.preset in PRESETS and recipe.preset != "smol"
    kind = "phi3-patches" if recipe.preset == "phi-3.5" else "phi-patches"
    small = replace(
        recipe,
        preset=kind,
        quantization="none",
        start_from=None,
        projector_lr=recipe.projector_lr or 1e-3,
        intermediate_size=64,
    )
    model, _ = build_model(small, PRESETS[kind])
    assert model.projector_config.kind == recipe.projector
    assert model.projector_config.depth == recipe.projector_depth
    assert model.has_adapter == bool(recipe.lr)
    if recipe.target_modules != ["all-linear"]:
        names = [name for name, _ in model.named_parameters() if ".lora_A." in name]
        assert {name.split(".lora_A.")[0].rsplit(".", 1)[1] for name in names} == set(recipe.target_modules)
    encoder = PRESETS[kind].image_encoder
    ids = torch.tensor([[*[IMAGE_TOKEN_ID] * model.tokens_per_image, 1, 2, 3, 4]])
    labels = ids.masked_fill(ids == IMAGE_TOKEN_ID, IGNORE_INDEX)
    shown = torch.randn(1, encoder.feature_count, encoder.image_dim)
    outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, image_features=shown)
    next_token_loss(*outputs).backward()
    assert all(parameter.grad is not None for parameter in model.projector.parameters() if parameter.requires_grad)
