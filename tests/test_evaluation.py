"""Metrics and their intervals, checked on known answers; and lower scores without the picture."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmchat import SamplingOptions
from mmchat.checkpoints.weights_folder import load_model
from mmchat.errors import BadInput
from mmchat.inference.decoder import TorchDecoder
from mmchat.inference.generation import generate_batch, stream_text
from mmchat.models.chat_formats import CHAT_FORMATS
from mmchat.presets import get_preset
from mmchat.training.data.features import FeatureStore
from mmchat.training.data.llava_json import entry_of, write_conversations
from mmchat.training.data.packing import ConversationDataset
from mmchat.training.evaluation.evaluator import (
    BlankFeatures,
    Evaluator,
    ShuffledFeatures,
    condition_features,
    markdown,
    measure,
    read_items,
)
from mmchat.training.evaluation.metrics import (
    accuracy,
    always_the_same,
    answer_metrics,
    bootstrap,
    caption_metrics,
    count_metrics,
    detail_metrics,
    is_named,
    macro_f1,
    name_metrics,
    word_error_rate,
    yes_no_metrics,
)
from mmchat.training.evaluation.recordings import read_recordings
from mmchat.training.recipe import Recipe
from mmchat.training.run import train
from tests.conftest import SPEECH
from tests.in_process import run_script
from tests.test_speech import SAID

FORMAT = CHAT_FORMATS["smollm2"]


def test_right_captions_score_high_and_wrong_ones_low():
    references = [["A dog runs on the green grass.", "a brown dog"], ["Two men climb a steep rock wall.", "climbers"]]
    same = caption_metrics(["a dog runs on the green grass", "two men climb a steep rock wall"], references)
    other = caption_metrics(["two men climb a steep rock wall", "a dog runs on the green grass"], references)
    assert same["BLEU-4"].value == pytest.approx(1) and same["ROUGE-L"].value == pytest.approx(1)
    assert other["BLEU-4"].value < 0.01 and other["CIDEr"].value < 0.3 < same["CIDEr"].value


def test_corpus_bleu_equals_pycocoevalcap():
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


def test_exact_match_metrics():
    assert accuracy(["Brown", "red.", "A blue"], ["brown.", "Red", "blue"]).value == pytest.approx(2 / 3)
    counts = macro_f1(["two", "two", "two", "three"], ["two", "two", "three", "three"])
    assert counts.value == pytest.approx((0.8 + 2 / 3) / 2)
    yes = yes_no_metrics(["Yes, there is.", "No.", "yes", "no"], ["Yes.", "Yes.", "No.", "No."])
    assert yes["accuracy"].value == 0.5 and yes["F1 of yes"].value == 0.5
    assert set(answer_metrics(["a"], ["Red."])) == {"accuracy", "always the same answer", "macro F1"}
    assert always_the_same(["Two.", "two", "Three."]).value == pytest.approx(2 / 3)


def asked(folder, answers, **fields):
    """Writes and reads items with these right answers. A field is a list with a value per item, or one value."""
    entries = []
    for number, answer in enumerate(answers):
        extra = {name: value[number] if isinstance(value, list) else value for name, value in fields.items()}
        entries.append(entry_of(str(number), None, [("What is it?", answer)], **extra))
    write_conversations(folder / "asked.json", entries)
    return read_items(folder / "asked.json")


def test_yes_no_metrics_follow_pope(tmp_path):
    items = asked(
        tmp_path, ["Yes.", "No.", "Yes, there is a dog.", "No, there is no dog."], kind="presence adversarial"
    )
    said = ["Yes, there is a dog.", "Yes, there is a dog.", "No, there is no dog.", "Not that I see."]
    found = measure(items, said)["presence adversarial"]
    assert {name: figure.value for name, figure in found.items()} == {
        "accuracy": 0.25,
        "F1 of yes": 0.5,
        "share of yes": 0.5,
    }


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("3", "Three."), ("There are three dogs.", "3"), ("A dog.", "One."), ("one", "1"),
        ("A group of four men.", "4"), ("There are no dogs.", "Zero."),
        ("A couple of dogs.", "Two."), ("Maybe two or three.", "2"),
    ],
)  # fmt: skip
def test_numbers_match_as_words_and_digits(answer, number):
    assert count_metrics([answer], [number])["accuracy"].value == 1


def test_counts_are_scored_as_numbers(tmp_path):
    accepted = [["two", "2"], ["two", "2"], ["three", "3"], ["one", "1"]]  # adds nothing to the numbers
    items = asked(tmp_path, ["Two.", "2", "Three.", "One."], kind="how many", accepted=accepted)
    found = measure(items, ["two dogs", "There are two.", "two", "many"])["how many"]
    assert found["accuracy"].value == 0.5 and found["always the same answer"].value == 0.5
    assert found["macro F1"].value == pytest.approx(0.8 / 3)


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("Dog.", True), ("Two dogs.", True), ("A golden retriever on a couch.", True), ("Golden retrievers.", True),
        ("I'm not sure, but it looks like a dog.", True), ("A hotdog.", False), ("A cat. A dog.", False),
        ("This is not a dog.", False), ("A cat, a bird, a car, a house, a dog.", False), ("", False), ("Gold.", False),
    ],
)  # fmt: skip
def test_any_accepted_name_is_right(answer, is_right):
    assert is_named(answer, ["a dog", "golden retriever"]) == is_right


@pytest.mark.parametrize("pair", ["man men", "box boxes", "knife knives", "berry berries", "bus buses", "shoe shoes"])
def test_singular_and_plural_names_match(pair):
    one, many = pair.split()
    assert is_named(one, [many]) and is_named(many, [one])
    assert not is_named("cap", ["cape"])


def test_the_best_constant_name_is_the_baseline(tmp_path):
    accepted = [["husky", "dog"], ["pug", "dogs"], ["tabby", "cat"]]
    found = measure(
        asked(tmp_path, ["Husky.", "Pug.", "Cat."], kind="name", accepted=accepted), ["a dog", "cat", "cat"]
    )
    assert found["name"]["accuracy"].value == pytest.approx(2 / 3)
    assert found["name"]["always the same answer"].value == pytest.approx(2 / 3)
    assert name_metrics(["tabby cat"], [["tabby"]])["accuracy"].value == 1


@pytest.mark.parametrize("field", ["accepted", "references"])
@pytest.mark.parametrize("value", ["dog", ["dog", 1], {"dog": 1}])
def test_accepted_and_references_must_be_lists_of_texts(tmp_path, field, value):
    write_conversations(tmp_path / "q.json", [entry_of("1", None, [("What?", "Dog.")], **{field: value})])
    with pytest.raises(BadInput, match=f'q.json, line 2: "{field}" must be a list of texts'):
        read_items(tmp_path / "q.json")


def test_repetition_in_details_is_measured(tmp_path):
    captions = ["A brown dog runs on the green grass.", "A dog runs."]
    items = asked(tmp_path, ["A dog."] * 2, kind="detail", references=[captions, ["Two men climb.", "They smile."]])
    fresh = measure(items, ["A brown dog runs on the green grass. The sun shines.", "Two men climb. They smile."])
    again = measure(items, ["A brown dog runs. A brown dog runs. A brown dog runs!", "Two men climb."])
    assert fresh["detail"]["sentences"].value == 2 and fresh["detail"]["repeated 4-grams"].value == 0
    assert again["detail"]["repeated sentences"].value == pytest.approx((2 / 3 + 0) / 2)
    assert again["detail"]["repeated 4-grams"].value == pytest.approx((5 / 9 + 0) / 2)
    assert fresh["detail"]["ROUGE-L"].value > again["detail"]["ROUGE-L"].value > 0


def test_a_long_detail_is_not_penalized_for_its_length():
    caption = "a brown dog runs on the green grass"
    long = f"{caption}. there are many tall trees behind it and a blue sky above with some white clouds in it"
    references = [[caption] * 5, ["two men climb a wall"] * 5]
    said = [long, "two men climb a wall"]
    assert (
        detail_metrics(said, references)["CIDEr, any length"].value > caption_metrics(said, references)["CIDEr"].value
    )


def test_hedged_answers_are_reported_separately(tmp_path):
    items = asked(tmp_path, ["Red.", "Blue.", "Red.", "Green."], kind="color")
    flat = measure(items, ["red", "blue", "blue", "green"])["color"]
    assert set(flat) == {"accuracy", "always the same answer", "macro F1"}
    found = measure(items, ["red", "blue", "Perhaps blue.", "I'm not sure, maybe brown."])["color"]
    assert found["hedged"].value == 0.5 and found["accuracy, not hedged"].value == 1
    assert found["accuracy"].value == 0.5 and flat["accuracy"].value == 0.75
    assert found["accuracy, not hedged"].count == 2


def test_results_become_a_markdown_table():
    def result(weights, condition, count):
        figure = {"kind": "name", "metric": "a|b", "value": 0.5, "low": 0.25, "high": 0.75, "count": count}
        return {"weights": weights, "file": "q.json", "condition": condition, "metrics": [figure]}

    assert markdown([result("runs/a", "real", 4), result("runs/a", "blank", 3)]).splitlines() == [
        "| file | kind | metric | n | a, real | a, blank |",
        "| --- | --- | --- | --- | --- | --- |",
        r"| q.json | name | a\|b | 4 / 3 | 0.500 [0.250, 0.750] | 0.500 [0.250, 0.750] |",
    ]


def test_intervals_cover_the_true_value():
    """About 95 of 100 intervals for a coin with 0.6 heads contain 0.6."""
    random_numbers = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        coins = (random_numbers.random(200) < 0.6).astype(float)
        estimate = bootstrap(200, lambda sample, coins=coins: float(coins[sample].mean()))
        covered += estimate.low <= 0.6 <= estimate.high
    assert 88 <= covered <= 100
    assert bootstrap(50, lambda sample: 1.0).low == 1.0


def test_word_error_rate_uses_whispers_normalizer():
    heard = ["ask not what your country can do", "I'm here"]
    rate = word_error_rate(heard, ["Ask not, what your country CAN do!", "I am here"])
    assert rate.value == 0
    assert word_error_rate(["a dog runs"], ["a brown dog runs"]).value == pytest.approx(0.25)


def test_shuffling_replaces_every_picture_by_another():
    features = {f"{number}.png": number for number in range(7)}
    shuffled = ShuffledFeatures(features, list(features))
    assert sorted(shuffled[name] for name in features) == sorted(features.values())
    assert all(shuffled[name] != features[name] for name in features)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A tiny model, overfitted to twelve pictures."""
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


def test_answers_are_worse_without_the_picture(tiny, trained):
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
def test_batched_answers_equal_single_answers(tiny, trained, beams):
    model, tokenizer = load_model(get_preset("llama-patches"), trained, torch.float32)
    evaluator = Evaluator(model, tokenizer, FORMAT)
    items, store = read_items(tiny / "train.json")[:7], FeatureStore(tiny / "features-patches")
    options = SamplingOptions(temperature=0, repetition_penalty=1.0, max_new_tokens=20, beams=beams)
    with torch.inference_mode():
        prompts = [evaluator.embed(evaluator.tokenize(item, store), store) for item in items]
        together = generate_batch(model.language_model, tokenizer, prompts, options)
        for prompt, text in zip(prompts, together, strict=True):
            (alone,) = generate_batch(model.language_model, tokenizer, [prompt], options)
            assert alone == text
            streamed = "".join(stream_text(TorchDecoder(model.language_model), tokenizer, prompt[None], options))
            assert streamed.strip() == text


@pytest.mark.parametrize("beams", [1, 3])
def test_a_shared_prefill_gives_the_same_answers(tiny, trained, tmp_path, beams):
    """The file has several questions about a picture, one of them twice, and one without a picture."""
    model, tokenizer = load_model(get_preset("llama-patches"), trained, torch.float32)
    texts = ["Describe the image.", "Is there a dog?", "What is in this picture?", "Is there a dog?"]
    entries = [entry_of(f"{n}-{text}", f"{n}.png", [(text, "Yes.")]) for n in range(3) for text in texts]
    write_conversations(tmp_path / "q.json", [*entries, entry_of("none", None, [(texts[0], "Yes.")])])
    items, store = read_items(tmp_path / "q.json"), FeatureStore(tiny / "features-patches")
    options = SamplingOptions(temperature=0, repetition_penalty=1.0, max_new_tokens=20, beams=beams)
    for condition in ("real", "shuffled"):
        shown = condition_features(condition, store, items, lambda: None)
        done = []
        count = lambda batches, doing, done=done: done.extend(batches) or batches  # noqa: E731
        evaluator = Evaluator(model, tokenizer, FORMAT, batch_size=7, progress=count)
        together = evaluator.answers(items, shown, options)
        assert together == [evaluator.answers([item], shown, options)[0] for item in items]
        assert sum(map(len, done[:3])) == 10  # of 13 prompts, three are another's


def test_blank_pictures_count_as_one_picture(tiny, trained):
    from mmchat.models.image_encoder import load_image_encoder

    preset = get_preset("llama-patches")
    model, tokenizer = load_model(preset, trained, torch.float32)
    done = []
    evaluator = Evaluator(model, tokenizer, FORMAT, progress=lambda batches, _: done.extend(batches) or batches)
    items = [item for item in read_items(tiny / "train.json") if len(item.question) == 1]
    options = SamplingOptions(temperature=0, repetition_penalty=1.0, max_new_tokens=8)
    answers = evaluator.answers(items, BlankFeatures(load_image_encoder(preset.image_encoder)), options)
    assert len(items) == 12 and len(set(answers)) == 1 and [len(batch) for batch in done] == [1]


def test_details_have_a_higher_token_limit(tiny, trained):
    model, tokenizer = load_model(get_preset("llama-patches"), trained, torch.float32)
    evaluator, store = Evaluator(model, tokenizer, FORMAT), FeatureStore(tiny / "features-patches")
    items = [replace(item, kind=kind) for item in read_items(tiny / "train.json", 1) for kind in ("caption", "detail")]
    options = SamplingOptions(temperature=0, repetition_penalty=1.0, max_new_tokens=4)
    short, long = evaluator.answers(items, store, options, {"detail": 12})
    assert long.startswith(short) and len(long) > len(short)


def test_packing_does_not_change_the_perplexity(tiny, trained):
    model, tokenizer = load_model(get_preset("llama-patches"), trained, torch.float32)
    evaluator, store = Evaluator(model, tokenizer, FORMAT), FeatureStore(tiny / "features-patches")
    items = read_items(tiny / "train.json")
    conversations = [item.conversation for item in items]
    dataset = ConversationDataset(conversations, store, tokenizer, FORMAT, model.tokens_per_image)
    assert len(dataset) < len(items)
    together = evaluator.perplexity(items, store)
    assert together.count == len(items)
    losses = [np.log(evaluator.perplexity([item], store).value) for item in items]
    alone = [ConversationDataset([one], store, tokenizer, FORMAT, model.tokens_per_image) for one in conversations]
    counts = [sum(dataset.rows[0].is_answer) for dataset in alone]
    assert together.value == pytest.approx(np.exp(np.dot(losses, counts) / sum(counts)), rel=1e-4)


def test_the_last_answer_of_a_conversation_is_scored(tmp_path):
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
        (b"{}", "speech.json must be a list"),
        (b"[]", "speech.json must be a list"),
        (b"[3]", "speech.json, entry 1 is not"),
        (b'[{"audio": "a.wav"}]', "speech.json, entry 1 is not"),
        (b'[{"audio": "a.wav", "text": " "}]', "speech.json, entry 1 is not"),
        (b'[{"audio": "a.wav", "text": "Hi."}]', "speech.json, entry 1: there is no recording 'a.wav'."),
    ],
)
def test_bad_lists_of_recordings_are_errors(tmp_path, content, says):
    if content is not None:
        (tmp_path / "speech.json").write_bytes(content)
    with pytest.raises(BadInput, match=re.escape(says)):
        read_recordings(tmp_path / "speech.json")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "q.json cannot be read: No such file or directory."),
        ("[{", "q.json, line 1: this is not JSON"),
        ("{}", "q.json is not a list of conversations."),
        ('[{"question": "What?", "answer": "A dog."}]', 'q.json, line 1: an entry needs a list "conversations".'),
        ("[]", "q.json holds no questions."),
    ],
)
def test_questions_are_checked_before_anything_loads(tmp_path, content, says):
    if content is not None:
        (tmp_path / "q.json").write_text(content)
    (tmp_path / "speech.json").write_text(json.dumps([{"audio": str(SPEECH), "text": SAID}]))
    command = "evaluate.py --weights nowhere --questions q.json --images nowhere --speech speech.json --preset nothing"
    result = run_script(f"training_scripts/{command}", tmp_path)
    assert result.returncode == 1 and result.stderr.startswith(says), result.stderr


@pytest.mark.slow
def test_the_script_prints_and_writes_all_results(tiny, trained, tmp_path):
    (tmp_path / "speech.json").write_text(json.dumps([{"audio": str(SPEECH), "text": SAID}]))
    command = f"training_scripts/evaluate.py --preset llama-patches --weights {trained} {trained / 'checkpoint-150'}"
    command += f" --questions {tiny / 'eval.json'} --features {tiny / 'features-patches'}"
    result = run_script(f"{command} --speech speech.json --out results.json --table tables/one.md", tmp_path)
    assert result.returncode == 0, result.stderr
    shown = result.stdout
    assert "perplexity" in shown and "word error rate" in shown and "checkpoint-150" in shown and "shuffled" in shown
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["condition"] for result in results] == ["real"] + ["real", "shuffled", "blank"] * 2
    speech = results[0]["metrics"][0]
    assert speech["metric"] == "word error rate" and speech["value"] == 0
    written = (tmp_path / "tables" / "one.md").read_text()
    assert "| eval.json | all | perplexity | 6 |" in written and "checkpoint-150, blank |" in written


def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path):
    result = run_script(
        "training_scripts/evaluate.py --weights nowhere --questions q.json --images nowhere --out .", tmp_path
    )
    assert result.returncode == 1 and result.stderr.startswith(". cannot be written: Is a directory.")
