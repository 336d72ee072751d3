"""Recipes of earlier projects: read, built from, and told truly in docs/training.md."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
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

FOLDER = Path(__file__).parent.parent / "training_scripts" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))  # of earlier projects; ours are in folders


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_names_its_preset(path):
    assert read_recipe(path)["preset"] in PRESETS


def test_one_script_runs_the_recipes_of_smol_in_order():
    script = (FOLDER.parent / "train_smol.sh").read_text(encoding="utf-8")
    named = re.findall(r"^finetune (\S+) runs/smol-(\d)$", script, re.MULTILINE)
    assert [f"{name}.yaml" for name, _ in named] == sorted(path.name for path in (FOLDER / "smol").glob("*.yaml"))
    for name, number in named:
        recipe = read_recipe(FOLDER / "smol" / f"{name}.yaml")
        assert recipe["out"] == f"runs/smol-{number}"
        assert all(path in script for path in recipe["train"])


def test_the_script_repeats_an_interrupted_step_and_skips_finished_ones(tmp_path):
    """Python is a stand-in here that writes what it was called with, and stops once in the middle of the features."""
    scripts, data = tmp_path / "training_scripts", tmp_path / "research"
    scripts.mkdir()
    for folder in ("flickr8k", "world"):
        (data / folder / "images").mkdir(parents=True)
    script = shutil.copy(FOLDER.parent / "train_smol.sh", scripts)
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'echo "$@" >> calls\n'
        'case "$*" in *embed_images*) mkdir -p data/features-lite2; touch data/features-lite2/manifest.json;; esac\n'
        'case "$*" in *embed_images*) [ -e stopped ] || { touch stopped; exit 130; };; esac\n'
        'case "$*" in *fit_tagger*) exit 7;; esac\n'
    )
    python.chmod(0o755)
    environment = {**os.environ, "DATA": str(data), "PYTHON": str(python)}
    statuses = [subprocess.run(["bash", script], env=environment, capture_output=True).returncode for _ in range(2)]
    assert statuses == [130, 7]
    calls = (tmp_path / "calls").read_text().splitlines()
    prepared = [call for call in calls if "prepare_data" in call]
    assert len(prepared) == len(set(prepared)) == 9
    assert len([call for call in calls if "embed_images" in call]) == 2


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
    assert model.projector_config.dropout == recipe.projector_dropout
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


def shown(recipe: Recipe) -> dict[str, str]:
    """A recipe's settings as the table in docs/training.md writes them; empty where a setting has no meaning."""
    preset = PRESETS[recipe.preset]
    encoder = recipe.image_encoder or preset.image_encoder.source.name
    is_pooled = not recipe.image_encoder and preset.image_encoder.features == "pooled"
    depth = f" × {recipe.projector_depth}" if recipe.projector == "normblocks" else ""
    accumulation = f" × {recipe.gradient_accumulation_steps}" if recipe.gradient_accumulation_steps > 1 else ""
    linear = 6 if recipe.preset == "phi-2" else 4  # kinds of linear layers
    adapted = [name.removesuffix("_proj") for name in recipe.target_modules]
    evaluated = recipe.eval_steps if recipe.eval else "never"
    assert not recipe.class_token and recipe.image_features == "patches"
    return {
        "model": recipe.preset,
        "CLIP": encoder.replace("openai/clip-vit-base-patch", "B/"),
        "features": "pooled" if is_pooled else f"layer {recipe.image_layer}",
        "projector": f"{recipe.projector}{depth}",
        "intermediate size": str(recipe.intermediate_size or ""),
        "projector dropout": f"{recipe.projector_dropout:g}",
        "projector learning rate": rate(recipe.projector_lr),
        "base weights": recipe.quantization,
        "compute dtype": recipe.precision,
        "adapter on": ("all" if len(adapted) == linear else ", ".join(adapted)) if recipe.lr else "",
        "rank, alpha": f"{recipe.rank}, {recipe.alpha}" if recipe.lr else "",
        "dropout": f"{recipe.dropout:g}" if recipe.lr else "",
        "adapter learning rate": rate(recipe.lr),
        "schedule": recipe.lr_scheduler_type,
        "warmup": f"{recipe.warmup:g}",
        "label smoothing": f"{recipe.label_smoothing:g}",
        "batch": f"{recipe.batch_size}{accumulation}",
        "length": f"{recipe.max_steps} steps" if recipe.max_steps > 0 else f"{recipe.epochs:g} epoch",
        "gradient clipping": f"{recipe.max_grad_norm:g}",
        "weight decay": f"{recipe.weight_decay:g}",
        "maximum tokens": str(recipe.max_length),
        "packing": "yes" if recipe.pack_conversations else "no",
        "end-of-image token": "learned" if recipe.end_of_image_token else "none",
        "gradient checkpointing": "yes" if recipe.gradient_checkpointing else "no",
        "steps between saves, logs, evaluations": f"{recipe.save_steps}, {recipe.log_steps}, {evaluated}",
    }


def rate(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-") if value else "frozen"


def test_the_documented_settings_are_those_of_the_recipes():
    page = (FOLDER.parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
    lines = page.split("## Recipes of earlier projects")[1].split("\n## ")[0].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    told = {name: {row[0]: row[column].rpartition("→")[2].strip() for row in rows} for column, name in enumerate(head)}
    assert told.keys() - {""} == {path.stem for path in RECIPES}
    for path in RECIPES:
        assert told[path.stem] == shown(Recipe(**read_recipe(path)))
