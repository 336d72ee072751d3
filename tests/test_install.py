"""mmchat installed from its wheel, away from the checkout."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from mmchat import Message, SamplingOptions
from mmchat.bundle import bundled
from tests.conftest import ROOT


def test_a_checkout_uses_its_own_files():
    assert bundled("weights/smol") == ROOT / "weights" / "smol" and bundled("README.md") == ROOT / "README.md"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The bin folder of an environment with mmchat's wheel and its dependencies only."""
    folder = tmp_path_factory.mktemp("installed")
    checkout = folder / "checkout"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    build = "import sys, setuptools.build_meta as build; build.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=checkout, check=True, capture_output=True)
    shutil.rmtree(checkout)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    venv.create(environment)
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python"]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    # A path file, and not PYTHONPATH: what is installed in the environment itself comes first.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return environment / "bin"


@pytest.mark.slow
def test_the_wheel_chats_offline_from_any_folder(installed, engine, tmp_path, photo):
    def run(*command):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        options = {"cwd": tmp_path, "env": environment | {"HF_HUB_OFFLINE": "1"}, "check": True}
        return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options).stdout

    where = run(installed / "python", "-c", "import mmchat; print(mmchat.__file__)")
    assert where.startswith(str(installed.parent))
    greedy = ["--preset", "smol", "--temperature", "0", "--max-new-tokens", "12"]
    engine.forget()  # as in a new process
    asked = [Message("user", "Is there a woman?", [photo])]
    here = "".join(engine.reply(asked, SamplingOptions(temperature=0, max_new_tokens=12)))
    assert run(installed / "mmchat", "ask", "Is there a woman?", "--image", photo, *greedy) == f"{here}\n"
    run(installed / "mmchat", "space", "--out", tmp_path / "space")
    space = {str(path.relative_to(tmp_path / "space")) for path in (tmp_path / "space").rglob("*")}
    assert {"app.py", "README.md", "mmchat/engine.py", "weights/smol/mmchat.json", "examples/examples.csv"} <= space
    assert "mmchat/bundled" not in space
