"""Training tiny models of the real classes: what learns, what stays frozen, what a checkpoint holds."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Trainer

from mmchat.checkpoints.weights_folder import load_model, save_weights
from mmchat.errors import BadInput, WeightsError
from mmchat.presets import get_preset
from mmchat.training.averaging import average_weights
from mmchat.training.data.llava_json import entry_of, write_conversations
from mmchat.training.int8 import DECISION_FILE, Int8Linear, is_exact, use_faster_multiplication
from mmchat.training.recipe import Recipe, write_recipe
from mmchat.training.run import INTERRUPTED, build_model, train
from mmchat.training.trainer import (
    STAGING,
    EpochSampler,
    VisionLanguageTrainer,
    checkpoints,
    scheduled_sampling_probability,
)
from tests.close import assert_close, assert_learned_alike
from tests.conftest import ROOT

WEIGHTS = ("projector.safetensors", "adapter/adapter_model.safetensors")


def recipe(tiny: Path, out: Path, **settings) -> Recipe:
    """A recipe that runs in a second: 24 conversations about twelve pictures."""
    preset = settings.setdefault("preset", "phi3-patches")
    if "images" not in settings:
        settings.setdefault("features", str(tiny / f"features-{preset.split('-')[1]}"))
    defaults = {
        "train": [str(tiny / "train.json")],
        "out": str(out),
        "max_steps": 6,
        "batch_size": 4,
        "lr": 1e-2,
        "projector_lr": 1e-2,
        "warmup": 0,
        "rank": 4,
        "save_steps": 3,
        "log_steps": 1,
        "report_to": ["none"],
    }
    return Recipe(**(defaults | settings))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{key}": tensor
        for name in WEIGHTS
        if (folder / name).exists()
        for key, tensor in load_file(folder / name).items()
    }


def assert_same(first: Path, second: Path, up_to_rounding: bool = False) -> None:
    """Asserts that weights are bit-identical, or equal up to accumulated rounding."""
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys() and one
    for name, tensor in one.items():
        if up_to_rounding:
            assert_learned_alike(tensor, other[name])
        else:
            assert torch.equal(tensor, other[name]), name


def history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="") as source:
        return list(csv.DictReader(source))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["phi3-patches", "phi-patches", "llama-pooled"])
def test_loss_falls_and_only_trainable_weights_change(tiny, tmp_path, preset):
    settings = recipe(tiny, tmp_path, preset=preset, max_steps=30, save_steps=30)
    before, _ = build_model(settings, get_preset(preset))
    base = {name: tensor.clone() for name, tensor in before.state_dict().items() if "lora_" not in name}
    train(settings)
    lines = [line for line in history(tmp_path) if line["loss"]]
    assert float(lines[-1]["loss"]) < 0.5 * float(lines[0]["loss"])
    assert float(lines[-1]["projector_change"]) > 0.01 and float(lines[-1]["adapter_change"]) > 0.01
    for column in ("projector_gradient_norm", "adapter_gradient_norm", "answer_tokens_per_second"):
        assert all(float(line[column]) > 0 for line in lines)
    after, _ = load_model(get_preset(preset), tmp_path / "checkpoint-30", torch.float32)
    for name, tensor in after.state_dict().items():
        if name in base:
            assert torch.equal(tensor, base[name]) != name.startswith("projector."), name
    assert (tmp_path / "curve.png").stat().st_size > 1000


EXACT = pytest.mark.skipif(not is_exact(), reason="int8 sums are not exact on this processor, so int8 is not used")


@EXACT
def test_int8_layers_approximate_float32_forward_and_backward():
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(96, 64), torch.randn(3, 10, 96, requires_grad=True)
    x.data[0, 0] *= 100  # an outlier must not cost the other rows their precision
    quantized = Int8Linear(linear.requires_grad_(False))
    outputs, gradients = [], []
    for layer in (linear, quantized):
        outputs.append(layer(x))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(dim=-1).sqrt().sum(), x)[0])
    for exact, near in (outputs, gradients):
        error = (near - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert 0 < error.max() < 0.03


def layers() -> torch.nn.Module:
    """Two linear layers with smol's shapes."""
    return torch.nn.Sequential(torch.nn.Linear(576, 1536), torch.nn.Linear(1536, 576))


def decide_for_int8(folder: Path) -> None:
    """Makes a run use int8 even if float32 is faster here, as it is for tiny layers."""
    folder.mkdir(exist_ok=True)
    (folder / DECISION_FILE).write_text('{"multiplication": "int8"}')


def test_float32_is_used_where_int8_is_slow(tmp_path, caplog):
    caplog.set_level("INFO")
    decoder = layers()
    with torch.backends.mkldnn.flags(enabled=False):  # PyTorch's fallback loop, as on processors without an int8 kernel
        use_faster_multiplication(decoder, tmp_path / "run")
    assert {type(layer) for layer in decoder} == {torch.nn.Linear}
    assert re.search(r"float32, which is faster here \(int8: \d+ GFLOP/s, float32: \d+ GFLOP/s per core\)", caplog.text)


def test_the_faster_number_format_is_used(tmp_path):
    decoder = layers()
    use_faster_multiplication(decoder, tmp_path)
    gflops = json.loads((tmp_path / DECISION_FILE).read_text())["gflops"]
    expected = Int8Linear if is_exact() and gflops["int8"] > gflops["float32"] else torch.nn.Linear
    assert {type(layer) for layer in decoder} == {expected}


@pytest.mark.parametrize(
    ("multiplication", "kind"),
    [pytest.param("int8", Int8Linear, marks=EXACT), ("float32", torch.nn.Linear)],
)
def test_a_resumed_run_keeps_its_number_format(tmp_path, multiplication, kind):
    """It does so even where the other one is faster, as on another machine."""
    (tmp_path / DECISION_FILE).write_text(json.dumps({"multiplication": multiplication}))
    (tmp_path / "checkpoint-3").mkdir()
    for kernels in (True, False):
        decoder = layers()
        with torch.backends.mkldnn.flags(enabled=kernels):
            use_faster_multiplication(decoder, tmp_path)
        assert {type(layer) for layer in decoder} == {kind}


def test_checkpoints_without_a_stored_decision_resume_in_int8(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    decoder = layers()
    with torch.backends.mkldnn.flags(enabled=False):
        use_faster_multiplication(decoder, tmp_path)
    assert {type(layer) for layer in decoder} == {Int8Linear}


@pytest.mark.slow
def test_int8_is_not_used_where_its_sums_are_not_exact(tmp_path):
    """oneDNN's AVX2 kernels add pairs of products in 16 bits, where 2 × 127 × 255 overflows."""
    (tmp_path / DECISION_FILE).write_text('{"multiplication": "int8"}')
    program = f"""
import logging, sys, torch
from pathlib import Path
from mmchat.errors import BadInput
from mmchat.training.int8 import is_exact, use_faster_multiplication
logging.basicConfig(level=logging.INFO)
layer = torch.nn.Sequential(torch.nn.Linear(1024, 1024))
use_faster_multiplication(layer, Path({str(tmp_path / "new")!r}))
assert is_exact() or type(layer[0]) is torch.nn.Linear
try:
    use_faster_multiplication(layer, Path({str(tmp_path)!r}))
    assert is_exact()
except BadInput as error:
    assert not is_exact() and "--quantization none" in str(error)
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)


def test_a_damaged_decision_file_is_an_error(tmp_path):
    (tmp_path / DECISION_FILE).write_text("{}")
    with pytest.raises(BadInput, match='must contain {"multiplication": "int8"} or "float32"'):
        use_faster_multiplication(layers(), tmp_path)


QUANTIZED = ["4bit", pytest.param("int8", marks=EXACT)]


@pytest.mark.slow
@pytest.mark.parametrize("quantization", QUANTIZED)
def test_training_on_a_quantized_base_learns(tiny, tmp_path, quantization):
    decide_for_int8(tmp_path)
    settings = recipe(tiny, tmp_path, max_steps=30, quantization=quantization)
    model, _ = build_model(settings, get_preset("phi3-patches"))
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("base_layer")}
    assert kinds == {{"4bit": "Linear4bit", "int8": "Int8Linear"}[quantization]}
    train(settings)
    losses = [float(line["loss"]) for line in history(tmp_path) if line["loss"]]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_a_learning_rate_of_zero_freezes(tiny, tmp_path):
    train(recipe(tiny, tmp_path / "first"))
    start = str(tmp_path / "first" / "checkpoint-6")
    train(recipe(tiny, tmp_path / "adapter", start_from=start, projector_lr=0))
    train(recipe(tiny, tmp_path / "projector", start_from=start, lr=0))
    before = weights(Path(start))
    for trained, frozen in (("adapter", "projector"), ("projector", "adapter")):
        after = weights(tmp_path / trained / "checkpoint-6")
        moved = {name.split(".")[0].split("/")[0] for name in after if not torch.equal(after[name], before[name])}
        assert moved == {trained}, (trained, frozen)


@pytest.mark.slow
def test_stage_one_has_no_adapter_and_stage_two_starts_from_it(tiny, tmp_path):
    train(recipe(tiny, tmp_path / "one", lr=0, projector="resblock", end_of_image_token=True))
    assert not (tmp_path / "one" / "adapter").exists()
    model, _ = load_model(get_preset("phi3-patches"), tmp_path / "one", torch.float32)
    assert not model.has_adapter and model.tokens_per_image == 5  # four patches and the end-of-image token
    train(recipe(tiny, tmp_path / "two", start_from=str(tmp_path / "one")))
    model, _ = load_model(get_preset("phi3-patches"), tmp_path / "two", torch.float32)
    assert model.has_adapter and model.projector_config.kind == "resblock" and model.tokens_per_image == 5


def test_a_projector_without_gradients_is_an_error_at_the_first_step(tiny, tmp_path, monkeypatch):
    """PEFT freezes modules that it does not know, so this happens by accident."""
    settings = recipe(tiny, tmp_path)
    monkeypatch.setattr(
        "mmchat.models.vision_language_model.VisionLanguageModel.splice",
        lambda self, token_ids, features: self.language_model.get_input_embeddings()(token_ids.clamp(min=0)),
    )
    with pytest.raises(WeightsError, match="6 trainable parameters have no gradient"):
        train(settings)


@pytest.mark.slow
def test_conversations_without_pictures_train_too(tiny, tmp_path):
    entries = [entry_of(str(number), None, [("Hello?", f"Hello {number}.")]) for number in range(8)]
    write_conversations(tmp_path / "text.json", entries)
    train(recipe(tiny, tmp_path / "run", train=[str(tmp_path / "text.json")], batch_size=2))
    train(recipe(tiny, tmp_path / "mixed", train=[str(tmp_path / "text.json"), str(tiny / "train.json")], batch_size=2))
    last = history(tmp_path / "mixed")[-2]
    assert float(last["projector_change"]) > 0 and float(history(tmp_path / "run")[-2]["projector_change"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_features_and_pictures_train_to_the_same_weights(tiny, tmp_path, settings):
    train(recipe(tiny, tmp_path / "features"))
    train(recipe(tiny, tmp_path / "pictures", images=str(tiny / "pictures"), **settings))
    assert_same(tmp_path / "features" / "checkpoint-6", tmp_path / "pictures" / "checkpoint-6", up_to_rounding=True)


@pytest.mark.slow
def test_bf16_and_scheduled_sampling_learn(tiny, tmp_path):
    train(recipe(tiny, tmp_path / "forced", max_steps=20))
    train(recipe(tiny, tmp_path / "free", max_steps=20, scheduled_sampling=0.5, scheduled_sampling_cycle=10))
    train(recipe(tiny, tmp_path / "bf16", max_steps=20, precision="bf16"))
    forced, free, bf16 = (history(tmp_path / name) for name in ("forced", "free", "bf16"))
    assert float(free[4]["scheduled_sampling"]) == pytest.approx(0.5)  # in the middle of a cycle
    assert float(forced[0]["loss"]) == pytest.approx(float(free[0]["loss"]), rel=1e-5)
    assert float(forced[-2]["loss"]) != pytest.approx(float(free[-2]["loss"]), rel=1e-3)
    for lines in (free, bf16):
        losses = [float(line["loss"]) for line in lines if line["loss"]]
        assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_layers_train_alike_and_are_not_compiled_for_each_length(tiny, tmp_path):
    for name in ("plain", "compiled"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        train(recipe(tiny, tmp_path / name, compile=name == "compiled", max_steps=12))
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    plain, compiled = ([float(row["loss"]) for row in history(tmp_path / name)] for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-3)


@pytest.mark.slow
def test_label_smoothing_is_for_training_only(tiny, tmp_path):
    settings = {"max_steps": 1, "lr": 1e-9, "projector_lr": 1e-9, "eval": [str(tiny / "train.json")], "eval_steps": 1}
    losses = []
    for smoothing in (0.0, 0.5):
        train(recipe(tiny, tmp_path / f"{smoothing}", label_smoothing=smoothing, samples=0, **settings))
        lines = history(tmp_path / f"{smoothing}")
        losses.append([float(next(line[name] for line in lines if line[name])) for name in ("loss", "eval_loss")])
    assert losses[1][0] != pytest.approx(losses[0][0], rel=1e-3)
    assert losses[1][1] == pytest.approx(losses[0][1], rel=1e-5)


def test_the_sampler_draws_every_sequence_once_per_epoch_next_to_similar_lengths():
    lengths = [10 + (number * 37) % 90 for number in range(203)]
    sampler = EpochSampler(4, lengths, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert sorted(orders[0]) == list(range(203)) and orders[0] == orders[2] != orders[1]
    steps = [[lengths[index] for index in orders[0][start : start + 4]] for start in range(0, 200, 4)]
    assert sum(max(step) - min(step) for step in steps) / len(steps) < 4  # lengths span 90
    means = [sum(step) for step in steps]
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_the_probability_of_scheduled_sampling_cycles(tiny, tmp_path):
    settings = recipe(tiny, tmp_path, scheduled_sampling=0.4, scheduled_sampling_cycle=100)
    assert [round(scheduled_sampling_probability(step, settings), 3) for step in (0, 25, 50, 75, 100)] == [
        0,
        0.2,
        0.4,
        0.2,
        0,
    ]


@pytest.mark.slow
def test_old_checkpoints_are_pruned_and_the_best_is_kept(tiny, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.6, 2.7])
    original = VisionLanguageTrainer.evaluation_loop

    def evaluation_loop(self, *arguments, **options):
        output = original(self, *arguments, **options)
        output.metrics["eval_loss"] = next(losses)
        return output

    monkeypatch.setattr(VisionLanguageTrainer, "evaluation_loop", evaluation_loop)
    evaluates = {
        "eval": [str(tiny / "eval.json")],
        "eval_steps": 2,
        "save_steps": 2,
        "save_total_limit": 1,
        "samples": 2,
    }
    train(recipe(tiny, tmp_path, max_steps=40, patience=3, **evaluates))
    # Step 4 has the lowest loss, 1.0; steps 6, 8 and 10 are no better, so patience 3 ends the run.
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-10"]
    final, best = weights(tmp_path), weights(tmp_path / "checkpoint-4")
    assert all(torch.equal(final[name], best[name].half()) for name in best)
    assert (tmp_path / "samples.png").exists() and "Describe" in (tmp_path / "samples.json").read_text()


@pytest.mark.slow
def test_a_checkpoint_that_differs_from_memory_is_discarded(tiny, tmp_path, monkeypatch):
    def save_half(model, folder, preset):
        save_weights(model, folder, preset, torch.float16)

    monkeypatch.setattr("mmchat.training.trainer.save_weights", save_half)
    with pytest.raises(WeightsError, match="differs from memory after writing"):
        train(recipe(tiny, tmp_path))
    assert checkpoints(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["mmchat.checkpoints.weights_folder.save_file", "torch.save"])
def test_a_full_disk_keeps_the_last_checkpoint(tiny, tmp_path, monkeypatch, writer):
    module, name = writer.rsplit(".", 1)
    original, has_space = getattr(sys.modules[module], name), [True]

    def write(*arguments, **options):
        if not has_space[0]:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        original(*arguments, **options)

    monkeypatch.setattr(writer, write)
    train(recipe(tiny, tmp_path, max_steps=3, lr_scheduler_type="constant"))
    has_space[0] = False
    with pytest.raises(WeightsError, match="free some space and resume from checkpoint-3 with --resume"):
        train(recipe(tiny, tmp_path, max_steps=6, lr_scheduler_type="constant", resume=True))
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-3"] and not (tmp_path / STAGING).exists()
    has_space[0] = True
    train(recipe(tiny, tmp_path, max_steps=6, lr_scheduler_type="constant", resume=True))
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-6"]


PAGES = """
import resource, numpy as np
from mmchat.device import keep_freed_memory

def pages(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        np.ones(4_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

new = pages(4)
keep_freed_memory()
pages(1)
print(new, pages(4))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc only")
def test_freed_memory_is_used_again():
    said = subprocess.run([sys.executable, "-c", PAGES], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    new, kept = map(int, said.split())
    assert kept < new / 10


@pytest.mark.slow
def test_a_run_killed_up_to_ten_times_ends_with_the_same_weights(tiny, tmp_path):
    settings = {"max_steps": 110, "save_steps": 5, "dropout": 0.1, "scheduled_sampling": 0.3}
    write_recipe(recipe(tiny, tmp_path / "cut", **settings), tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "tests.killed", str(tiny), str(tmp_path / "recipe.yaml"), "10"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    kills, ended = killed.splitlines()[-1].split(" ", 1)
    assert ended == "kills; the last run ended with 0"
    assert int(kills) >= 4  # a fast machine may finish before the tenth
    train(recipe(tiny, tmp_path / "whole", **settings))
    assert_same(tmp_path / "whole" / "checkpoint-110", tmp_path / "cut" / "checkpoint-110")


@pytest.mark.slow
def test_a_folder_with_checkpoints_is_not_overwritten(tiny, tmp_path):
    train(recipe(tiny, tmp_path))
    with pytest.raises(BadInput, match="--resume"):
        train(recipe(tiny, tmp_path))


def test_features_of_another_encoder_are_refused(tiny, tmp_path):
    with pytest.raises(BadInput, match=r"features.* 'pooled 1x20.*has 'patches 4x24"):
        train(recipe(tiny, tmp_path, features=str(tiny / "features-pooled")))


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", *QUANTIZED])
def test_a_run_that_was_cut_off_resumes_to_bit_identical_weights(tiny, tmp_path, monkeypatch, quantization):
    settings = {
        "quantization": quantization,
        "max_steps": 24,
        "save_steps": 8,
        "dropout": 0.1,
        "scheduled_sampling": 0.3,
    }
    for name in ("whole", "cut"):
        decide_for_int8(tmp_path / name)
    train(recipe(tiny, tmp_path / "whole", **settings))
    with monkeypatch.context() as patched:
        patched.setattr(VisionLanguageTrainer, "compute_loss", cut_off_at(13, VisionLanguageTrainer.compute_loss))
        with pytest.raises(CutOff):
            train(recipe(tiny, tmp_path / "cut", **settings))
    assert [folder.name for folder in checkpoints(tmp_path / "cut")] == ["checkpoint-8"]
    train(recipe(tiny, tmp_path / "cut", resume=True, **settings))
    one, other = tmp_path / "whole" / "checkpoint-24", tmp_path / "cut" / "checkpoint-24"
    assert_same(one, other)
    moments = [torch.load(folder / "optimizer.pt", weights_only=True)["state"] for folder in (one, other)]
    torch.testing.assert_close(*moments, atol=0, rtol=0)
    assert (one / "scheduler.pt").read_bytes() == (other / "scheduler.pt").read_bytes()
    losses = [[line["loss"] for line in history(tmp_path / name)] for name in ("whole", "cut")]
    assert losses[0] == losses[1]


class CutOff(BaseException):
    """Ends a run as nothing that it catches does. test_a_run_killed_up_to_ten_times kills whole processes."""


def cut_off_at(step: int, compute_loss):
    def compute(trainer, *arguments, **options):
        if trainer.state.global_step == step:
            raise CutOff
        return compute_loss(trainer, *arguments, **options)

    return compute


def start(*command: str) -> subprocess.Popen:
    """Starts ``python -m …`` in its own process."""
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_and_the_curve(tiny, tmp_path):
    settings = recipe(tiny, tmp_path / "run", max_steps=5000, save_steps=5, save_total_limit=1)
    write_recipe(settings, tmp_path / "run.yaml")
    script = ("training_scripts/finetune_qlora.py", "--recipe", str(tmp_path / "run.yaml"))
    process = start("tests.tiny", str(tiny), *script)
    deadline = time.monotonic() + 120
    while not checkpoints(tmp_path / "run"):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED and "Stopping after this step" in said, said
    (saved,) = checkpoints(tmp_path / "run")
    last = history(tmp_path / "run")[-1]["step"]
    assert saved.name == f"checkpoint-{last}" and int(last) < 5000 and (tmp_path / "run" / "curve.png").exists()


TWICE = {"batch_size": 3, "gradient_accumulation_steps": 2}  # what two processes do without accumulation
EVALUATED = {"eval_steps": 3, "samples": 1}


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory) -> tuple[Path, str]:
    """The folder of two runs by two processes each, "plain" and "sharded", and what they print."""
    folder = tmp_path_factory.mktemp("pair")
    evaluated = {"eval": [str(tiny / "train.json")], **EVALUATED}
    write_recipe(recipe(tiny, folder / "plain", batch_size=3), folder / "plain.yaml")
    write_recipe(recipe(tiny, folder / "sharded", batch_size=3, shard=True, **evaluated), folder / "sharded.yaml")
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    recipes = [str(folder / name) for name in ("plain.yaml", "sharded.yaml")]
    process = start(*launcher, "-m", "tests.pair", str(tiny), *recipes)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return folder, said


def test_two_processes_equal_one_with_twice_the_accumulation(tiny, pair, tmp_path):
    train(recipe(tiny, tmp_path, **TWICE))
    assert_same(pair[0] / "plain" / "checkpoint-6", tmp_path / "checkpoint-6", up_to_rounding=True)


def test_a_sharded_model_learns_the_same_weights(tiny, pair, tmp_path):
    folder, said = pair
    counts = re.search(r"holds (\S+) of (\S+) frozen parameters in layers", said).groups()
    local, total = (int(count.replace(",", "")) for count in counts)
    assert local == pytest.approx(total / 2, rel=0.05)
    train(recipe(tiny, tmp_path, eval=[str(tiny / "train.json")], **EVALUATED, **TWICE))
    assert_same(folder / "sharded" / "checkpoint-6", tmp_path / "checkpoint-6", up_to_rounding=True)
    described = [json.loads((run / "samples.json").read_text()) for run in (folder / "sharded", tmp_path)]
    answers = [[sample.pop("answer") for sample in samples] for samples in described]
    assert described[0] == described[1] and all(map(all, answers))  # rounding may change a word


def test_sharding_needs_several_processes(tiny, tmp_path):
    with pytest.raises(BadInput, match="accelerate launch"):
        train(recipe(tiny, tmp_path, shard=True))


@pytest.mark.slow
def test_the_overridden_private_hooks_are_listed():
    """A new minor version of transformers may change them."""
    ours = {name for name in vars(VisionLanguageTrainer) if name.startswith("_") and not name.startswith("__")}
    hooks = {name for name in ours if hasattr(Trainer, name)}
    assert hooks and all(re.search(rf"\b{name}\b", VisionLanguageTrainer.__doc__) for name in hooks)


@pytest.mark.slow
def test_averaged_weights_lie_between_two_runs(tiny, tmp_path):
    train(recipe(tiny, tmp_path / "one"))
    first = tmp_path / "one" / "checkpoint-6"
    train(recipe(tiny, tmp_path / "two", start_from=str(first)))
    second = tmp_path / "two" / "checkpoint-6"
    command = [sys.executable, "training_scripts/average_weights.py", first, second, "--share", "0.25"]
    subprocess.run([*command, "--out", tmp_path / "between"], cwd=ROOT, check=True)
    one, other, between = weights(first), weights(second), weights(tmp_path / "between")
    for name, tensor in between.items():
        assert_close(tensor, 0.75 * one[name] + 0.25 * other[name])
    load_model(get_preset("phi3-patches"), tmp_path / "between", torch.float32)
    train(recipe(tiny, tmp_path / "narrow", rank=2))
    with pytest.raises(WeightsError, match="names or shapes of the tensors differ"):
        average_weights(first, tmp_path / "narrow" / "checkpoint-6", 0.5, tmp_path / "x")
    with pytest.raises(WeightsError, match="no projector"):
        average_weights(first, tiny, 0.5, tmp_path / "x")
    for name, content in (("damaged", b"{"), ("missing", None)):
        shutil.copytree(first, tmp_path / name)
        (tmp_path / name / "projector.safetensors").unlink()
        if content:
            (tmp_path / name / "projector.safetensors").write_bytes(content)
        with pytest.raises(WeightsError, match=f"projector.safetensors in '{name}' is missing or damaged"):
            average_weights(tmp_path / name, second, 0.5, tmp_path / "x")
    with pytest.raises(BadInput, match="between 0 and 1"):
        average_weights(first, second, 2, tmp_path / "x")
    with pytest.raises(BadInput, match="one is not empty"):  # the run itself, say
        average_weights(first, second, 0.5, tmp_path / "one")
