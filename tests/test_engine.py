"""The engine end to end, with the real models."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch

from mmchat import BadInput, Message, SamplingOptions
from mmchat.conversation import with_named_image
from mmchat.errors import MmchatError
from mmchat.inference.decoder import TorchDecoder
from mmchat.inference.prefix_cache import CachedPrefix, PrefixCache
from mmchat.models.language_model import switch_adapter
from mmchat.models.prompt import IMAGE_TOKEN_ID
from tests.close import INT8_RUN_TO_RUN, assert_close, certain_answer

GREEDY = SamplingOptions(temperature=0, max_new_tokens=16)


def answer(engine, *messages, options=GREEDY, **more):
    return "".join(engine.reply(messages, options, **more))


@pytest.fixture
def model_inputs(engine, monkeypatch):
    """(token ids, embeddings) that reach the language model in each reply, without the prefix cache, in one piece."""
    seen, splice = [], engine.model.splice

    def take_nothing(tokens, ends, with_adapter):
        return CachedPrefix(engine.decoder.new_cache(with_adapter))

    monkeypatch.setattr(engine.prefix_cache, "lookup", take_nothing)
    monkeypatch.setattr("mmchat.engine.prefill_boundaries", lambda encoded, shared: [len(encoded.token_ids)])

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
        [{"role": "user", "content": "Name the capital of France."}], add_generation_prompt=True, return_tensors="pt"
    )
    expected = base.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    options = SamplingOptions(temperature=0, max_new_tokens=16, repetition_penalty=1)
    ours, _ = certain_answer(engine, [Message("user", "Name the capital of France.")], options, 0.03)  # 8 bits
    assert engine.tokenizer.decode(expected, skip_special_tokens=True).startswith(ours)
    assert "Paris" in ours


def test_answers_about_pictures_may_repeat_words(engine, photo):
    """A repetition penalty helps the base model and hurts descriptions."""
    for message, penalty in (
        (Message("user", "Write a list of colors."), 1.1),
        (Message("user", "Describe the image.", images=[photo]), 1.0),
    ):
        options = SamplingOptions(temperature=0, max_new_tokens=16, repetition_penalty=penalty)
        assert answer(engine, message) == answer(engine, message, options=options)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_description_in_detail_does_not_repeat_itself(engine, photo, beams):
    question = Message("user", "Describe the image in detail.", images=[photo])
    said = answer(engine, question, options=SamplingOptions(temperature=0, max_new_tokens=96, beams=beams))
    sentences = [sentence for sentence in said.split(".") if sentence.strip()]
    assert len(sentences) >= 3 and len(set(sentences)) == len(sentences), said
    anything = SamplingOptions(temperature=0, max_new_tokens=96, beams=beams, no_repeat_ngram_size=0)
    assert answer(engine, question, options=anything) != said


def test_a_beam_search_finds_an_answer_as_likely_as_transformers_does(engine, photo):
    from mmchat.inference.generation import generate_batch

    options = SamplingOptions(temperature=0, max_new_tokens=24, beams=3, repetition_penalty=1, no_repeat_ngram_size=0)
    for name in ("ball.jpg", "bus.jpg"):
        question = Message("user", "Describe the image.", images=[photo.with_name(name)])
        prompt = engine.embed(engine.tokenize([question]))  # [1, length, hidden_size]
        (expected,) = generate_batch(engine.language_model, engine.tokenizer, [prompt[0]], options)
        near, best = (
            log_probability(engine, prompt, text) for text in (answer(engine, question, options=options), expected)
        )
        assert near > best - 0.1, (near, best)  # the decoder rounds to 8 bits


@torch.inference_mode()
def log_probability(engine, prompt, text):
    """The mean log-probability that PyTorch gives the tokens of an answer and its end."""
    switch_adapter(engine.language_model, True)
    token_ids = torch.tensor(engine.tokenizer.encode(text, add_special_tokens=False) + [engine.tokenizer.eos_token_id])
    answer = engine.language_model.get_input_embeddings()(token_ids)[None]
    logits = engine.language_model(inputs_embeds=torch.cat([prompt, answer], dim=1)).logits[0, prompt.shape[1] - 1 : -1]
    return logits.log_softmax(dim=-1).gather(1, token_ids[:, None]).mean().item()


def test_a_picture_switches_the_adapter_on(engine, photo, monkeypatch):
    """With the adapter off, the same question about the same picture gets another answer."""
    question = Message("user", "Describe the image.", images=[photo])
    with_adapter = answer(engine, question)
    new_cache = engine.decoder.new_cache
    with monkeypatch.context() as patched:
        patched.setattr(engine.decoder, "new_cache", lambda with_adapter: new_cache(False))
        engine.forget()
        assert answer(engine, question) != with_adapter
    engine.forget()
    assert answer(engine, question) == with_adapter


def test_a_follow_up_reaches_the_model_with_the_earlier_picture_and_answer(engine, photo, model_inputs):
    first = Message("user", "Describe the image.", images=[photo])
    reply = Message("assistant", "A zebra in pyjamas.")
    answer(engine, first, reply, Message("user", "What color is it?"))
    (token_ids, embeddings) = model_inputs[-1]
    assert token_ids.count(IMAGE_TOKEN_ID) == engine.model.tokens_per_image
    text = engine.tokenizer.decode([token for token in token_ids if token != IMAGE_TOKEN_ID])
    assert text.index("Describe") < text.index("zebra in pyjamas") < text.index("What color is it?")
    features = engine.image_features(photo)
    shown = embeddings[0, torch.tensor(token_ids) == IMAGE_TOKEN_ID]
    assert_close(shown, engine.model.projector(features))


def test_an_earlier_picture_changes_the_embeddings(engine, photo, model_inputs):
    """The same conversation about another picture has other picture tokens."""
    reply, follow_up = Message("assistant", "A person."), Message("user", "What color is it?")
    for name in ("astronaut.jpg", "coffee.jpg"):
        shown = Message("user", "Describe the image.", images=[photo.with_name(name)])
        answer(engine, shown, reply, follow_up)
    first, second = (read[0, torch.tensor(token_ids) == IMAGE_TOKEN_ID] for token_ids, read in model_inputs)
    assert first.shape == second.shape and not torch.allclose(first, second)


def test_pictures_stay_in_order(engine, photo, small_picture, model_inputs):
    answer(
        engine,
        Message("user", "One.", images=[photo]),
        Message("assistant", "Yes."),
        Message("user", "Two.", images=[small_picture]),
    )
    token_ids, embeddings = model_inputs[-1]
    shown = embeddings[0, torch.tensor(token_ids) == IMAGE_TOKEN_ID]
    expected = [engine.model.projector(engine.image_features(image)) for image in (photo, small_picture)]
    assert_close(shown, torch.cat(expected))


def test_a_picture_without_a_question_is_described(engine, photo):
    assert answer(engine, Message("user", "", [photo])) == answer(
        engine, Message("user", "Describe the image.", [photo])
    )


def test_a_picture_is_encoded_once(engine, small_picture, monkeypatch):
    calls, encode = [], engine.image_encoder.encode
    monkeypatch.setattr(engine.image_encoder, "encode", lambda images: (calls.append(1), encode(images))[1])
    for question in ("What is it?", "What color is it?", "How many are there?"):
        answer(engine, Message("user", question, images=[small_picture.rotate(45)]))
    assert len(calls) == 1


def test_different_pictures_get_different_answers(engine, photo):
    names = ("astronaut.jpg", "camera.jpg", "coffee.jpg", "boat.jpg")
    answers = [answer(engine, Message("user", "Describe the image.", images=[photo.with_name(n)])) for n in names]
    assert len(set(answers)) >= 3, answers


@pytest.mark.parametrize(
    ("name", "question", "word"),
    [
        ("coffee.jpg", "What is in the cup?", "Coffee"),
        ("bananas.jpg", "What is this?", "banana"),
        ("bus.jpg", "What color is the bus?", "Red"),
        ("snail.jpg", "What animal is this?", "snail"),
        ("toaster.jpg", "What is this?", "toaster"),
        ("train.jpg", "What is this?", "locomotive"),
        ("camera.jpg", "Is there a camera?", "Yes"),
        ("astronaut.jpg", "Is there a flag?", "Yes"),
        ("boat.jpg", "Is there a boat?", "Yes"),
        ("boat.jpg", "Is there a dog?", "No"),
        ("ball.jpg", "What color is the ball?", "Red"),
    ],
)
def test_the_shipped_weights_answer_correctly(engine, photo, name, question, word):
    """Every example of the page, and a question whose answer is no."""
    assert word in answer(engine, Message("user", question, images=[photo.with_name(name)]))


@pytest.mark.parametrize(
    ("question", "shown"),
    [
        ("What is in picture 1?", "a"),
        ("Describe the Second Photo.", "b"),
        ("And what is in image number 2?", "b"),
        ("How does picture 1 differ from the other?", "ab"),
        ("Are picture 1 and picture 2 alike?", "ab"),
        ("Which of the pictures shows a 1?", "ab"),
        ("What is in picture 3?", "ab"),
        ("What is this?", "ab"),
    ],
)
def test_a_question_that_names_one_of_several_images_leaves_the_others_out(question, shown):
    pair = Message("user", "What are these?", images=["a", "b"])
    earlier, asked = with_named_image([pair, Message("assistant", "Two."), Message("user", question)])[::2]
    assert "".join(earlier.images) == shown and not asked.images
    assert "".join(with_named_image([Message("user", question, images=["a", "b"])])[0].images) == shown
    later = [pair, Message("user", question, images=["c"])]  # its own image is "picture 1"
    assert with_named_image(later) == later


def test_the_picture_that_is_named_is_described(engine, photo):
    images = [photo.with_name("snail.jpg"), photo.with_name("toaster.jpg")]
    assert "snail" in answer(engine, Message("user", "What is in picture 1?", images=images))
    assert "toaster" in answer(engine, Message("user", "What is in picture 2?", images=images))


class TestLongConversations:
    @pytest.fixture
    def short_context(self, engine, monkeypatch):
        monkeypatch.setattr(engine, "context_length", 140)
        return engine

    def test_the_oldest_turns_are_dropped_with_a_notice(self, short_context, model_inputs):
        turns = [
            Message(role, f"{word} " * 12)
            for word in ("alpha", "beta", "gamma", "delta")
            for role in ("user", "assistant")
        ]
        notes = []
        answer(short_context, *turns, Message("user", "Last question?"), notify=notes.append)
        text = short_context.tokenizer.decode(model_inputs[-1][0])
        assert "alpha" not in text and "delta" in text and "Last question?" in text
        assert text.count("<|im_start|>user") == text.count(
            "<|im_start|>assistant"
        )  # whole turns, then the generation prompt
        assert len(notes) == 1 and "left out the oldest" in notes[0]
        assert len(model_inputs[-1][0]) <= 140 - GREEDY.max_new_tokens

    def test_the_picture_of_the_current_question_is_kept(self, short_context, small_picture, model_inputs):
        old = [Message("user", "alpha " * 100), Message("assistant", "beta " * 20)]
        answer(short_context, *old, Message("user", "And this?", images=[small_picture]), notify=lambda _: None)
        token_ids = model_inputs[-1][0]
        assert token_ids.count(IMAGE_TOKEN_ID) == short_context.model.tokens_per_image
        assert "alpha" not in short_context.tokenizer.decode([t for t in token_ids if t != IMAGE_TOKEN_ID])

    def test_a_system_message_is_kept(self, short_context, model_inputs):
        old = [Message("user", "alpha " * 100), Message("assistant", "beta " * 20)]
        answer(short_context, Message("system", "Be brief."), *old, Message("user", "Well?"), notify=lambda _: None)
        text = short_context.tokenizer.decode(model_inputs[-1][0])
        assert "Be brief." in text and "alpha" not in text

    def test_a_question_longer_than_the_context_is_rejected(self, short_context):
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


def test_the_engine_still_works_after_a_bad_picture(engine, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(BadInput, match="not a picture"):
        answer(engine, Message("user", "What is it?", images=[tmp_path / "text.png"]))
    assert answer(engine, Message("user", "What is the capital of France?"))


def test_a_closed_reply_releases_the_engine(engine):
    pieces = engine.reply([Message("user", "Tell me a long story.")], GREEDY)
    next(pieces)
    pieces.close()
    assert answer(engine, Message("user", "Hi"))


@pytest.mark.slow
def test_concurrent_replies_are_independent(engine, photo):
    """One with the adapter, one without: each gets the same answer as alone."""
    questions = [Message("user", "Describe the image.", images=[photo]), Message("user", "What is the sun?")] * 2
    alone = [certain_answer(engine, [question], GREEDY, INT8_RUN_TO_RUN)[0] for question in questions]
    together: list = [None] * len(questions)

    def run(index):
        together[index] = answer(engine, questions[index])

    threads = [threading.Thread(target=run, args=[index]) for index in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(text.startswith(certain) for text, certain in zip(together, alone, strict=True)), (together, alone)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["llama.cpp", "torch"])
def test_a_short_answer_does_not_wait_for_a_long_one(engine, photo, monkeypatch, decoder):
    if decoder == "torch":
        exact = TorchDecoder(engine.language_model)
        monkeypatch.setattr(engine, "decoder", exact)
        monkeypatch.setattr(engine, "prefix_cache", PrefixCache(exact, 2e8))
    picture = Message("user", "Describe the image.", images=[photo])
    alone, _ = certain_answer(engine, [picture], GREEDY, INT8_RUN_TO_RUN)
    long = engine.reply([Message("user", "Tell me a long story.")], SamplingOptions(temperature=0, max_new_tokens=40))
    beginning = [next(long) for _ in range(5)]
    beside = answer(engine, picture)  # in the same thread: no lock is held between pieces
    assert beside.startswith(alone)
    story = "".join([*beginning, *long])
    options = replace(GREEDY, max_new_tokens=40)
    assert story.startswith(
        certain_answer(engine, [Message("user", "Tell me a long story.")], options, INT8_RUN_TO_RUN)[0]
    )


@pytest.mark.slow
def test_a_question_is_answered_during_another_threads_reply(engine):
    """The running reply does not take every turn."""
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


def test_an_unknown_preset_lists_the_known_ones(engine):
    import mmchat

    with pytest.raises(MmchatError, match="smol"):
        mmchat.load("gpt-17")
