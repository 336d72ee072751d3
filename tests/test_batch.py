"""Continuous batching: an answer has the same tokens as alone, whoever joins and leaves beside it."""

from __future__ import annotations

import gc
import random
import weakref
from collections import Counter
from threading import Thread, current_thread

import pytest
import torch

from mmchat import Message, SamplingOptions
from mmchat.inference.batch import MAX_UNREAD, Answer, Batch
from mmchat.inference.decoder import TorchDecoder
from mmchat.inference.generation import stream_token_ids
from mmchat.inference.llama_cpp import CHUNK, Sequences
from mmchat.inference.llama_decoder import load_llama_decoder
from mmchat.inference.llama_rows import FEW
from mmchat.inference.openvino_decoder import load_openvino_decoder
from mmchat.inference.prefix_cache import PrefixCache
from mmchat.inference.sampling import Sampler
from mmchat.models.language_model import add_adapter, load_language_model
from mmchat.presets import get_preset
from tests.close import INT8_ERROR, INT8_RUN_TO_RUN, certain_answer
from tests.conftest import ROOT


@pytest.fixture(params=["llama-patches", "phi3-patches"])
def decoders(request, tiny, tmp_path, monkeypatch):
    """Decoders of a small model with an adapter that changes its logits.

    PyTorch's comes first. Only its tokens are exactly the same in a batch: llama.cpp, which has two cores, and OpenVINO
    round to 8 bits.
    """
    monkeypatch.setenv("MMCHAT_DECODER", "openvino")  # for the last
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv("MMCHAT_CACHE", str(tmp_path))
    model, _ = load_language_model(get_preset(request.param).language_model, torch.float32)
    model = add_adapter(model, rank=4, alpha=8, dropout=0.0, base_name="tiny").eval()
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.3)
    return [TorchDecoder(model), load_llama_decoder(model), load_openvino_decoder(model)]


def test_tokens_are_the_same_as_alone(decoders):
    """Prompts of other lengths, with and without the adapter, sampled and greedy, join, leave and are given up."""
    rng = random.Random(0)
    torch.manual_seed(1)
    for decoder in decoders[:1]:
        hidden = decoder.model.config.hidden_size

        def start(index, decoder=decoder, hidden=hidden):
            torch.manual_seed(index)
            embeddings = torch.randn(1, 1 + 37 * index % 50, hidden)
            options = SamplingOptions(0.7 * (index % 3), max_new_tokens=1 + 7 * index % 40, seed=index)
            return stream_token_ids(decoder, embeddings, options, {3}, decoder.new_cache(index % 2 == 0))

        alone = {index: list(start(index)) for index in range(12)}
        waiting, running, written = list(alone), {}, {index: [] for index in alone}
        given_up = {4, 9}
        sizes = set()
        while waiting or running:
            if waiting and rng.random() < 0.3:
                index = waiting.pop(0)
                running[index] = start(index)
            elif running:
                index = rng.choice(list(running))
                token_id = next(running[index], None)
                sizes.add(len(decoder.batch))
                if token_id is not None:
                    written[index].append(token_id)
                if token_id is None or (index in given_up and len(written[index]) == 3):
                    running.pop(index).close()
        assert max(sizes) > 3 and len(decoder.batch) == 0
        for index, expected in alone.items():
            assert written[index] == (expected[:3] if index in given_up else expected)


@torch.inference_mode()
def test_rows_have_the_logits_of_alone(decoders):
    """Rows of other lengths, with and without the adapter, join and leave. Their tokens are given, not sampled."""
    for decoder in decoders:
        rng, hidden = random.Random(1), decoder.model.config.hidden_size
        torch.manual_seed(2)
        prompts = [torch.randn(1, 1 + 37 * index % 50, hidden) for index in range(9)]
        tokens = [[rng.randrange(4, 200) for _ in range(1 + 7 * index % 20)] for index in range(9)]

        def prefilled(index, decoder=decoder, prompts=prompts):
            cache = decoder.new_cache(with_adapter=index % 2 == 0)
            decoder.prefill(prompts[index], cache)
            return cache

        alone = []
        for index, given in enumerate(tokens):
            row = decoder.batch.rows.add(prefilled(index))
            alone.append([dict(decoder.batch.rows.step({row: token_id}))[row].clone() for token_id in given])
            decoder.batch.rows.remove(row)
        waiting, running, found = list(range(9)), {}, [[] for _ in range(9)]
        while waiting or running:
            if waiting and (not running or rng.random() < 0.5):
                index = waiting.pop(0)
                running[index] = decoder.batch.rows.add(prefilled(index))
            stepped = rng.sample(list(running), rng.randint(1, len(running)))
            numbers = {running[index]: index for index in stepped}
            logits = decoder.batch.rows.step({running[index]: tokens[index][len(found[index])] for index in stepped})
            for row, values in logits:
                found[numbers[row]].append(values.clone())
            for index in stepped:
                if len(found[index]) == len(tokens[index]):
                    decoder.batch.rows.remove(running.pop(index))
        assert list(map(len, found)) == list(map(len, tokens))
        for one, other in zip(found, alone, strict=True):
            one, other = torch.stack(one), torch.stack(other)
            assert (one - other).std() < INT8_ERROR * other.std()


@torch.inference_mode()
def test_reordered_rows_go_on_as_the_rows_that_they_copy(decoders):
    for decoder in decoders:
        rows, caches = decoder.batch.rows, []
        for length in (5, 9):
            caches.append(decoder.new_cache())
            decoder.prefill(torch.randn(1, length, decoder.model.config.hidden_size), caches[-1])

        def stepped(cache, *token_ids, rows=rows):
            """Logits after the tokens, in a row of its own."""
            row = rows.add(cache)
            *_, logits = [dict(rows.step({row: token_id}))[row].clone() for token_id in token_ids]
            rows.remove(row)
            return logits

        expected = [stepped(caches[0], token_id, 8) for token_id in (7, 7, 5)] + [stepped(caches[1], 9, 10)]
        bystander, beams = rows.add(caches[1]), [rows.add(caches[0]) for _ in range(3)]
        list(rows.step({**dict(zip(beams, (5, 6, 7), strict=True)), bystander: 9}))
        rows.reorder(beams, [2, 2, 0])
        found = dict(rows.step({**dict.fromkeys(beams, 8), bystander: 10}))
        for row, logits in zip([*beams, bystander], expected, strict=True):
            assert (found[row] - logits).std() < INT8_ERROR * logits.std()
            rows.remove(row)


@torch.inference_mode()
def test_few_cores_compute_parts_of_their_own(decoders, monkeypatch):
    """On llama.cpp, rows come and go, and move between the parts with all their tokens."""
    decoder, passes, extend = decoders[1], [], Sequences.extend
    rows, number, caches, alone = decoder.batch.rows, 7, [], []
    for index in range(number):
        caches.append(decoder.new_cache(with_adapter=index % 3 > 0))
        decoder.prefill(torch.randn(1, 3 + 11 * index, decoder.model.config.hidden_size), caches[-1])
    for cache in caches:
        row = rows.add(cache)
        alone.append([dict(rows.step({row: token_id}))[row].clone() for token_id in range(4, 5 + 2 * number)])
        rows.remove(row)
    monkeypatch.setattr(Sequences, "extend", lambda self, *given: passes.append(given) or extend(self, *given))
    running, lengths = {}, [0] * number
    for turn in range(2 * number - 1):
        if turn < number:
            running[turn] = rows.add(caches[turn])
        else:
            rows.remove(running.pop(turn - number))
        passes.clear()
        for row, logits in rows.step({row: 4 + lengths[index] for index, row in running.items()}):
            (index,) = (index for index, other in running.items() if other is row)
            expected = alone[index][lengths[index]]
            assert (logits - expected).std() < INT8_ERROR * expected.std()
            lengths[index] += 1
        sizes = Counter(row.part for row in running.values())
        assert sizes[0] - sizes[1] in (0, 1)
        assert sum(len(tokens) for tokens, *_ in passes) == len(running) and len(passes) <= 3  # two sets of weights
        assert {threads for *_, threads in passes} == {2 if len(running) == 1 else 1}
    for row in running.values():
        rows.remove(row)


@torch.inference_mode()
def test_many_cores_share_a_pass(decoders, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2 * FEW)
    decoder, passes, extend = load_llama_decoder(decoders[0].model), [], Sequences.extend
    rows, cache = decoder.batch.rows, decoder.new_cache()
    decoder.prefill(torch.randn(1, 3, decoder.model.config.hidden_size), cache)
    crowd = [rows.add(cache) for _ in range(CHUNK + 2)]
    monkeypatch.setattr(Sequences, "extend", lambda self, *given: passes.append(given) or extend(self, *given))
    assert len(rows.step(dict.fromkeys(crowd, 5))) == len(crowd)
    assert [(len(tokens), threads) for tokens, *_, threads in passes] == [(CHUNK, 2 * FEW), (2, 2 * FEW)]


@torch.inference_mode()
def test_a_pass_that_fails_changes_nothing(decoders, monkeypatch):
    """The other core, which computed its part, does so again."""

    def fail(self, embeddings, positions, *given):
        if 9 in positions:
            raise MemoryError("too little")
        return extend(self, embeddings, positions, *given)

    decoder, extend = decoders[1], Sequences.extend
    rows, caches, handles = decoder.batch.rows, [], []
    for length in (5, 9, 6):
        caches.append(decoder.new_cache())
        decoder.prefill(torch.randn(1, length, decoder.model.config.hidden_size), caches[-1])
        handles.append(rows.add(caches[-1]))
    with monkeypatch.context() as patched, pytest.raises(MemoryError, match="too little"):
        patched.setattr(Sequences, "extend", fail)
        list(rows.step(dict.fromkeys(handles, 5)))
    assert [row.length for row in handles] == [5, 9, 6]
    found = dict(rows.step(dict.fromkeys(handles, 5)))
    for row, cache in zip(handles, caches, strict=True):
        rows.remove(row)
        again = rows.add(cache)
        expected = dict(rows.step({again: 5}))[again]
        assert (found[row] - expected).std() < INT8_ERROR * expected.std()
        rows.remove(again)


def test_garbage_collection_does_not_close_an_answer_on_another_core(engine, monkeypatch):
    """Closing waits for the engine's lock, whose holder waits for the other cores."""

    class Abandoned:
        """An answer in a reference cycle: only garbage collection closes it."""

        def __init__(self):
            self.pieces, self.itself = engine.reply([Message("user", "Write a story.")], options), self
            next(self.pieces)

    def extend(self, *given):
        if current_thread() is not thread:
            gc.collect() if gc.isenabled() else None  # as any allocation may do
        return compute(self, *given)

    def run():
        streams = [engine.reply([Message("user", f"Write {number} poems.")], options) for number in (3, 4, 5, 6)]
        for _ in zip(*streams, strict=False):
            Abandoned()

    options, compute = SamplingOptions(temperature=0, max_new_tokens=6), Sequences.extend
    with monkeypatch.context() as two_cores:
        two_cores.setattr(torch, "get_num_threads", lambda: 2)
        decoder = load_llama_decoder(engine.decoder.model)
    monkeypatch.setattr(engine, "decoder", decoder)
    monkeypatch.setattr(engine, "prefix_cache", PrefixCache(decoder, 0))
    monkeypatch.setattr(Sequences, "extend", extend)
    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


def test_a_decoder_and_its_open_answers_may_be_garbage_together(decoders):
    class Cycle:
        def __init__(self, decoder):
            self.stream, self.itself = begun(decoder, 9)[1], self
            next(self.stream), next(self.stream)

    for _ in range(2):
        freed = weakref.ref(decoders[-1])
        Cycle(decoders.pop())
        gc.collect()
        assert freed() is None


class CountingRows:
    """Rows that record how many tokens each pass writes."""

    def __init__(self, rows):
        self.rows, self.passes = rows, []
        self.add, self.remove = rows.add, rows.remove

    def step(self, token_ids):
        self.passes.append(len(token_ids))
        return self.rows.step(token_ids)


def begun(decoder, max_new_tokens, sampler=None):
    """An answer, greedy by default, and its stream."""
    answer = Answer(sampler or Sampler(SamplingOptions(temperature=0)), set(), max_new_tokens)
    embeddings = torch.randn(1, 5, decoder.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    logits = decoder.prefill(embeddings, cache := decoder.new_cache())[0]
    return answer, decoder.batch.generate(answer, cache, logits)


def test_answers_advance_in_one_pass(decoders, monkeypatch):
    for decoder in decoders:
        counting = CountingRows(decoder.batch.rows)
        monkeypatch.setattr(decoder, "batch", Batch(counting))
        embeddings = torch.randn(1, 5, decoder.model.config.hidden_size)
        options = SamplingOptions(temperature=0, max_new_tokens=9)
        streams = [stream_token_ids(decoder, embeddings, options, set()) for _ in range(4)]
        together = [list(tokens) for tokens in zip(*streams, strict=True)]
        assert len(together) == 9
        assert sum(counting.passes) == 4 * 8  # each writes its first token from its prompt's logits
        assert len(counting.passes) <= 8 + 3  # they join one after the other


def test_an_answer_waits_for_its_reader(decoders):
    for decoder in decoders[:1]:
        alone = list(begun(decoder, 20)[1])
        (answer, slow), (_, fast) = begun(decoder, 20), begun(decoder, 20)
        read = [next(slow), next(slow)]
        assert list(fast) == alone
        unread = list(answer.take())
        assert len(unread) == MAX_UNREAD
        assert read + unread + list(slow) == alone


def test_an_error_reaches_its_own_reader_only(decoders):
    def fail(logits):
        if chosen:
            raise RuntimeError("broken sampler")
        chosen.append(5)
        return 5

    for decoder in decoders[:1]:
        chosen = []
        alone = list(begun(decoder, 8)[1])
        (_, broken), (_, sound) = begun(decoder, 8, fail), begun(decoder, 8)
        assert next(broken) == 5
        assert list(sound) == alone
        with pytest.raises(RuntimeError, match="broken sampler"):
            list(broken)
        assert len(decoder.batch) == 0


def test_the_real_model_answers_the_same_side_by_side(engine):
    options = SamplingOptions(temperature=0, max_new_tokens=16)
    questions = [
        Message("user", "Describe the image.", [ROOT / "examples" / "ball.jpg"]),
        Message("user", "Name the capital of France."),
        Message("user", "What is this?", [ROOT / "examples" / "bus.jpg"]),
        Message("user", "Why is the sky blue?"),
    ]
    alone = [certain_answer(engine, [question], options, INT8_RUN_TO_RUN)[0] for question in questions]
    replies = {index: engine.reply([question], options) for index, question in enumerate(questions)}
    said = [""] * len(questions)
    while replies:
        for index, reply in list(replies.items()):
            piece = next(reply, None)
            if piece is None:
                del replies[index]
            else:
                said[index] += piece
    assert all(text.startswith(certain) for text, certain in zip(said, alone, strict=True)), (said, alone)
    assert sum(map(len, alone)) > 40
