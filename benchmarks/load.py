#!/usr/bin/env python
"""Load test: many simultaneous visitors over HTTP who type, speak, send pictures, and leave in mid-answer.

It serves the app, sends visitors for some minutes, and checks that nobody gets an error except "busy", that everybody
is served, that conversations do not leak into each other, and that memory does not grow. Decoding is greedy, so each
answer must equal the one that the same question gets without load.

python benchmarks/load.py
python benchmarks/load.py --clients 10 --minutes 1
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
from gradio_client.utils import apply_diff
from run import PHOTOS, ROOT, process_memory, serving

from mmchat.engine import CACHE_BUDGET
from mmchat.media import SAMPLE_RATE, read_audio
from mmchat.models.text_to_speech import wav_bytes

SAMPLES, SAID = read_audio(ROOT / "tests" / "data" / "jfk.flac"), "your country"
DESCRIBE, FOLLOW_UP = "Describe the image.", "What color is it?"
MAX_NEW_TOKENS = 24
LEAVE_PROBABILITY = 0.15  # of leaving in mid-answer
COOLDOWN = 30  # seconds
BUSY = 503  # HTTP status


class Busy(Exception):
    """The server's queue is full."""


@dataclass
class Record:
    """The outcome of a run."""

    served: Counter = field(default_factory=Counter)  # visitor -> answers
    kinds: Counter = field(default_factory=Counter)  # text, picture, follow-up, voice, left, busy
    waits: list[float] = field(default_factory=list)  # seconds from the question to the first word
    problems: list[str] = field(default_factory=list)


class Site:
    """The page's endpoints, as a browser calls them."""

    def __init__(self, http: httpx.AsyncClient, config: dict):
        self.http = http
        self.ids = {end["api_name"]: end["id"] for end in config["dependencies"] if end["backend_fn"]}

    async def upload(self, name: str, content: bytes) -> dict:
        answer = await self.http.post("gradio_api/upload", files={"files": (name, content)})
        return {"path": answer.raise_for_status().json()[0], "meta": {"_type": "gradio.FileData"}}

    async def show(self, photo: Path) -> dict:
        return await self.upload(photo.name, photo.read_bytes())

    async def call(self, name: str, data: list, session: str) -> AsyncIterator[list]:
        """Streams the outputs of an endpoint; a skipped output keeps its last value."""
        body = {"data": data, "fn_index": self.ids[name], "session_hash": session}
        joined = await self.http.post("gradio_api/queue/join", json=body)
        if joined.status_code == BUSY and "full" in joined.text:
            raise Busy
        joined.raise_for_status()
        sent: list[Any] = []
        shown: list[Any] = [None] * 9
        async with self.http.stream("GET", f"gradio_api/queue/data?session_hash={session}") as events:
            async for line in events.aiter_lines():
                if not line.startswith("data:"):
                    continue
                event = json.loads(line[5:])
                if event["msg"] in ("process_generating", "process_completed"):
                    if not event["success"]:
                        raise RuntimeError(event["output"].get("error") or "an error without a message")
                    is_diff = sent and event["msg"] == "process_generating"
                    parts = event["output"]["data"]
                    sent = [apply_diff(*pair) for pair in zip(sent, parts, strict=True)] if is_diff else parts
                    shown = [old if is_skip(new) else new for old, new in zip(shown, sent, strict=False)]
                    yield shown
                    if event["msg"] == "process_completed":
                        return
                elif event["msg"] == "unexpected_error":
                    raise RuntimeError(event.get("message"))


def has_words(history: Any) -> bool:
    """Whether the answer has begun; a row that tells what is going on has a title."""
    last = history[-1] if isinstance(history, list) and history else {"role": "user"}
    return last["role"] == "assistant" and not (last.get("metadata") or {}).get("title")


def settings(temperature: float, max_new_tokens: int) -> list:
    """The inputs of an answer that follow its question; the last one reads it aloud."""
    return [temperature, max_new_tokens, False, 1, 1, False, None, "", False]


class Visitor:
    """A visitor with a unique word, who asks again and again."""

    leave_probability = LEAVE_PROBABILITY

    def __init__(self, number: int, count: int, site: Site, record: Record, expected: dict[str, str]):
        self.number, self.count, self.site, self.record, self.expected = number, count, site, record, expected
        self.word = own_word(number)
        self.rng = random.Random(number)

    async def stay(self, until: float) -> None:
        while time.monotonic() < until:
            try:
                await self.visit()
            except Exception as error:  # anything but Busy is a finding
                self.record.problems.append(f"visitor {self.number}: {type(error).__name__}: {error}")
            await asyncio.sleep(self.rng.uniform(0.2, 2))

    def recording(self) -> bytes:
        """The speech, begun at another moment each time: the last one heard is remembered."""
        return wav_bytes(SAMPLES[self.rng.randrange(SAMPLE_RATE // 4) :], SAMPLE_RATE)

    async def visit(self) -> None:
        """One conversation: a typed question, one about a picture with perhaps a follow-up, or a spoken one."""
        session = f"{self.word}-{self.rng.random()}"
        kind = self.rng.choice(["text", "picture", "picture", "voice"])
        history: list = []
        if kind == "text":
            history = await self.ask(session, kind, f"My word is {self.word}. What is my word?", None, history)
        elif kind == "voice":
            recording = await self.site.upload("speech.wav", self.recording())
            history = await self.ask(session, kind, recording, None, history)
        else:
            photo = self.rng.choice(PHOTOS)
            history = await self.ask(session, kind, DESCRIBE, await self.site.show(photo), history)
            self.compare(photo.name, history)
            if history and self.rng.random() < 0.5:
                history = await self.ask(session, "follow-up", FOLLOW_UP, None, history)
                self.compare(f"{photo.name}, then", history)

    async def ask(self, session: str, kind: str, question: Any, picture: dict | None, history: list) -> list:
        """Asks a question and returns the conversation; an empty one if the visitor left early."""
        is_leaving = self.rng.random() < self.leave_probability
        add = "add_voice" if kind == "voice" else "add_text"
        box = {"text": "" if kind == "voice" else question, "files": [picture] if picture else []}
        given = [question, box] if kind == "voice" else [box]
        switches = ["", False, False] if kind == "voice" else []  # language, translate, check before sending
        outputs = await self.last(add, [*given, history, None, *switches], session)
        asked_about, asked = outputs[2:4] if kind == "voice" else outputs[-2:]
        begun, first, after = time.monotonic(), None, []
        reply = self.retry("reply", [asked_about, None, asked, *settings(0, MAX_NEW_TOKENS)], session)
        async with aclosing(reply):  # leaving closes the connection
            async for after, *_ in reply:
                if first is None and has_words(after):
                    first = time.monotonic() - begun
                if is_leaving and len(after) > len(asked_about):
                    self.record.kinds["left"] += 1
                    return []
        self.record.waits.append(first or 0)
        self.record.kinds[kind] += 1
        self.record.served[self.number] += 1
        self.check(after, kind, len(asked_about))
        return after

    async def last(self, name: str, data: list, session: str) -> list:
        return [outputs async for outputs in self.retry(name, data, session)][-1]

    async def retry(self, name: str, data: list, session: str) -> AsyncIterator[list]:
        """``Site.call``, repeated while the server is busy."""
        while True:
            try:
                async with aclosing(self.site.call(name, data, session)) as calls:
                    async for outputs in calls:
                        yield outputs
                return
            except Busy:
                self.record.kinds["busy"] += 1
                await asyncio.sleep(self.rng.uniform(0.5, 3))

    def check(self, history: list, kind: str, asked: int) -> None:
        """Checks one conversation."""
        whole = json.dumps(history)
        others = {word for word in (own_word(number) for number in range(self.count)) if word in whole} - {self.word}
        if others:
            self.record.problems.append(f"visitor {self.number} got words of others: {others}")
        if kind == "voice" and SAID not in whole:
            self.record.problems.append(f"visitor {self.number} got a wrong transcript: {whole}")
        if len(history) != asked + 2 or not said(history):
            self.record.problems.append(f"visitor {self.number} got no answer: {whole[-300:]}")

    def compare(self, name: str, history: list) -> None:
        if history and said(history) != self.expected.setdefault(name, said(history)):
            self.record.problems.append(f"{name}: {said(history)!r} instead of {self.expected[name]!r}")


def own_word(number: int) -> str:
    """A word that no other visitor uses."""
    return f"zq{number:03d}x"


def is_skip(output: Any) -> bool:
    """Whether an endpoint skips this output."""
    return isinstance(output, dict) and output.get("__type__") == "update"


def said(history: list) -> str:
    """The last answer of a conversation."""
    content = history[-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


async def alone(site: Site, expected: dict[str, str]) -> None:
    """Records the answers about each picture without load."""
    record = Record()
    visitor = Visitor(0, 1, site, record, expected)
    visitor.leave_probability = 0
    for photo in PHOTOS:
        history = await visitor.ask(f"alone-{photo.name}", "picture", DESCRIBE, await site.show(photo), [])
        visitor.compare(photo.name, history)
        history = await visitor.ask(f"alone-{photo.name}", "follow-up", FOLLOW_UP, None, history)
        visitor.compare(f"{photo.name}, then", history)
    if record.problems:
        raise SystemExit(f"Problems without load: {record.problems}")


async def crowd(site: Site, count: int, seconds: float, expected: dict[str, str]) -> Record:
    record, until = Record(), time.monotonic() + seconds
    await asyncio.gather(*(Visitor(number, count, site, record, expected).stay(until) for number in range(count)))
    return record


async def first_word(site: Site, question: str, tokens: int = 16) -> float:
    """Seconds to the first word of an answer."""
    turn = {"role": "user", "content": [{"type": "text", "text": question}]}
    begun = time.monotonic()
    async with aclosing(
        site.call("reply", [[turn], None, 0, *settings(0, tokens)], f"light-{random.random()}")
    ) as calls:
        async for history, *_ in calls:
            if has_words(history):
                return time.monotonic() - begun
    raise SystemExit("no answer")


async def beside_long_ones(site: Site, long_ones: int) -> tuple[float, float]:
    """Seconds to the first word of a short question, alone and during long answers; medians of five."""
    single = median([await first_word(site, f"Is {number} more than two?") for number in range(5)])

    async def long(number: int) -> None:
        turn = {"role": "user", "content": [{"type": "text", "text": f"Tell me {number} long stories."}]}
        async for _ in site.call("reply", [[turn], None, 0, *settings(1, 1024)], f"long-{number}"):
            pass

    tasks = [asyncio.create_task(long(number)) for number in range(long_ones)]
    await asyncio.sleep(3)
    beside = median([await first_word(site, f"Is {number} more than three?") for number in range(5)])
    if any(task.done() for task in tasks):
        print("(a long answer ended before the short ones)")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return single, beside


async def measure(address: str, process: int, options: argparse.Namespace) -> dict:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as http:
        site, expected = Site(http, (await http.get("config")).json()), {}
        await alone(site, expected)
        single, beside = await beside_long_ones(site, 2)
        await crowd(site, options.clients, options.minutes * 6, expected)  # fills the caches
        await asyncio.sleep(COOLDOWN)
        before = process_memory(process, "VmRSS")
        record = await crowd(site, options.clients, options.minutes * 60, expected)
        await asyncio.sleep(COOLDOWN)
        after, peak = process_memory(process, "VmRSS"), process_memory(process, "VmHWM")
    return {
        "visitors": options.clients,
        "minutes": options.minutes,
        "outcomes": dict(record.kinds),
        "answers per visitor: min, max": [
            min(record.served[number] for number in range(options.clients)),
            max(record.served.values()),
        ],
        "seconds from the question to the first word: median, 95%, max": [
            round(median(record.waits), 1),
            round(quantiles([*record.waits, max(record.waits)], n=20, method="inclusive")[-1], 1),
            round(max(record.waits), 1),
        ],
        "seconds to the first word of a short question: alone, beside two long answers": [
            round(single, 2),
            round(beside, 2),
        ],
        "memory in GB: before, after, peak": [round(value / 1e9, 3) for value in (before, after, peak)],
        "problems": record.problems,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50, help="simultaneous visitors (default: 50)")
    parser.add_argument("--minutes", type=float, default=5, help="duration of the test (default: 5)")
    parser.add_argument("--out", help="a JSON file for the figures")
    options = parser.parse_args()
    with serving() as (page, address, *_):
        figures = asyncio.run(measure(address, page.pid, options))
        log = page.poll()
    if log is not None:
        figures["problems"].append(f"the app ended with {log}")
    for name, value in figures.items():
        print(f"{name}: {value}")
    if options.out:
        Path(options.out).write_text(json.dumps(figures, indent=2) + "\n")
    unserved = figures["answers per visitor: min, max"][0] == 0
    before, after, _ = figures["memory in GB: before, after, peak"]
    grown = after - before > CACHE_BUDGET["cpu"] / 1e9 + 0.1 * before  # idle conversations stay cached
    sys.exit("The load test failed." if figures["problems"] or unserved or grown else 0)


if __name__ == "__main__":
    main()
