"""Import boundaries: which modules load without torch or importers, and which subpackages import which."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmchat.inference.llama_cpp import load_library
from tests.conftest import ROOT

# Package → modules that come with it under another name, or by its own requirements.
BROUGHT_BY = {
    "faster_whisper": "av ctranslate2",
    "gradio": "anyio brotli fastapi httpx numpy pydantic requests starlette uvicorn",
    "hibari_tts": "hibari",
    "markdown_it_py": "markdown_it",
    "openai_whisper": "whisper",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "transformers": "huggingface_hub jinja2 tokenizers",
}
LAYERS = [{"fetching"}, {"models"}, {"inference", "checkpoints"}, {"serving", "training"}]  # each uses those before it


def imported_by(*modules: str) -> set[str]:
    """Every module that importing these loads, from ``-X importtime``."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {', '.join(modules)}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}


def imports_in(path: Path) -> Iterator[str]:
    """The absolute names of the modules that a file imports anywhere, also inside functions."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join(filter(None, (*base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_nothing_outside_training_imports_training():
    files = [path for path in (ROOT / "mmchat").rglob("*.py") if "training" not in path.parts]
    imports = {path: set(imports_in(path)) for path in files}
    assert any("mmchat.errors.BadInput" in names for names in imports.values())
    assert not [path for path, names in imports.items() if any(name.startswith("mmchat.training") for name in names)]


def test_no_code_that_comes_with_a_model_is_trusted():
    sources = [*(ROOT / "mmchat").rglob("*.py"), *(ROOT / "training_scripts").rglob("*.*")]
    assert len(sources) > 100
    assert not [path for path in sources if b"trust_remote_code" in path.read_bytes()]


def test_subpackages_import_only_those_of_the_layers_before():
    layer_of = {f"mmchat.{name}": index for index, names in enumerate(LAYERS) for name in names}
    for package, layer in layer_of.items():
        for path in (ROOT / package.replace(".", "/")).rglob("*.py"):
            imported = {".".join(name.split(".")[:2]) for name in imports_in(path)} - {package}
            assert all(layer_of.get(name, -1) < layer for name in imported), path


def test_every_package_that_the_app_imports_is_installed_with_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    for extra in ("gpu", "server", "operate", "whisper", "openvino", "train"):
        lines += project["optional-dependencies"][extra]
    required = {re.match(r"[\w-]+", line)[0].lower().replace("-", "_") for line in lines}
    known = {name for package, names in BROUGHT_BY.items() if package in required for name in names.split()}
    for path in [ROOT / "app.py", *(ROOT / "mmchat").rglob("*.py")]:
        names = {name.partition(".")[0] for name in imports_in(path)} - sys.stdlib_module_names - {"mmchat"}
        assert not names - known - required, path.name


def test_conversation_and_model_server_client_import_no_torch():
    found = imported_by("mmchat", "mmchat.conversation", "mmchat.media", "mmchat.device", "mmchat.serving.remote")
    assert "mmchat.serving.remote" in found and "torch" not in found


@pytest.mark.slow
def test_the_page_starts_without_torch():
    found = imported_by("app", "mmchat.serving.page", "mmchat.serving.loading")
    assert "gradio" in found and "torch" not in found


@pytest.mark.slow
def test_chat_imports_no_importer_and_no_training():
    found = imported_by("mmchat.engine")
    assert "torch" in found and "mmchat.checkpoints.weights_folder" in found
    names = ("importing", "known_checkpoints", "published_", "gguf_", "llava_export")
    forbidden = ("mmchat.training", *(f"mmchat.checkpoints.{name}" for name in names))
    assert not [name for name in found if name.startswith(forbidden)]


@pytest.mark.slow
def test_answering_with_llama_cpp_imports_no_peft_and_no_whisper(engine):  # which has converted the model
    try:
        load_library()
    except OSError as error:
        pytest.skip(str(error))
    script = """
import sys, mmchat
engine = mmchat.load("smol")
engine.warm_up()
for beams in 1, 2:
    next(engine.rewrite("?", "A dog.", mmchat.SamplingOptions(beams=beams, max_new_tokens=4)))
    print(*sys.modules)
"""
    env = {name: value for name, value in os.environ.items() if name != "MMCHAT_DECODER"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    answering, searching = (set(line.split()) for line in result.stdout.splitlines())
    assert not {"peft", "bitsandbytes", "ctranslate2", "torch._dynamo", "transformers.modeling_utils"} & answering
    assert not {"peft", "transformers.models.llama.modeling_llama"} & searching


def test_public_names_mean_the_same_as_inside_the_package():
    import mmchat.conversation
    import mmchat.engine

    assert all(hasattr(mmchat, name) for name in mmchat.__all__)
    assert mmchat.Engine is mmchat.conversation.Engine
    assert mmchat.LocalEngine is mmchat.engine.LocalEngine
