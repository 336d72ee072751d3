"""The training scripts as commands, and their recipes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from mmchat.errors import BadInput
from mmchat.training.data.cleaning import clean_answer, clean_answers
from mmchat.training.data.llava_json import entry_of
from mmchat.training.recipe import Recipe, parse_recipe, read_recipe, write_recipe
from tests.conftest import ROOT
from tests.in_process import run_script

SCRIPTS = sorted((ROOT / "training_scripts").glob("*.py"))
RECIPES = sorted((ROOT / "training_scripts" / "recipes").rglob("*.yaml"))


def script(folder, command):
    """Runs a training script that must succeed."""
    result = run_script(f"training_scripts/{command}", folder)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_reads_like_documentation(path):
    shown = subprocess.run([sys.executable, str(path), "--help"], capture_output=True, text=True, check=True).stdout
    assert f"python training_scripts/{path.name}" in shown  # a command to copy comes first
    assert "PLACEHOLDER" not in shown and len(shown.splitlines()) > 15


def test_help_imports_nothing_heavy():
    """Heavy imports would take seconds."""
    check = "import sys; sys.argv=['x', '--help']; import runpy\ntry: runpy.run_path({path!r}, run_name='__main__')\n"
    check += "except SystemExit: pass\nheavy = {{'torch', 'transformers', 'numpy', 'gradio'}} & set(sys.modules)\n"
    check += "sys.exit(f'{{heavy}}' if heavy else 0)"
    for path in SCRIPTS:
        subprocess.run([sys.executable, "-c", check.format(path=str(path))], check=True, capture_output=True)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_have_only_known_settings(path):
    settings = read_recipe(path)
    Recipe(**settings)
    assert path.read_text().startswith("# ")


def test_flags_override_the_file_and_the_file_overrides_the_defaults(tmp_path):
    (tmp_path / "r.yaml").write_text("train: a.json\nfeatures: f\nlr: 1e-4\nepochs: 3\ncompile: true\n")
    recipe = parse_recipe("x", ["--recipe", str(tmp_path / "r.yaml"), "--epochs", "5", "--no-compile"], lr=9.0, rank=2)
    assert (recipe.train, recipe.lr, recipe.epochs, recipe.rank, recipe.compile) == (["a.json"], 1e-4, 5.0, 2, False)
    write_recipe(recipe, tmp_path / "again.yaml")
    assert dataclasses.asdict(Recipe(**read_recipe(tmp_path / "again.yaml"))) == dataclasses.asdict(recipe)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("trian: a.json", "has unknown settings: trian"),
        ("compile: 3", "compile must be true or false, not '3'"),
        ("rank: many", "rank: 'many' is not a valid int"),
        ("- a\n- b", "must be a YAML mapping"),
        ("a: [", "is not YAML"),
        (b"\xff\x00", "is not a text file"),
    ],
)
def test_bad_recipes_are_errors(tmp_path, content, says):
    (tmp_path / "r.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=says):
        read_recipe(tmp_path / "r.yaml")


def test_old_names_of_settings_are_read_with_a_warning(tmp_path, caplog):
    caplog.set_level("INFO")
    old = "train: a.json\nfeatures: f\naccumulate: 3\nkeep: 5\ndecay: linear\nquantization: int8\nmarker: true\n"
    (tmp_path / "old.yaml").write_text(
        old + "own_tokens: 0.5\nown_tokens_cycle: 7\nown_answers: 4\nhidden_width: 9\n" + "share_rows: false\n"
    )
    recipe = parse_recipe("x", ["--recipe", str(tmp_path / "old.yaml"), "--own-answers", "2", "--decay", "constant"])
    assert (recipe.gradient_accumulation_steps, recipe.save_total_limit, recipe.quantization) == (3, 5, "cpu-int8")
    assert (recipe.scheduled_sampling, recipe.scheduled_sampling_cycle, recipe.end_of_image_token) == (0.5, 7, True)
    assert (recipe.scst_samples, recipe.lr_scheduler_type, recipe.intermediate_size) == (2, "constant", 9)
    assert not recipe.pack_conversations
    assert "old.yaml: 'keep' is now called 'save_total_limit'" in caplog.text
    recipe = parse_recipe("x", ["--train", "a", "--features", "f", "--quantization", "int8", "--no-share-rows"])
    assert recipe.quantization == "cpu-int8" and not recipe.pack_conversations


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "nothing to train on"),
        (["--train", "a.json"], "either --features"),
        (["--train", "a.json", "--features", "f", "--images", "i"], "either --features"),
        (["--train", "a.json", "--features", "f", "--lr", "0", "--projector-lr", "0"], "Both learning rates are 0"),
        (["--train", "a.json", "--features", "f", "--own-tokens", "2"], "probability between 0 and 1"),
        (["--train", "a.json", "--features", "f", "--patience", "2"], "patience needs --eval"),
        (["--train", "a.json", "--features", "f", "--batch-size", "0"], "batch_size must be 1 or more"),
        (["--train", "a.json", "--features", "f", "--lr", "-1"], "A learning rate must be 0 or more"),
    ],
)
def test_bad_flags_are_errors(capsys, flags, says):
    with pytest.raises(SystemExit):
        parse_recipe("x", flags)
    assert says in capsys.readouterr().err


def test_answers_are_cleaned_without_a_network():
    assert clean_answer("The dog is brown, and it runs fast!") == "dog brown runs fast"
    assert clean_answer("No.") == "No"
    entry = clean_answers(entry_of("a", "a.jpg", [("Is it the dog?", "It is the dog.")]))
    assert [turn["value"] for turn in entry["conversations"]] == ["<image>\nIs it the dog?", "dog"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two photos with captions, prepared and embedded by the scripts with the real image encoder."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "photos").mkdir()
    for name in ("coffee.jpg", "astronaut.jpg"):
        (folder / "photos" / name).write_bytes((ROOT / "examples" / name).read_bytes())
    captions = [
        {"image": "coffee.jpg", "captions": ["A cup of coffee on a wooden table ."] * 2},
        {"image": "astronaut.jpg", "captions": ["A woman in an orange suit smiles ."] * 2},
    ]
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "splits.json").write_text(json.dumps({"train": ["coffee.jpg", "astronaut.jpg"]}))
    options = "captions --captions captions.json --splits splits.json --split train"
    script(folder, f"prepare_data.py {options} --out train.json")
    script(folder, f"prepare_data.py {options} --make descriptions --out describe.json")
    script(folder, "embed_images.py --images photos --out features")
    return folder


@pytest.mark.slow
def test_two_stages_of_training_teach_the_real_model_two_photos(prepared, engine):
    from mmchat import Message, SamplingOptions, load

    common = "--features features --batch-size 2 --warmup 1 --log-steps 5 --report-to none"
    script(prepared, f"pretrain_projector.py --train describe.json --out one --max-steps 8 {common}")
    second = "--start-from one --train train.json --out two --max-steps 8 --lr 2e-3 --save-steps 4"
    shown = script(prepared, f"finetune_qlora.py {second} {common}")
    assert "python app.py --weights two" in shown.stderr and "adapter: all 420 tensors" in shown.stderr
    greedy = SamplingOptions(temperature=0, max_new_tokens=16)
    for weights in ("two", "two/checkpoint-8"):
        taught = load("smol", prepared / weights)
        answers = {
            name: "".join(
                taught.reply([Message("user", "Describe the image.", images=[prepared / "photos" / name])], greedy)
            )
            for name in ("coffee.jpg", "astronaut.jpg")
        }
        assert "coffee" in answers["coffee.jpg"] and "orange" in answers["astronaut.jpg"], answers
    engine.forget()  # the prefix cache changes the order of sums
    text_only = [Message("user", "What is the capital of France?")]
    assert "".join(taught.reply(text_only, greedy)) == "".join(engine.reply(text_only, greedy))


def test_a_file_is_split_by_picture(prepared):
    script(prepared, "prepare_data.py split train.json --share 0.5 --out half.json --rest rest.json")
    half, rest = (
        {entry["image"] for entry in json.loads((prepared / name).read_text())} for name in ("half.json", "rest.json")
    )
    assert len(half) == len(rest) == 1 and half != rest


def test_mistakes_end_with_an_error_sentence(prepared):
    for command, says in (
        ("prepare_data.py captions --captions none.json --out x.json", "none.json cannot be read"),
        (
            "prepare_data.py captions --captions captions.json --splits splits.json --split test --out x.json",
            "has no split 'test'",
        ),
        ("embed_images.py --images none --out f", "no pictures in 'none'"),
        ("evaluate.py --questions describe.json --features photos", "holds no features"),
        ("finetune_qlora.py --train none.json --features features", "none.json cannot be read"),
        ("evaluate.py --speech none.json", "none.json cannot be read"),
    ):
        result = run_script(f"training_scripts/{command}", prepared)
        assert result.returncode != 0 and says in result.stderr + result.stdout, result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_benchmark_prints_and_writes_results(tmp_path):
    result = run_script("benchmarks/run.py --only encoder-runs --out figures.json", tmp_path)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "figures.json").read_text())
    assert row["ours"] == "encoded 1 time" and row["what"] in result.stdout
