"""What a part of mmchat imports, and what it does without."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT


def imported_by(*modules: str) -> set[str]:
    """Every module that Python loads for these, as ``-X importtime`` lists them."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {', '.join(modules)}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}


def test_plain_data_and_the_model_servers_client_need_no_torch():
    found = imported_by("mmchat", "mmchat.conversation", "mmchat.media", "mmchat.device", "mmchat.serving.remote")
    assert "mmchat.serving.remote" in found and "torch" not in found


@pytest.mark.slow
def test_the_page_needs_no_torch_before_the_models():
    found = imported_by("app", "mmchat.serving.page", "mmchat.serving.loading")
    assert "gradio" in found and "torch" not in found


@pytest.mark.slow
def test_chat_imports_no_importer_and_no_training():
    found = imported_by("mmchat.engine")
    assert "torch" in found
    assert not [name for name in found if name.startswith(("mmchat.checkpoints.importing", "mmchat.training"))]
