"""Feature stores: correct features, resuming, and checks of the encoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from mmchat.errors import BadInput
from mmchat.media import open_image
from mmchat.models.image_encoder import load_image_encoder
from mmchat.presets import HubRepository, get_preset
from mmchat.training.data import features
from mmchat.training.data.features import FeatureStore, PictureFolder, embed_folder
from tests.close import assert_close

HALF = 2**-10  # the distance between numbers in half precision, as they are stored, relative to them


@pytest.fixture
def preset(tiny):
    return get_preset("phi3-patches").image_encoder


@pytest.fixture
def pictures(tmp_path):
    """Three pictures, one of them in a subfolder, and a damaged one."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.jpg", "more/c.png")):
        Image.new("RGB", (50, 40), (90 * number, 100, 200)).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"not a picture")
    (folder / "notes.txt").write_text("no picture either")
    return folder


def test_features_equal_the_encoders_and_bad_files_are_listed(pictures, preset, tmp_path):
    encoder = load_image_encoder(preset)
    report = embed_folder(pictures, tmp_path / "features", preset, encoder, batch_size=2)
    assert (report.embedded, report.kept) == (3, 0) and list(report.unreadable) == ["broken.jpg"]
    store = FeatureStore(tmp_path / "features")
    assert len(store) == 3 and "more/c.png" in store and "broken.jpg" not in store
    expected = encoder.encode([open_image(pictures / "more" / "c.png")])[0]
    assert store["more/c.png"].dtype == torch.float16
    assert_close(store["more/c.png"].float(), expected, HALF)


def test_links_to_folders_are_followed_without_loops(pictures, preset, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "photos").symlink_to(pictures)
    (pictures / "more" / "back").symlink_to(pictures)
    (linked / "lost.png").symlink_to(tmp_path / "nowhere.png")
    report = embed_folder(linked, tmp_path / "features", preset, load_image_encoder(preset))
    assert report.embedded == 3 and list(report.unreadable) == ["photos/broken.jpg"]
    assert "photos/more/c.png" in FeatureStore(tmp_path / "features")


def test_progress_counts_pictures(pictures, preset, tmp_path):
    counted = []

    def count(found, total):
        counted.append(total)
        for picture in found:
            counted.append(picture[0])
            yield picture

    embed_folder(pictures, tmp_path / "features", preset, load_image_encoder(preset), progress=count)
    assert counted == [4, "a.png", "b.jpg", "broken.jpg", "more/c.png"]


def test_mirrored_pictures_have_their_own_features(pictures, preset, tmp_path):
    halves = Image.new("RGB", (40, 40), "red")
    halves.paste((0, 0, 255), (0, 0, 20, 40))
    halves.save(pictures / "a.png")
    encoder = load_image_encoder(preset)
    report = embed_folder(pictures, tmp_path / "features", preset, encoder, mirror=True)
    store = FeatureStore(tmp_path / "features")
    assert report.embedded == len(store) == 6 and not torch.equal(store["a.png"], store["mirrored/a.png"])
    assert_close(PictureFolder(pictures, encoder)["mirrored/a.png"], store["mirrored/a.png"], HALF)


def test_a_second_run_embeds_only_new_and_changed_pictures(pictures, preset, tmp_path):
    encoder = load_image_encoder(preset)
    embed_folder(pictures, tmp_path / "features", preset, encoder)
    before = FeatureStore(tmp_path / "features")["a.png"]
    Image.new("RGB", (50, 40), (255, 0, 0)).save(pictures / "a.png")
    Image.new("RGB", (50, 40), (0, 0, 9)).save(pictures / "d.png")
    report = embed_folder(pictures, tmp_path / "features", preset, encoder)
    assert (report.embedded, report.kept) == (2, 2)
    store = FeatureStore(tmp_path / "features")
    assert len(store) == 4 and not torch.equal(store["a.png"], before)


def test_an_interrupted_run_resumes(pictures, preset, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "PICTURES_PER_SHARD", 1)
    encoder, calls = load_image_encoder(preset), []

    def stop_at_the_third(batches, total):
        for number, batch in enumerate(batches):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        embed_folder(pictures, tmp_path / "features", preset, encoder, batch_size=1, progress=stop_at_the_third)
    encoder.register_forward_hook(lambda *_: calls.append(1))
    report = embed_folder(pictures, tmp_path / "features", preset, encoder, batch_size=1)
    assert (report.kept, report.embedded, len(calls)) == (2, 1, 1)
    assert len(FeatureStore(tmp_path / "features")) == 3


def test_features_of_another_encoder_are_rejected(pictures, preset, tmp_path):
    encoder = load_image_encoder(preset)
    embed_folder(pictures, tmp_path / "features", preset, encoder)
    for other, says in (
        (replace(preset, source=HubRepository("other")), "revision"),
        (replace(preset, layer=-1), "layer -1"),
    ):
        with pytest.raises(BadInput, match=says):
            FeatureStore(tmp_path / "features").check(other)
        with pytest.raises(BadInput, match=f"{says}.*delete the folder"):
            embed_folder(pictures, tmp_path / "features", other, encoder)


def test_empty_folders_are_errors(preset, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no pictures in 'empty'"):
        embed_folder(tmp_path / "empty", tmp_path / "features", preset, load_image_encoder(preset))
    with pytest.raises(BadInput, match="'empty' holds no features"):
        FeatureStore(tmp_path / "empty")
