#!/usr/bin/env python
"""Benchmarks `smol` on this machine against a straightforward baseline, measured in the same run.

Warm the cache first: run the app once. The benchmark takes about seven minutes on two cores. The first run fetches a
minute of speech from the package index.

python benchmarks/run.py
python benchmarks/run.py --only decoding follow-up --out figures.json
python benchmarks/run.py --only quality --captions dev-captions.json --photos photos/
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PHOTOS = sorted((ROOT / "examples").glob("*.jpg"))
PICTURE_QUESTION = "Describe the image."
BEAMS = 5  # faster-whisper's default


@dataclass
class Row:
    """One row of the table: our figure, the baseline's, their ratio and the target for it."""

    what: str
    ours: str
    baseline: str
    ratio: float | None
    target: str


def timed(work: Callable) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@cache
def engine():
    import mmchat

    loaded = mmchat.load("smol")
    loaded.warm_up()
    return loaded


def first_token(messages) -> float:
    """Seconds until the first piece of an answer."""
    from mmchat import SamplingOptions

    start = time.perf_counter()
    with closing(engine().reply(messages, SamplingOptions(temperature=0))) as pieces:
        next(pieces)
    return time.perf_counter() - start


# The rows of the table


def follow_up() -> Iterator[Row]:
    """Time to first token in a long conversation about a picture, with and without the prefix cache."""
    from mmchat import Message, SamplingOptions

    questions = ("What is in this picture?", "What color is it?", "Is there a dog?", "What is happening here?")
    options = SamplingOptions(temperature=0, max_new_tokens=16)
    cached: dict[int, list[float]] = {}  # turn -> seconds
    uncached = []
    for photo in PHOTOS:
        messages = []
        for turn in range(1, 13):
            picture = [photo] if turn == 1 else []
            messages.append(Message("user", questions[turn % len(questions)], picture))
            cached.setdefault(turn, []).append(first_token(messages))
            messages.append(Message("assistant", "".join(engine().reply(messages, options))))
        engine().forget()
        uncached.append(first_token(messages[:11]))
    at = {turn: median(seconds) for turn, seconds in cached.items()}
    baseline = median(uncached)
    yield Row(
        "turn 6: first token", f"{at[6]:.2f} s", f"{baseline:.2f} s without the prefix cache", baseline / at[6], "5"
    )
    yield Row("turn 12 vs. turn 2", f"{at[12]:.2f} s", f"{at[2]:.2f} s", at[12] / at[2], "at most 1.3")


def _embeddings():
    from mmchat import Message

    encoded = engine().tokenize([Message("user", PICTURE_QUESTION, [PHOTOS[0]])])
    return engine().embed(encoded)


def decoding() -> Iterator[Row]:
    """Decoding speed: 64 tokens about a picture, without stop tokens; the first is not counted."""
    import torch

    from mmchat import SamplingOptions
    from mmchat.inference.decoder import TorchDecoder
    from mmchat.inference.generation import stream_token_ids

    model, embeddings, count = engine().language_model, _embeddings(), 64
    options = SamplingOptions(temperature=0, max_new_tokens=count)

    def ours() -> float:
        stream = stream_token_ids(engine().decoder, embeddings, options, set())
        next(stream)
        return (count - 1) / timed(lambda: list(stream))

    @torch.inference_mode()
    def generate(length: int) -> None:
        mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
        lengths = {"max_new_tokens": length, "min_new_tokens": length}
        model.generate(inputs_embeds=embeddings, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)

    def baseline() -> float:
        return (count - 1) / (timed(lambda: generate(count)) - timed(lambda: generate(1)))

    ours(), baseline()
    pairs = [(ours(), baseline()) for _ in range(5)]
    speed, baseline_speed = (median(column) for column in zip(*pairs, strict=True))
    yield Row(
        "decoding about a picture",
        f"{speed:.0f} tokens/s",
        f"{baseline_speed:.0f}, transformers' generate in fp32",
        median(one / other for one, other in pairs),
        "2.5",
    )
    if not isinstance(engine().decoder, TorchDecoder):
        weights = engine().decoder.files[True].stat().st_size
        yield Row(
            "upper bound: bytes read per token",
            f"{weights / 1e6:.0f} MB",
            f"{_bandwidth() / weights:.0f} tokens/s at {_bandwidth() / 1e9:.0f} GB/s",
            None,
            "",
        )

    def loop() -> None:
        """The naive loop without a KV cache: a full forward pass per token."""
        rows = embeddings
        for _ in range(count):
            with torch.inference_mode():
                token = model(inputs_embeds=rows, use_cache=False).logits[:, -1].argmax(dim=-1)
                rows = torch.cat([rows, model.get_input_embeddings()(token)[:, None]], dim=1)

    def answer() -> None:
        list(stream_token_ids(engine().decoder, embeddings, options, set()))

    pairs = [(timed(answer), timed(loop)) for _ in range(3)]
    whole, again = (median(column) for column in zip(*pairs, strict=True))
    yield Row("an answer of 64 tokens", f"{whole:.2f} s", f"{again:.1f} s without a KV cache", again / whole, "10")


def llama_cpp() -> Iterator[Row]:
    """An answer without a picture, with the page's default options, against llama.cpp with the same GGUF file.

    Both use as many threads as PyTorch. llama.cpp runs as its server does, with the file's own 4-bit weights.
    """
    import torch

    from mmchat import Message, SamplingOptions
    from mmchat.conversation import TEXT_PENALTY
    from mmchat.fetching import fetch
    from mmchat.inference.generation import stream_token_ids

    count, question = 64, "Tell me a long story."
    options = SamplingOptions(max_new_tokens=count, repetition_penalty=TEXT_PENALTY)
    encoded = engine().tokenize([Message("user", question)])
    embeddings = engine().embed(encoded)

    def ours() -> float:
        stream = stream_token_ids(
            engine().decoder, embeddings, options, set(), engine().decoder.new_cache(with_adapter=False)
        )
        next(stream)
        return (count - 1) / timed(lambda: list(stream))

    request = {
        "prompt": encoded.token_ids,
        "n_predict": count,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "repeat_penalty": options.repetition_penalty,
        "ignore_eos": True,
    }
    model = str(fetch(engine().preset.language_model.source))

    def baseline() -> float:  # in a process of its own, as a user would run it
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            return process.submit(llama_cpp_speed, model, torch.get_num_threads(), request).result()

    ours(), baseline()
    pairs = [(ours(), baseline()) for _ in range(5)]
    speed, baseline_speed = (median(column) for column in zip(*pairs, strict=True))
    yield Row(
        "text, the page's options",
        f"{speed:.0f} tokens/s",
        f"{baseline_speed:.0f}, llama.cpp with the same file",
        median(one / other for one, other in pairs),
        "1.0",
    )


def llama_cpp_speed(model: str, threads: int, request: dict) -> float:
    """Tokens per second of llama.cpp; the first answer warms it up."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.verbosity = model, -1
    settings.n_ctx, settings.n_parallel = 1024, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(settings)
    return [server.handle_completions(request)["timings"]["predicted_per_second"] for _ in range(2)][-1]


def together() -> Iterator[Row]:
    """Answers written at the same time against one alone: all about pictures, and every other one text only.

    Picture questions use the adapter, whose merged weights are a second model, so mixed answers take two passes.
    """
    from mmchat import SamplingOptions
    from mmchat.inference.generation import stream_token_ids

    count, options = 48, SamplingOptions(max_new_tokens=49)
    embeddings = _embeddings()

    def speed(answers: int, is_mixed: bool) -> float:
        adapted = [not is_mixed or index % 2 == 0 for index in range(answers)]
        caches = [engine().decoder.new_cache(with_adapter) for with_adapter in adapted]
        streams = [stream_token_ids(engine().decoder, embeddings, options, set(), cache) for cache in caches]
        [next(stream) for stream in streams]  # prefills
        return answers * count / timed(lambda: [list(tokens) for tokens in zip(*streams, strict=True)])

    for answers, is_mixed in product((2, 4, 8, 16), (False, True)):
        pairs = [(speed(answers, is_mixed), speed(1, is_mixed)) for _ in range(3)]
        many, one = (median(column) for column in zip(*pairs, strict=True))
        ratio = median(many / one for many, one in pairs)
        name = f"{answers} answers at once, {'half text only' if is_mixed else 'all about pictures'}"
        yield Row(name, f"{many:.0f} tokens/s", f"{one:.0f} alone", ratio, "2.5 for four")


def repeated() -> Iterator[Row]:
    """Time to first token of a question that was asked before, against one that was not."""
    from mmchat import Message

    questions = [
        Message("user", "What is the capital of France?"),
        *(Message("user", PICTURE_QUESTION, [photo]) for photo in PHOTOS),
    ]
    engine().forget(pictures=True)
    new, again = ([first_token([question]) for question in questions] for _ in range(2))
    one, other = median(again), median(new)
    yield Row(
        "repeated question: first token", f"{1e3 * one:.0f} ms", f"{1e3 * other:.0f} ms new", other / one, "25 ms"
    )


def new_picture() -> Iterator[Row]:
    """Time to first token of a question about a new picture, which the page shows the model as soon as it is chosen."""
    from mmchat import Message

    at_once, shown = [], []
    for photo in PHOTOS:
        for seconds, is_shown in ((at_once, False), (shown, True)):
            engine().forget(pictures=True)
            if is_shown:
                engine().prefill([Message("user", "", [photo])])
            seconds.append(first_token([Message("user", PICTURE_QUESTION, [photo])]))
    one, other = median(shown), median(at_once)
    yield Row(
        "new picture, chosen before the question",
        f"{one:.2f} s",
        f"{other:.2f} s, both at once",
        other / one,
        "0.12 s",
    )


@cache
def _bandwidth() -> float:
    """Memory bandwidth of this machine, in bytes per second."""
    import torch

    block = torch.ones(1 << 27)  # 512 MiB
    return block.nbytes / min(timed(block.sum) for _ in range(5))


def encoder_runs() -> Iterator[Row]:
    """Encoder runs for five questions about one picture."""
    from mmchat import Message, SamplingOptions

    encoder = type(engine().image_encoder)
    engine().forget(pictures=True)
    messages = []
    with patch.object(encoder, "encode", autospec=True, side_effect=encoder.encode) as encode:
        for number in range(5):
            messages.append(Message("user", f"Is there a dog? {number}", [] if number else [PHOTOS[0]]))
            said = "".join(engine().reply(messages, SamplingOptions(temperature=0, max_new_tokens=4)))
            messages.append(Message("assistant", said))
    runs = encode.call_count
    yield Row("five questions about a picture", f"encoded {runs} time", "5 times", 5 / runs, "5")


@contextmanager
def serving() -> Iterator[tuple[subprocess.Popen, str, float, float]]:
    """Runs app.py in a subprocess; yields it, its address, and the seconds to its first answer and to the page."""
    import httpx

    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryFile("w+") as log:
        begun = time.perf_counter()
        page = subprocess.Popen(
            [sys.executable, "app.py", "--preset", "smol", "--port", address.rpartition(":")[2]],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            answered = None
            while "local URL" not in _read_all(log):
                time.sleep(0.02)
                if page.poll() is not None:
                    raise SystemExit(_read_all(log))
                with suppress(httpx.TransportError):
                    if not answered and httpx.get(address).is_success:
                        answered = time.perf_counter() - begun
            httpx.get(address, timeout=60).raise_for_status()
            seconds = time.perf_counter() - begun
            yield page, address, answered or seconds, seconds
        finally:
            page.terminate()
            page.wait()


def _read_all(log) -> str:
    """The log so far, without moving the file position."""
    return os.pread(log.fileno(), 1 << 20, 0).decode()


def start() -> Iterator[Row]:
    """Seconds from the command to the first answer, which says that mmchat is starting, and to the page."""

    def packages() -> None:
        subprocess.run([sys.executable, "-c", "import gradio, torch, transformers"], check=True)

    def page() -> tuple[float, float]:
        with serving() as (_, _, answered, seconds):
            return answered, seconds

    packages(), page()
    runs = [(*page(), timed(packages)) for _ in range(3)]
    answered, ours, baseline = (median(column) for column in zip(*runs, strict=True))
    yield Row("python app.py to the first answer", f"{answered:.1f} s", "HTTP 200", None, "3 s")
    yield Row(
        "python app.py to the first page",
        f"{ours:.1f} s",
        f"{baseline:.1f} s, importing gradio, torch, transformers",
        ours / baseline,
        "at most 1.3",
    )


def memory() -> Iterator[Row]:
    """Memory of the app over 20 questions about 20 pictures."""
    from gradio_client import Client, handle_file
    from PIL import Image

    with serving() as (page, address, *_), tempfile.TemporaryDirectory() as folder:
        client = Client(address, verbose=False)
        resident = []
        for number in range(20):
            picture = Path(folder) / f"{number}.jpg"
            Image.open(PHOTOS[number % len(PHOTOS)]).rotate(number).save(picture)
            client.predict(PICTURE_QUESTION, handle_file(picture), api_name="/ask")
            resident.append(process_memory(page.pid, "VmRSS"))
        yield Row(
            "memory after 20 picture questions, peak",
            f"{process_memory(page.pid, 'VmHWM') / 1e9:.2f} GB",
            f"{resident[4] / 1e9:.2f} GB after 5, {resident[-1] / 1e9:.2f} after 20",
            None,
            "below 0.9 GB",
        )


def process_memory(process: int, field: str) -> int:
    """A memory field of /proc/PID/status, in bytes."""
    return int(re.search(rf"{field}:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1]) * 1024


def speech() -> Iterator[Row]:
    """A minute of a talk, by tiny.en, against OpenAI's package with the same weights and the same number of beams."""
    from openai_whisper import load, minute_of_speech

    from mmchat.fetching import fetch
    from mmchat.fetching.cache import cache_folder
    from mmchat.media import SAMPLE_RATE, read_audio
    from mmchat.models.speech_recognition import SpeechRecognizer
    from mmchat.presets import WHISPER_TINY_EN
    from mmchat.training.evaluation.metrics import word_error_rate

    recording, recognizer = minute_of_speech(cache_folder()), SpeechRecognizer(WHISPER_TINY_EN)
    model, samples = load(fetch(WHISPER_TINY_EN.source) / "model.bin"), read_audio(recording)
    said: dict[str, str] = {}

    def ours() -> None:
        said["ours"] = recognizer.transcribe(recording).text

    def baseline() -> None:
        options = {"language": "en", "fp16": False, "condition_on_previous_text": False}
        said["baseline"] = model.transcribe(samples, beam_size=BEAMS, best_of=BEAMS, **options)["text"]

    ours(), baseline()
    pairs = [(timed(ours), timed(baseline)) for _ in range(5)]
    one, other = (median(column) for column in zip(*pairs, strict=True))
    seconds = len(samples) / SAMPLE_RATE
    yield Row(
        "speech: compute per second of audio",
        f"{one / seconds:.3f} s",
        f"{other / seconds:.3f} s, openai-whisper tiny.en",
        median(theirs / ours for ours, theirs in pairs),
        "3",
    )
    differing = word_error_rate([said["ours"]], [said["baseline"]]).value
    yield Row("words that differ between the two", f"{differing:.1%}", "of the minute", None, "")


def training() -> Iterator[Row]:
    """Training speed: captions of 14 words, five per picture, about 32 per step; forward, backward, AdamW.

    Ours is compiled, as in the recipes of ``smol``, which needs a C++ compiler.
    """
    import torch
    from torch import nn

    from mmchat.device import keep_freed_memory
    from mmchat.models.vision_language_model import IGNORE_INDEX
    from mmchat.training.data.llava_json import conversation_of, entry_of
    from mmchat.training.data.packing import ConversationDataset, collate
    from mmchat.training.loss import next_token_loss
    from mmchat.training.recipe import Recipe
    from mmchat.training.run import build_model, chosen_preset

    keep_freed_memory()  # as the training scripts do
    recipe = Recipe(train=["none"], features="none", rank=16, compile=True)
    model, tokenizer = build_model(recipe, chosen_preset(recipe))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    rng, nouns = random.Random(0), "dog man woman ball beach street child car snow water horse bike".split()
    pictures = {f"{number}.jpg": PHOTOS[number % len(PHOTOS)] for number in range(26)}
    stored = {name: engine().image_features(path) for name, path in pictures.items()}
    captions = [
        conversation_of(
            entry_of(f"{name}-{number}", name, [(PICTURE_QUESTION, f"A {' '.join(rng.choices(nouns, k=13))}.")]), "-"
        )
        for name in pictures
        for number in range(5)
    ]

    def dataset(share: bool) -> ConversationDataset:
        return ConversationDataset(
            captions, stored, tokenizer, engine().chat_format, model.tokens_per_image, pack=share
        )

    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def ours(rows: ConversationDataset, number: int) -> int:
        batch = collate([rows[index] for index in range(6 * number, 6 * number + 6)])  # 30 captions
        step(next_token_loss(*model(**batch)))
        return int((batch["labels"] != IGNORE_INDEX).sum())

    def baseline(rows: ConversationDataset, number: int) -> int:
        """The straightforward loop: one caption per row, pictures encoded in the step, logits at every token."""
        chosen = random.Random(number).sample(range(len(rows)), 32)
        batch = collate([rows[index] for index in chosen])
        images = [engine().image_encoder.encode([_opened(pictures[rows.rows[i].images[0]])])[0] for i in chosen]
        embeddings = model.splice(batch["input_ids"], torch.stack(images))
        labels = batch["labels"]
        with torch.compiler.set_stance("force_eager"):
            logits = model.language_model(
                inputs_embeds=embeddings, attention_mask=batch["attention_mask"], use_cache=False
            ).logits
            step(
                nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
                )
            )
        return int((labels != IGNORE_INDEX).sum())

    shared, single = dataset(True), dataset(False)
    speeds = []
    for number in range(4):  # the first is not counted
        pair = []
        for work, rows in ((ours, shared), (baseline, single)):
            begun = time.perf_counter()
            pair.append(work(rows, number) / (time.perf_counter() - begun))
        speeds.append(pair)
    one, other = (median(column) for column in zip(*speeds[1:], strict=True))
    yield Row(
        "training: answer tokens",
        f"{one:.0f} per second",
        f"{other:.0f}, the straightforward loop",
        one / other,
        "2.5",
    )


def _opened(path: Path):
    from mmchat import open_image

    return open_image(path)


def precomputing() -> Iterator[Row]:
    """Features of 160 photos, against encoding one photo at a time."""
    import torch

    from mmchat.training.data.features import embed_folder

    encoder = engine().image_encoder
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        for number in range(160):
            photo = _opened(PHOTOS[number % len(PHOTOS)]).resize((500, 375))
            photo.save(pictures / f"{number}.jpg", quality=90)

        def ours(number: int) -> None:
            embed_folder(pictures, Path(folder) / f"features-{number}", engine().preset.image_encoder, encoder)

        from mmchat.models.efficientnet import EfficientNet

        network = EfficientNet(engine().preset.image_encoder.name).eval()  # batch norms are not folded

        @torch.inference_mode()
        def baseline() -> None:
            for path in pictures.iterdir():
                network(encoder.preprocess(_opened(path))[None])

        pairs = [(timed(lambda number=number: ours(number)), timed(baseline)) for number in range(3)]
    one, other = (160 / median(column) for column in zip(*pairs, strict=True))
    yield Row("features of photos", f"{one:.0f} per second", f"{other:.0f}, one at a time", one / other, "1.8")


def quality(captions: str, photos: str, limit: int) -> Iterator[Row]:
    """Greedy captions with 8-bit weights and inputs, against fp32 PyTorch."""
    from mmchat import Message, SamplingOptions
    from mmchat.inference.decoder import TorchDecoder
    from mmchat.inference.prefix_cache import PrefixCache
    from mmchat.training.evaluation.evaluator import read_items
    from mmchat.training.evaluation.metrics import caption_metrics

    items, options = read_items(captions, limit), SamplingOptions(temperature=0, max_new_tokens=48)
    figures, said, decoder, prefix_cache = {}, {}, engine().decoder, engine().prefix_cache
    for name, used in (("8 bits", decoder), ("PyTorch", TorchDecoder(engine().language_model))):
        engine().decoder, engine().prefix_cache = used, PrefixCache(used, 0)
        said[name] = [
            "".join(
                engine().reply(
                    [Message("user", PICTURE_QUESTION, [Path(photos) / item.conversation.images[0]])], options
                )
            )
            for item in items
        ]
        figures[name] = caption_metrics(said[name], [item.references for item in items])
    engine().decoder, engine().prefix_cache = decoder, prefix_cache
    same = sum(one == other for one, other in zip(*said.values(), strict=True))
    yield Row("captions identical to fp32 PyTorch", f"{same} of {len(items)}", "", None, "")
    for metric in ("BLEU-4", "CIDEr"):
        fast, exact = (figure[metric].value for figure in figures.values())
        yield Row(f"{metric} of {len(items)} captions", f"{fast:.3f}", f"{exact:.3f}", fast / exact, "0.99")


ROWS = {
    "follow-up": follow_up,
    "repeated": repeated,
    "new-picture": new_picture,
    "decoding": decoding,
    "llama.cpp": llama_cpp,
    "together": together,
    "encoder-runs": encoder_runs,
    "start": start,
    "memory": memory,
    "speech": speech,
    "training": training,
    "precomputing": precomputing,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*ROWS, "quality"],
        default=list(ROWS),
        help="the rows to measure (default: all but quality)",
    )
    parser.add_argument("--captions", help="for quality: captions with references, from prepare_data.py")
    parser.add_argument("--photos", help="for quality: the folder of their pictures")
    parser.add_argument("--limit", type=int, default=200, help="for quality: number of captions (default: 200)")
    parser.add_argument("--out", help="a JSON file for the figures")
    options = parser.parse_args()
    if "quality" in options.only and not (options.captions and options.photos):
        parser.error("quality needs --captions and --photos")
    logging.disable(logging.WARNING)
    rows = []
    for name in options.only:
        measure = ROWS.get(name) or (lambda: quality(options.captions, options.photos, options.limit))
        for row in measure():
            rows.append(row)
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}×"
            print(f"{row.what:<40} {ratio:>7}  (target: {row.target})   {row.ours}; {row.baseline}", flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
