"""A conversation that goes on reads only what is new, and says what it would say had it read everything."""

from __future__ import annotations

import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmchat import Message, SamplingOptions
from mmchat.engine import LocalEngine
from mmchat.presets import PRESETS
from mmchat.training.recipe import Recipe
from mmchat.training.run import train

OPTIONS = SamplingOptions(temperature=0, max_new_tokens=6)


@pytest.fixture(scope="module", params=["phi3-patches", "llama-patches"])
def pair(request, tiny, tmp_path_factory):
    """Two engines with the same weights, one of which forgets everything between turns; and pictures.

    PyTorch decodes Phi-3, ONNX Runtime decodes Llama.
    """
    folder = tmp_path_factory.mktemp("reuse")
    recipe = Recipe(
        train=[str(tiny / "train.json")],
        features=str(tiny / "features-patches"),
        preset=request.param,
        out=str(folder),
        max_steps=10,
        lr=1e-2,
        report_to=["none"],
    )
    train(recipe)
    keeping, forgetting = (LocalEngine(PRESETS[request.param], folder) for _ in range(2))
    forgetting.prefix_cache.budget_bytes = 0
    return keeping, forgetting, [tiny / "pictures" / f"{number}.png" for number in range(3)]


@pytest.fixture
def read(monkeypatch):
    """How many tokens each call of the decoder reads."""
    lengths = []

    def watch(engine):
        original = engine.decoder.prefill

        def spy(embeddings, cache):
            lengths.append(embeddings.shape[1])
            return original(embeddings, cache)

        monkeypatch.setattr(engine.decoder, "prefill", spy)
        return lengths

    return watch


# What somebody does next: ask (a text, with pictures or none), edit an earlier question, take back a turn, ask again;
# and how many pieces of the answer they wait for.
steps = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "edit", "undo", "retry"]),
        st.sampled_from(["Is there a dog?", "Describe the image.", "No.", "A brown dog"]),
        st.lists(st.integers(0, 2), max_size=2),
        st.integers(1, 9),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_the_same_words_with_and_without(pair, steps):
    keeping, forgetting, pictures = pair
    turns: list[Message] = []
    for action, text, shown, patience in steps:
        if action == "undo":
            turns = turns[:-2]
            continue
        if action == "edit" and len(turns) > 2:
            turns = turns[:-4] if len(turns) > 3 else []
        if action == "retry" and turns:
            turns = turns[:-1]
        else:
            turns = [*turns, Message("user", text, [pictures[number] for number in shown])]
        said = []
        for engine in (keeping, forgetting):
            pieces = engine.reply(turns, OPTIONS)
            said.append([piece for _, piece in zip(range(patience), pieces, strict=False)])
            pieces.close()
        assert said[0] == said[1]
        turns = [*turns, Message("assistant", "".join(said[0]))]


def test_a_follow_up_reads_only_what_is_new(pair, read):
    keeping, _, pictures = pair
    lengths = read(keeping)
    question = Message("user", "What is in this picture? Yes. No. " * 3, pictures[:1])
    answer = "".join(keeping.reply([question], OPTIONS))
    first = lengths[0]
    lengths.clear()
    "".join(keeping.reply([question, Message("assistant", answer), Message("user", "No?")], OPTIONS))
    assert lengths[0] < first / 2


def test_one_that_begins_alike_leaves_another_its_reading(pair, read):
    keeping, _, pictures = pair
    long = [Message("user", "Describe the image. " * 8, pictures[1:2])]
    for text in ("Is there a dog? " * 8, "Yes.", "No."):
        long += [Message("assistant", "".join(keeping.reply(long, OPTIONS))), Message("user", text)]
    "".join(keeping.reply(long[:-1] + [Message("user", "A dog?")], OPTIONS))
    "".join(keeping.reply([*long[:2], Message("user", "Is there a dog?")], OPTIONS))
    lengths = read(keeping)
    "".join(keeping.reply(long, OPTIONS))
    assert lengths[0] < 40  # the last answer and the last question


def test_what_idle_conversations_keep_is_bounded(pair):
    keeping, _, pictures = pair
    budget = keeping.prefix_cache.budget_bytes
    try:
        keeping.prefix_cache.budget_bytes = 150_000
        for number in range(12):
            "".join(keeping.reply([Message("user", f"{number} is a number?", pictures[:1])], OPTIONS))
        assert 1 <= len(keeping.prefix_cache) < 12 and keeping.prefix_cache.size <= 150_000
    finally:
        keeping.prefix_cache.budget_bytes = budget


def test_two_conversations_at_once_do_not_disturb_each_other(pair):
    keeping, forgetting, pictures = pair
    options = SamplingOptions(temperature=0, max_new_tokens=12)
    talks = [
        [Message("user", "Describe the image.", pictures[:1])],
        [Message("user", "Is there a dog?")],
        [Message("user", "Describe the image.", pictures[1:2])],
    ]
    expected = ["".join(forgetting.reply(talk, options)) for talk in talks]
    heard: dict[int, list[str]] = {number: [] for number in range(3)}

    def talk(number):
        for _ in range(5):
            heard[number].append("".join(keeping.reply(talks[number], options)))

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(heard[number] == [expected[number]] * 5 for number in range(3))
