"""python -m mmchat doctor"""

from __future__ import annotations

from collections import namedtuple

import pytest

from mmchat.__main__ import main
from mmchat.errors import AssetError
from mmchat.serving import doctor


@pytest.fixture
def loaded(engine, monkeypatch):
    monkeypatch.setattr("mmchat.engine.load", lambda preset: engine)


def test_a_healthy_machine(loaded, capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "✗" not in shown and "✓ torch: " in shown and "✓ preset smol: everything is here" in shown
    assert "ships without weights" in shown.split("– preset phi-2")[1].splitlines()[0]
    *_, answer = shown.strip().splitlines()
    assert answer.startswith("✓ answer: ") and len(answer) > 15


def test_every_problem_comes_with_advice(monkeypatch, capsys, tmp_path):
    def fail(preset):
        raise AssetError("It is missing: run pip download.")

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("mmchat.engine.load", fail)
    monkeypatch.setattr(doctor, "REQUIRED", ("no-such-package",))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(10, 10, 5))
    monkeypatch.setenv("MMCHAT_CACHE", str(tmp_path / "not" / "there"))
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    for advice in (
        "→ pip install no-such-package",
        "→ Free 1.5 GB",
        "→ It is missing: run pip download.",
    ):
        assert advice in shown
    assert "language model, image encoder, speech not here yet" in shown
