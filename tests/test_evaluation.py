"""Figures: right where the answer is known, with intervals, and low where the picture is taken away."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from mmchat import SamplingOptions
from mmchat.decoder import TorchDecoder
from mmchat.errors import BadInput
from mmchat.generation import generate_texts, stream_text
from mmchat.model import load_model
from mmchat.presets import get_preset
from mmchat.prompt import CHAT_FORMATS
from mmchat.training.evaluation import Evaluator, ShuffledFeatures, condition_features, measure, read_items
from mmchat.training.features import FeatureStore
from mmchat.training.metrics import (
    accuracy,
    always_the_same,
    answer_metrics,
    bootstrap,
    caption_metrics,
    macro_f1,
    word_error_rate,
    yes_no_metrics,
)
from mmchat.training.recipe import Recipe
from mmchat.training.recordings import read_recordings
from mmchat.training.run import train
from tests.conftest import ROOT, SPEECH
from tests.test_speech import SAID

FORMAT = CHAT_FORMATS["smollm2"]


def test_captions_are_scored_as_coco_scores_them():
    references = [["A dog runs on the green grass.", "a brown dog"], ["Two men climb a steep rock wall.", "climbers"]]
    same = caption_metrics(["a dog runs on the green grass", "two men climb a steep rock wall"], references)
    other = caption_metrics(["two men climb a steep rock wall", "a dog runs on the green grass"], references)
    assert same["BLEU-4"].value == pytest.approx(1) and same["ROUGE-L"].value == pytest.approx(1)
    assert other["BLEU-4"].value < 0.01 and other["CIDEr"].value < 0.3 < same["CIDEr"].value


def test_corpus_bleu_is_pycocoevalcaps_own():
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    answers = ["a dog runs fast on the grass", "two men climb up a wall", "a man in a red shirt"]
    references = [
        ["a brown dog runs on the grass", "a dog runs fast"],
        ["two men climb a wall", "people climb up a wall"],
        ["a man wearing a red shirt stands", "the man in a red shirt smiles"],
    ]
    scorer = BleuScorer(n=4)
    for answer, texts in zip(answers, references, strict=True):
        scorer += (answer, texts)
    expected, _ = scorer.compute_score(option="closest", verbose=0)
    ours = caption_metrics(answers, references)
    for order in range(4):
        assert ours[f"BLEU-{order + 1}"].value == pytest.approx(expected[order], rel=1e-6)


def test_answers_are_compared_word_for_word():
    assert accuracy(["Brown", "red.", "A blue"], ["brown.", "Red", "blue"]).value == pytest.approx(2 / 3)
    counts = macro_f1(["two", "two", "two", "three"], ["two", "two", "three", "three"])
    assert counts.value == pytest.approx((0.8 + 2 / 3) / 2)
    yes = yes_no_metrics(["Yes, there is.", "No.", "yes", "no"], ["Yes.", "Yes.", "No.", "No."])
    assert yes["accuracy"].value == 0.5 and yes["F1 of yes"].value == 0.5
    assert set(answer_metrics(["a"], ["Red."])) == {"accuracy", "always the same answer", "macro F1"}
    assert always_the_same(["Two.", "two", "Three."]).value == pytest.approx(2 / 3)


def test_intervals_hold_what_they_should():
    """Of many samples of coins that fall heads with 0.6, about 95 in 100 intervals hold 0.6."""
    random_numbers = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        coins = (random_numbers.random(200) < 0.6).astype(float)
        estimate = bootstrap(200, lambda sample, coins=coins: float(coins[sample].mean()))
        held += estimate.low <= 0.6 <= estimate.high
    assert 88 <= held <= 100
    assert bootstrap(50, lambda sample: 1.0).low == 1.0


def test_word_error_rate_counts_words_after_whispers_normaliser():
    heard = ["ask not what your country can do", "I'm here"]
    rate = word_error_rate(heard, ["Ask not, what your country CAN do!", "I am here"])
    assert rate.value == 0
    assert word_error_rate(["a dog runs"], ["a brown dog runs"]).value == pytest.approx(0.25)


def test_every_picture_is_shuffled_to_another():
    features = {f"{number}.png": number for number in range(7)}
    shuffled = ShuffledFeatures(features, list(features))
    assert sorted(shuffled[name] for name in features) == sorted(features.values())
    assert all(shuffled[name] != features[name] for name in features)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A tiny model that has learnt its twelve pictures by heart."""
    out = tmp_path_factory.mktemp("trained") / "run"
    train(
        Recipe(
            train=[str(tiny / "train.json")],
            features=str(tiny / "features-patches"),
            preset="llama-patches",
            out=str(out),
            max_steps=150,
            batch_size=12,
            lr=5e-3,
            projector_lr=1e-2,
            report_to=["none"],
        )
    )
    return out


def test_without_its_picture_a_question_is_answered_worse(tiny, trained):
    preset = get_preset("llama-patches")
    model, tokenizer = load_model(preset, trained, torch.float32)
    evaluator = Evaluator(model, tokenizer, FORMAT, batch_size=5)
    items, store = read_items(tiny / "train.json"), FeatureStore(tiny / "features-patches")
    options = SamplingOptions(temperature=0, repetition_penalty=1.0, max_new_tokens=60)
    right, perplexity = {}, {}
    for condition in ("real", "shuffled"):
        shown = condition_features(condition, store, items, lambda: None)
        answers = evaluator.answers(items, shown, options)
        right[condition] = measure(items, answers)["answer"]["accuracy"].value
        perplexity[condition] = evaluator.perplexity(items, shown).value
    assert right["real"] > 0.9 > 0.7 > right["shuffled"], right
    assert perplexity["real"] < 1.2 < perplexity["shuffled"]


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_in_batches_are_those_of_each_alone(tiny, trained, beams):
    model, tokenizer = load_model(get_preset("llama-patches"), trained, torch.float32)
    evaluator = Evaluator(model, tokenizer, FORMAT)
    items, store = read_items(tiny / "train.json")[:7], FeatureStore(tiny / "features-patches")
    options = SamplingOptions(temperature=0, repetition_penalty=1.0, max_new_tokens=20, beams=beams)
    with torch.inference_mode():
        prompts = [evaluator._embed(evaluator._encode(item), store) for item in items]
        together = generate_texts(model.language_model, tokenizer, prompts, options)
        for prompt, text in zip(prompts, together, strict=True):
            (alone,) = generate_texts(model.language_model, tokenizer, [prompt], options)
            assert alone == text
            if beams == 1:
                streamed = "".join(stream_text(TorchDecoder(model.language_model), tokenizer, prompt[None], options))
                assert streamed.strip() == text


def test_the_last_answer_is_asked_for(tmp_path):
    turns = [{"from": "gpt", "value": "A"}, {"from": "human", "value": "B"}]
    (tmp_path / "q.json").write_text(json.dumps([{"conversations": turns}]))
    with pytest.raises(BadInput, match="line 1: the conversation must end with the right answer"):
        read_items(tmp_path / "q.json")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "speech.json cannot be read: No such file or directory."),
        (b"[{", "speech.json is not JSON."),
        (b"\xff\xfe", "speech.json is not JSON."),
        (b"{}", "speech.json has to be a list"),
        (b"[]", "speech.json has to be a list"),
        (b"[3]", "speech.json, entry 1 is not"),
        (b'[{"audio": "a.wav"}]', "speech.json, entry 1 is not"),
        (b'[{"audio": "a.wav", "text": " "}]', "speech.json, entry 1 is not"),
        (b'[{"audio": "a.wav", "text": "Hi."}]', "speech.json, entry 1: there is no recording 'a.wav'."),
    ],
)
def test_lists_of_recordings_that_cannot_be_used_get_a_sentence(tmp_path, content, says):
    if content is not None:
        (tmp_path / "speech.json").write_bytes(content)
    with pytest.raises(BadInput, match=re.escape(says)):
        read_recordings(tmp_path / "speech.json")


@pytest.mark.slow
def test_the_script_prints_and_writes_every_figure(tiny, trained, tmp_path):
    (tmp_path / "speech.json").write_text(json.dumps([{"audio": str(SPEECH), "text": SAID}]))
    shown = subprocess.run(
        [sys.executable, "-m", "tests.tiny", str(tiny), "training_scripts/evaluate.py", "--preset", "llama-patches"]
        + ["--weights", str(trained), str(trained / "checkpoint-150"), "--questions", str(tiny / "eval.json")]
        + ["--features", str(tiny / "features-patches"), "--speech", str(tmp_path / "speech.json")]
        + ["--out", str(tmp_path / "results.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "perplexity" in shown and "word error rate" in shown and "checkpoint-150" in shown and "shuffled" in shown
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["condition"] for result in results] == ["real"] + ["real", "shuffled", "blank"] * 2
    speech = results[0]["metrics"][0]
    assert speech["metric"] == "word error rate" and speech["value"] == 0
