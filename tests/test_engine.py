"""A conversation, end to end, with the real models."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch

from mmchat import BadInput, Message, SamplingOptions
from mmchat.errors import MmchatError
from mmchat.inference.decoder import TorchDecoder
from mmchat.inference.prefix_cache import CachedPrefix, PrefixCache
from mmchat.models.prompt import IMAGE_TOKEN_ID
from tests.close import assert_close

GREEDY = SamplingOptions(temperature=0, max_new_tokens=16)


def answer(engine, *messages, options=GREEDY, **more):
    return "".join(engine.reply(messages, options, **more))


@pytest.fixture
def read_by_model(engine, monkeypatch):
    """What reaches the language model: (token ids, embeddings) of each reply, which reads all anew, in one piece."""
    seen, splice = [], engine.model.splice

    def anew(tokens, ends, with_adapter):
        return CachedPrefix(with_adapter, engine.decoder.new_cache(with_adapter))

    monkeypatch.setattr(engine.prefix_cache, "take", anew)
    monkeypatch.setattr("mmchat.engine._ends", lambda encoded: [len(encoded.token_ids)])

    def spy(token_ids, image_features):
        embeddings = splice(token_ids, image_features)
        seen.append((token_ids[0].tolist(), embeddings))
        return embeddings

    monkeypatch.setattr(engine.model, "splice", spy)
    return seen


def test_text_alone_is_answered_by_the_base_model(engine):
    import transformers

    from mmchat.fetching.cache import convert_once
    from mmchat.presets import SMOL

    folder = convert_once(f"{SMOL.language_model.name}-1", lambda _: pytest.fail("it is in the cache by now"))
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = engine.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    expected = base.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    options = SamplingOptions(temperature=0, max_new_tokens=16, repetition_penalty=1)
    ours = answer(engine, Message("user", "What is the capital of France?"), options=options)
    assert ours == engine.tokenizer.decode(expected, skip_special_tokens=True)
    assert "Paris" in ours


def test_answers_about_pictures_may_repeat_words(engine, photo):
    """A penalty on repeated words helps the base model along and spoils descriptions."""
    for message, penalty in (
        (Message("user", "Write a list of colors."), 1.1),
        (Message("user", "Describe the image.", images=[photo]), 1.0),
    ):
        options = SamplingOptions(temperature=0, max_new_tokens=16, repetition_penalty=penalty)
        assert answer(engine, message) == answer(engine, message, options=options)


def test_adapter_and_projector_are_on_once_there_is_a_picture(engine, photo, monkeypatch):
    """With the adapter off, the same question about the same picture is answered in other words."""
    question = Message("user", "Describe the image.", images=[photo])
    with_adapter = answer(engine, question)
    new_cache = engine.decoder.new_cache
    with monkeypatch.context() as patched:
        patched.setattr(engine.decoder, "new_cache", lambda with_adapter: new_cache(False))
        engine.forget()
        assert answer(engine, question) != with_adapter
    engine.forget()
    assert answer(engine, question) == with_adapter


def test_a_follow_up_reaches_the_model_with_the_earlier_picture_and_answer(engine, photo, read_by_model):
    first = Message("user", "Describe the image.", images=[photo])
    reply = Message("assistant", "A zebra in pyjamas.")
    answer(engine, first, reply, Message("user", "What color is it?"))
    (token_ids, embeddings) = read_by_model[-1]
    assert token_ids.count(IMAGE_TOKEN_ID) == engine.model.tokens_per_image
    text = engine.tokenizer.decode([token for token in token_ids if token != IMAGE_TOKEN_ID])
    assert text.index("Describe") < text.index("zebra in pyjamas") < text.index("What color is it?")
    features = engine.image_features(photo)
    shown = embeddings[0, torch.tensor(token_ids) == IMAGE_TOKEN_ID]
    assert_close(shown, engine.model.projector(features))


def test_what_was_shown_earlier_changes_what_the_model_reads(engine, photo, read_by_model):
    """The same words about another picture are read with other numbers in the picture's place."""
    reply, follow_up = Message("assistant", "A person."), Message("user", "What color is it?")
    for name in ("astronaut.jpg", "coffee.jpg"):
        shown = Message("user", "Describe the image.", images=[photo.with_name(name)])
        answer(engine, shown, reply, follow_up)
    first, second = (read[0, torch.tensor(token_ids) == IMAGE_TOKEN_ID] for token_ids, read in read_by_model)
    assert first.shape == second.shape and not torch.allclose(first, second)


def test_pictures_keep_the_order_in_which_they_were_shown(engine, photo, small_picture, read_by_model):
    answer(
        engine,
        Message("user", "One.", images=[photo]),
        Message("assistant", "Yes."),
        Message("user", "Two.", images=[small_picture]),
    )
    token_ids, embeddings = read_by_model[-1]
    shown = embeddings[0, torch.tensor(token_ids) == IMAGE_TOKEN_ID]
    expected = [engine.model.projector(engine.image_features(image)) for image in (photo, small_picture)]
    assert_close(shown, torch.cat(expected))


def test_a_picture_without_words_is_described(engine, photo):
    assert answer(engine, Message("user", "", [photo])) == answer(
        engine, Message("user", "Describe the image.", [photo])
    )


def test_a_picture_is_encoded_once(engine, small_picture, monkeypatch):
    calls, encode = [], engine.image_encoder.encode
    monkeypatch.setattr(engine.image_encoder, "encode", lambda images: (calls.append(1), encode(images))[1])
    for question in ("What is it?", "What color is it?", "How many are there?"):
        answer(engine, Message("user", question, images=[small_picture.rotate(45)]))
    assert len(calls) == 1


def test_pictures_differ_even_where_their_words_do_not(engine, photo):
    names = ("astronaut.jpg", "camera.jpg", "coffee.jpg", "boat.jpg")
    answers = [answer(engine, Message("user", "Describe the image.", images=[photo.with_name(n)])) for n in names]
    assert len(set(answers)) >= 3, answers


@pytest.mark.parametrize(
    ("name", "question", "word"),
    [
        ("coffee.jpg", "What is in the cup?", "Espresso"),
        ("bananas.jpg", "What is this?", "banana"),
        ("bus.jpg", "What color is the bus?", "Red"),
        ("snail.jpg", "What animal is this?", "snail"),
        ("toaster.jpg", "What is this?", "toaster"),
        ("train.jpg", "What is this?", "locomotive"),
        ("camera.jpg", "Is there a camera?", "Yes"),
        ("astronaut.jpg", "Is there a woman in the picture?", "Yes"),
        ("boat.jpg", "Is there a boat?", "Yes"),
        ("boat.jpg", "Is there a dog?", "No"),
        ("ball.jpg", "What color is the ball?", "Red"),
    ],
)
def test_the_shipped_weights_see(engine, photo, name, question, word):
    """Every example of the page, and a no among the yeses."""
    assert word in answer(engine, Message("user", question, images=[photo.with_name(name)]))


class TestLongConversations:
    @pytest.fixture
    def short_context(self, engine, monkeypatch):
        monkeypatch.setattr(engine, "context_length", 140)
        return engine

    def test_oldest_turns_go_first_and_it_is_said(self, short_context, read_by_model):
        turns = [
            Message(role, f"{word} " * 12)
            for word in ("alpha", "beta", "gamma", "delta")
            for role in ("user", "assistant")
        ]
        notes = []
        answer(short_context, *turns, Message("user", "Last question?"), notify=notes.append)
        text = short_context.tokenizer.decode(read_by_model[-1][0])
        assert "alpha" not in text and "delta" in text and "Last question?" in text
        assert text.count("<|im_start|>user") == text.count("<|im_start|>assistant")  # whole turns, reply just opened
        assert len(notes) == 1 and "left out the oldest" in notes[0]
        assert len(read_by_model[-1][0]) <= 140 - GREEDY.max_new_tokens

    def test_pictures_of_the_current_question_stay(self, short_context, small_picture, read_by_model):
        old = [Message("user", "alpha " * 100), Message("assistant", "beta " * 20)]
        answer(short_context, *old, Message("user", "And this?", images=[small_picture]), notify=lambda _: None)
        token_ids = read_by_model[-1][0]
        assert token_ids.count(IMAGE_TOKEN_ID) == short_context.model.tokens_per_image
        assert "alpha" not in short_context.tokenizer.decode([t for t in token_ids if t != IMAGE_TOKEN_ID])

    def test_a_system_message_stays(self, short_context, read_by_model):
        old = [Message("user", "alpha " * 100), Message("assistant", "beta " * 20)]
        answer(short_context, Message("system", "Be brief."), *old, Message("user", "Well?"), notify=lambda _: None)
        text = short_context.tokenizer.decode(read_by_model[-1][0])
        assert "Be brief." in text and "alpha" not in text

    def test_a_question_that_is_too_long_alone_is_refused(self, short_context):
        with pytest.raises(BadInput, match="too long"):
            answer(short_context, Message("user", "word " * 500))


@pytest.mark.parametrize(
    "messages",
    [[], [Message("user", "   ")], [Message("user", "Hi"), Message("assistant", "Hello.")]],
    ids=["nothing", "spaces", "no question"],
)
def test_without_a_question_there_is_no_answer(engine, messages):
    with pytest.raises(BadInput):
        answer(engine, *messages)


def test_a_bad_picture_leaves_the_engine_ready(engine, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(BadInput, match="not a picture"):
        answer(engine, Message("user", "What is it?", images=[tmp_path / "text.png"]))
    assert answer(engine, Message("user", "What is the capital of France?"))


def test_a_reply_that_is_not_read_to_its_end_frees_the_engine(engine):
    pieces = engine.reply([Message("user", "Tell me a long story.")], GREEDY)
    next(pieces)
    pieces.close()
    assert answer(engine, Message("user", "Hi"))


def test_replies_at_once_do_not_disturb_each_other(engine, photo):
    """One with the adapter, one without: each gets what it would have got alone."""
    questions = [Message("user", "Describe the image.", images=[photo]), Message("user", "What is the sun?")] * 2
    alone = [answer(engine, question) for question in questions]
    together: list = [None] * len(questions)

    def run(place):
        together[place] = answer(engine, questions[place])

    threads = [threading.Thread(target=run, args=[place]) for place in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


@pytest.mark.parametrize("decoder", ["onnx", "torch"])
def test_a_short_answer_does_not_wait_for_a_long_one(engine, photo, monkeypatch, decoder):
    if decoder == "torch":
        exact = TorchDecoder(engine.model.language_model)
        monkeypatch.setattr(engine, "decoder", exact)
        monkeypatch.setattr(engine, "prefix_cache", PrefixCache(exact, 2e8))
    picture = Message("user", "Describe the image.", images=[photo])
    alone = answer(engine, picture)
    long = engine.reply([Message("user", "Tell me a long story.")], SamplingOptions(temperature=0, max_new_tokens=40))
    beginning = [next(long) for _ in range(5)]
    assert answer(engine, picture) == alone  # in the same thread: nothing is held between pieces
    story = "".join([*beginning, *long])
    assert story == answer(engine, Message("user", "Tell me a long story."), options=replace(GREEDY, max_new_tokens=40))


def test_a_question_is_answered_while_another_thread_writes(engine):
    """The one that writes does not take every turn."""
    written: list[str] = []

    def write():
        options = SamplingOptions(temperature=0, max_new_tokens=200, repetition_penalty=1.3)
        written.extend(engine.reply([Message("user", "Tell me a long story.")], options))
        written.append("END")

    thread = threading.Thread(target=write)
    thread.start()
    while len(written) < 5:
        time.sleep(0.01)
    next(reply := engine.reply([Message("user", "Is one more than two?")], GREEDY))
    assert "END" not in written
    reply.close()
    thread.join()


def test_an_unknown_preset_lists_the_known(engine):
    import mmchat

    with pytest.raises(MmchatError, match="smol"):
        mmchat.load("gpt-17")
