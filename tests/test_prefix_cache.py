"""Prefix cache: a follow-up prefills only new tokens, and answers do not depend on the cache."""

from __future__ import annotations

import threading
from itertools import zip_longest

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmchat import Message, SamplingOptions
from mmchat.engine import LocalEngine
from mmchat.inference.llama_decoder import LlamaDecoder
from mmchat.inference.prefix_cache import common_length
from mmchat.presets import PRESETS
from mmchat.training.recipe import Recipe
from mmchat.training.run import train
from tests.close import INT8_RUN_TO_RUN, assert_same_choices, certain_answer, recorded_logits

OPTIONS = SamplingOptions(temperature=0, max_new_tokens=6)


@pytest.fixture(scope="module", params=["phi3-patches", "llama-patches"])
def pair(request, tiny, tmp_path_factory):
    """Two engines with the same weights, one with and one without a prefix cache; and pictures."""
    folder = tmp_path_factory.mktemp("prefix_cache")
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
    cached, uncached = (LocalEngine(PRESETS[request.param], folder) for _ in range(2))
    uncached.prefix_cache.budget_bytes = 0
    return cached, uncached, [tiny / "pictures" / f"{number}.png" for number in range(3)]


@pytest.fixture
def count_tokens(monkeypatch):
    """Records the number of tokens in each prefill of an engine."""
    lengths = []

    def watch(engine):
        original = engine.decoder.prefill

        def spy(embeddings, cache):
            lengths.append(embeddings.shape[1])
            return original(embeddings, cache)

        monkeypatch.setattr(engine.decoder, "prefill", spy)
        return lengths

    return watch


# What a visitor does next: ask with or without pictures, edit an earlier question, undo, or retry; the number of pieces
# of the answer that they wait for; and whether they type so long that the pictures are prefilled before.
steps = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "edit", "undo", "retry"]),
        st.sampled_from(["Is there a dog?", "Describe the image.", "No.", "A brown dog"]),
        st.lists(st.integers(0, 2), max_size=2),
        st.integers(1, 9),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_answers_are_the_same_with_and_without_the_cache(pair, steps):
    cached, uncached, pictures = pair
    turns: list[Message] = []
    for action, text, shown, patience, types in steps:
        if action == "undo":
            turns = turns[:-2]
            continue
        if action == "edit" and len(turns) > 2:
            turns = turns[:-4] if len(turns) > 3 else []
        if action == "retry" and turns:
            turns = turns[:-1]
        else:
            images = [pictures[number] for number in shown]
            if types:
                cached.prefill([*turns, Message("user", "", images)])
            turns = [*turns, Message("user", text, images)]
        said, chosen = [], []
        for engine in (cached, uncached):
            with recorded_logits() as logits:
                pieces = engine.reply(turns, OPTIONS)
                said.append([piece for _, piece in zip(range(patience), pieces, strict=False)])
                pieces.close()
            chosen.append(logits)
        # The cache is filled in other pieces, which are summed in another order.
        assert_same_choices(*chosen, INT8_RUN_TO_RUN if isinstance(cached.decoder, LlamaDecoder) else 1e-4)
        turns = [*turns, Message("assistant", "".join(said[0]))]


def test_a_follow_up_prefills_only_new_tokens(pair, count_tokens):
    cached, _, pictures = pair
    lengths = count_tokens(cached)
    question = Message("user", "What is in this picture? Yes. No. " * 3, pictures[:1])
    answer = "".join(cached.reply([question], OPTIONS))
    first = sum(lengths)
    lengths.clear()
    "".join(cached.reply([question, Message("assistant", answer), Message("user", "No?")], OPTIONS))
    assert sum(lengths) < first / 2


def test_a_picture_is_prefilled_once_also_before_the_question(engine, photo, count_tokens, monkeypatch):
    image = photo.with_name("coffee.jpg")
    engine.forget(pictures=True)
    expected = "".join(engine.reply([Message("user", "What is in the cup?", [image])], OPTIONS))
    engine.forget(pictures=True)
    lengths = count_tokens(engine)
    engine.prefill([Message("user", "", [image])])
    assert sum(lengths) > engine.model.tokens_per_image
    lengths.clear()
    monkeypatch.setattr(engine.image_encoder, "encode", lambda images: pytest.fail("it was encoded before"))
    assert "".join(engine.reply([Message("user", "What is in the cup?", [image])], OPTIONS)) == expected
    "".join(engine.reply([Message("user", "What is this?", [image])], OPTIONS))
    assert len(lengths) == 2 and max(lengths) < 20  # the questions alone
    lengths.clear()
    engine.prefill([Message("user", "No picture.")])
    engine.prefill([Message("user", "", [image])])  # is known
    assert not lengths


def test_conversations_that_begin_alike_keep_their_prefixes(pair, count_tokens):
    cached, _, pictures = pair
    long = [Message("user", "Describe the image. " * 8, pictures[1:2])]
    for text in ("Is there a dog? " * 8, "Yes.", "No."):
        long += [Message("assistant", "".join(cached.reply(long, OPTIONS))), Message("user", text)]
    "".join(cached.reply(long[:-1] + [Message("user", "A dog?")], OPTIONS))
    "".join(cached.reply([*long[:2], Message("user", "Is there a dog?")], OPTIONS))
    lengths = count_tokens(cached)
    "".join(cached.reply(long, OPTIONS))
    assert lengths[0] < 40  # the last answer and the last question


def test_the_cache_of_idle_conversations_is_bounded(pair):
    cached, _, pictures = pair
    budget = cached.prefix_cache.budget_bytes
    try:
        cached.prefix_cache.budget_bytes = 60_000
        for number in range(12):
            "".join(cached.reply([Message("user", f"{number} is a number?", pictures[:1])], OPTIONS))
        assert 1 <= len(cached.prefix_cache) < 12 and cached.prefix_cache.size <= 60_000
    finally:
        cached.prefix_cache.budget_bytes = budget


def test_concurrent_conversations_are_independent(pair):
    cached, uncached, pictures = pair
    options = SamplingOptions(temperature=0, max_new_tokens=12)
    talks = [
        [Message("user", "Describe the image.", pictures[:1])],
        [Message("user", "Is there a dog?")],
        [Message("user", "Describe the image.", pictures[1:2])],
    ]
    expected = [certain_answer(uncached, talk, options, INT8_RUN_TO_RUN)[0] for talk in talks]
    answers: dict[int, list[str]] = {number: [] for number in range(3)}

    def talk(number):
        for _ in range(5):
            answers[number].append("".join(cached.reply(talks[number], options)))

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(answer.startswith(expected[number]) for number in range(3) for answer in answers[number])


def test_a_repeated_question_prefills_nothing(pair, count_tokens):
    cached, _, pictures = pair
    question = Message("user", "Is there a dog? Again?", pictures[:1])
    lengths = count_tokens(cached)
    first = "".join(cached.reply([question], OPTIONS))
    assert lengths
    lengths.clear()
    replies = [cached.reply([question], OPTIONS) for _ in range(2)]  # two visitors at once share what is cached
    together = list(zip_longest(*replies, fillvalue=""))
    assert not lengths and ["".join(pieces) for pieces in zip(*together, strict=True)] == [first, first]


def test_conversations_share_the_system_text(engine, monkeypatch):
    lengths, original = [], engine.decoder.prefill
    monkeypatch.setattr(
        engine.decoder, "prefill", lambda rows, cache: (lengths.append(rows.shape[1]), original(rows, cache))[1]
    )
    engine.forget()
    questions = [[Message("user", text)] for text in ("Why is the sky blue?", "Name a color.")]
    for question in questions:
        "".join(engine.reply(question, OPTIONS))
    shared = common_length(*(engine.tokenize(question).token_ids for question in questions))
    assert shared >= 8 and lengths[0] == shared and len(lengths) == 3


def test_a_long_question_is_prefilled_in_slices_between_others_tokens(engine):
    story = engine.reply([Message("user", "Tell me a long story.")], SamplingOptions(temperature=0, max_new_tokens=60))
    next(story)
    engine.forget()
    long = engine.reply([Message("user", "Is this one? " * 120)], OPTIONS)
    turns: list[str] = []
    prefill = threading.Thread(target=lambda: turns.append(f"answer {len(turns)}") if next(long) else None)
    prefill.start()
    while prefill.is_alive() and next(story, None) is not None:
        turns.append("token")
    prefill.join()
    long.close(), story.close()
    assert turns.count("token") >= 2
