"""Tuning the image encoder on captions: what it learns, and that weights folders include it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from mmchat.checkpoints.weights_folder import load_model, preset_for_weights, save_weights
from mmchat.errors import BadInput, WeightsError
from mmchat.media import open_image
from mmchat.models.image_encoder import find_image_encoder, load_image_encoder
from mmchat.presets import EFFICIENTNET_LITE0, IMAGE_ENCODER_FILE, SMOL, HubRepository
from mmchat.training.averaging import average_weights
from mmchat.training.tune_image_encoder import tune_image_encoder, words_and_pairs

COLORS = {"red": (200, 60, 60), "blue": (60, 60, 200)}


def draw(folder: Path, color: str, number: int) -> dict:
    picture = Image.new("RGB", (96, 80), (120, 120, 120))
    left, top = 4 + 3 * (number % 12), 4 + 2 * (number % 9)
    ImageDraw.Draw(picture).rectangle((left, top, left + 30, top + 30), COLORS[color])
    picture.save(folder / f"{color}-{number}.png")
    return {"image": f"{color}-{number}.png", "captions": [f"A {color} box .", f"The {color} box is there ."]}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A folder with pictures of red and blue boxes, and an encoder tuned on their captions."""
    folder = tmp_path_factory.mktemp("tuned")
    pictures = [draw(folder, color, number) for number in range(16) for color in COLORS]
    tune_image_encoder(load_image_encoder(EFFICIENTNET_LITE0), pictures, folder, folder / "encoder", epochs=6, lr=3e-4)
    return folder


def contrast(encoder, folder):
    """The distance between red and blue boxes in feature space, relative to the spread of each color."""
    features = {
        color: encoder.encode([open_image(path) for path in sorted(folder.glob(f"{color}-*.png"))])[:, -1]
        for color in COLORS
    }
    centers = {color: found.mean(dim=0) for color, found in features.items()}
    spread = sum((found - centers[color]).norm(dim=1).mean() for color, found in features.items())
    return float((centers["red"] - centers["blue"]).norm() / spread)


def test_stop_words_are_left_out():
    assert words_and_pairs("Two dogs run in the red grass .") == {
        "two", "dogs", "run", "red", "grass", "two dogs", "dogs run", "red grass",
    }  # fmt: skip


def test_tuning_separates_what_captions_name(tuned):
    before = load_image_encoder(EFFICIENTNET_LITE0)
    after = load_image_encoder(find_image_encoder(HubRepository(str(tuned / "encoder"))))
    assert contrast(after, tuned) > 1.1 * contrast(before, tuned)
    kept, expected = (encoder.network.stem.convolution.weight for encoder in (after, before))
    torch.testing.assert_close(kept, expected, atol=1e-3, rtol=1e-3)  # the frozen blocks, up to fp16 rounding


def test_captions_without_a_common_word_are_rejected(tmp_path):
    pictures = [draw(tmp_path, "red", number) for number in range(3)]
    with pytest.raises(BadInput, match="too few"):
        tune_image_encoder(
            load_image_encoder(EFFICIENTNET_LITE0), pictures, tmp_path, tmp_path / "encoder", epochs=1, lr=1e-4
        )


def test_saved_weights_include_their_encoder(smol_model, tuned, tmp_path):
    encoder = find_image_encoder(HubRepository(str(tuned / "encoder")))
    folder = tmp_path / "weights"
    save_weights(smol_model, folder, replace(SMOL, image_encoder=encoder))
    (folder / "tagger.safetensors").unlink()  # it was fitted to another encoder
    assert preset_for_weights(SMOL, folder).image_encoder.revision == encoder.revision
    load_model(preset_for_weights(SMOL, folder), folder, torch.float32)
    average_weights(folder, folder, 0.5, tmp_path / "average")
    assert (tmp_path / "average" / IMAGE_ENCODER_FILE).read_bytes() == (folder / IMAGE_ENCODER_FILE).read_bytes()

    (folder / IMAGE_ENCODER_FILE).unlink()
    with pytest.raises(WeightsError, match="image encoder 'efficientnet-lite0 tuned"):
        load_model(preset_for_weights(SMOL, folder), folder, torch.float32)
    load_model(SMOL, folder, torch.float32, any_encoder=True)  # training with another encoder starts like this


def test_weights_made_with_the_untuned_encoder_find_it(smol_model, tmp_path):
    save_weights(smol_model, tmp_path, replace(SMOL, image_encoder=EFFICIENTNET_LITE0))
    assert not (tmp_path / IMAGE_ENCODER_FILE).exists()
    assert preset_for_weights(SMOL, tmp_path).image_encoder == EFFICIENTNET_LITE0
    assert find_image_encoder(HubRepository(EFFICIENTNET_LITE0.name)) == EFFICIENTNET_LITE0


def test_older_weights_read_the_square_in_the_middle(smol_model, tmp_path):
    older = replace(SMOL, image_encoder=replace(SMOL.image_encoder, whole_image=False))
    save_weights(smol_model, tmp_path, older)
    assert preset_for_weights(SMOL, tmp_path).image_encoder == older.image_encoder


def test_a_damaged_encoder_is_an_error(tuned, tmp_path):
    (tmp_path / IMAGE_ENCODER_FILE).write_bytes((tuned / "encoder" / IMAGE_ENCODER_FILE).read_bytes()[:-100])
    with pytest.raises(WeightsError, match="image encoder") as caught:
        load_image_encoder(find_image_encoder(HubRepository(str(tmp_path))))
    assert str(tmp_path.parent) not in str(caught.value)
