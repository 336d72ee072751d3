"""Import boundaries: which modules load without torch, importers or training."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT


def imported_by(*modules: str) -> set[str]:
    """Every module that importing these loads, from ``-X importtime``."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {', '.join(modules)}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {line.rsplit("|", 1)[1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}


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
    assert "torch" in found
    assert not [name for name in found if name.startswith(("mmchat.checkpoints.importing", "mmchat.training"))]
