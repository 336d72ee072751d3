"""Shared fixtures: the real `smol` models, loaded once, and real speech and pictures."""

from __future__ import annotations

import os
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browsing import SPEECH, browser, page, slow_writing, visitor  # noqa: F401 (fixtures)

ROOT = Path(__file__).resolve().parent.parent

# Uploads are named by their content: tests side by side would delete each other's.
os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="mmchat-uploads-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the `smol` preset must work without the Hub

# Fixtures that load the real models, serve the page, start a server, or train. Tests that use them are slow, and
# `make check` skips them.
SLOW_FIXTURES = {
    "address",
    "described",
    "engine",
    "exported",
    "fresh",
    "hub",
    "pair",
    "prepared",
    "served",
    "trained",
    "tuned",
}


# Files that take longest. They start first, so that both processes of `make test` end at about the same time.
LONGEST = ["test_page", "test_speech", "test_trainer", "test_voice", "test_scripts", "test_browser", "test_hub"]
LONGEST += ["test_openai_api", "test_bad_input", "test_browser_chat", "test_engine", "test_files", "test_browser_voice"]


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
    for item in items:
        if SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def engine():
    """The real engine: SmolLM2, EfficientNet-Lite2, Whisper base and the shipped weights."""
    import mmchat

    return mmchat.load("smol")


@pytest.fixture(scope="session")
def smol_model():
    """The model of the preset `smol` in PyTorch, all of it, which the engine leaves on disk."""
    import torch

    from mmchat.checkpoints.weights_folder import default_weights, load_model
    from mmchat.presets import SMOL

    return load_model(SMOL, default_weights(SMOL), torch.float32)[0]


@pytest.fixture(scope="module")
def address(engine):
    """Address of the real page."""
    from mmchat.serving import page as ui

    engine.warm_up()
    demo = ui.build(engine, ROOT / "examples")
    ui.launch(demo, prevent_thread_lock=True, quiet=True)
    yield demo.local_url
    demo.close()


@pytest.fixture(scope="session")
def photo() -> Path:
    """A real photo: a woman in an orange space suit."""
    return ROOT / "examples" / "astronaut.jpg"


@pytest.fixture
def small_picture() -> Image.Image:
    """A decoded picture without a file."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Small models, pictures, their features and conversations; their presets are registered during the tests."""
    from mmchat.models.image_encoder import load_image_encoder
    from mmchat.presets import PRESETS
    from mmchat.training.data.features import embed_folder
    from tests import tiny

    folder = tmp_path_factory.mktemp("tiny")
    tiny.make(folder)
    tiny.make_data(folder)
    PRESETS.update(tiny.presets(folder))
    for name in ("patches", "pooled"):
        preset = PRESETS[f"phi3-{name}"].image_encoder
        embed_folder(folder / "pictures", folder / f"features-{name}", preset, load_image_encoder(preset))
    return folder


def page_address(app, log: Path) -> str:
    """Waits for the address of an app.py that runs in a subprocess."""
    for _ in range(1200):
        found = re.search(r"local URL:\s+(http://\S+)", log.read_text())
        if found:
            return found[1]
        assert app.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())
