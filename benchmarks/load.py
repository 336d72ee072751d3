#!/usr/bin/env python
"""A crowd at the page: many visitors at once, over HTTP, who type, speak, show pictures, and leave in mid-answer.

It serves the app, lets people ask for some minutes, and checks what must hold: nobody sees an error but a polite
"busy", everybody is served, no conversation holds a word or a picture of another, and the memory is what it was.
Answers are the likeliest ones, so each must be, to the letter, what it was before the crowd came.

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
from run import PHOTOS, ROOT, _status, serving

SPEECH, SAID = ROOT / "tests" / "data" / "jfk.flac", "your country"
DESCRIBE, FOLLOW_UP = "Describe the image.", "What color is it?"
LONGEST = 24  # tokens of an answer
LEAVING = 0.15  # the share of visitors who go in mid-answer
COOLING = 30  # seconds
BUSY = 503


class Busy(Exception):
    """The server said, politely, that it has no room now."""


@dataclass
class Record:
    """What happened."""

    served: Counter = field(default_factory=Counter)  # visitor -> answers
    kinds: Counter = field(default_factory=Counter)  # text, picture, follow-up, voice, left, busy
    waits: list[float] = field(default_factory=list)  # seconds from the question in the page to the first word
    problems: list[str] = field(default_factory=list)


class Site:
    """The page's endpoints, as a browser calls them."""

    def __init__(self, http: httpx.AsyncClient, config: dict):
        self.http = http
        self.numbers = {end["api_name"]: end["id"] for end in config["dependencies"] if end["backend_fn"]}

    async def upload(self, path: Path) -> dict:
        answer = await self.http.post("gradio_api/upload", files={"files": (path.name, path.read_bytes())})
        return {"path": answer.raise_for_status().json()[0], "meta": {"_type": "gradio.FileData"}}

    async def call(self, name: str, data: list, session: str) -> AsyncIterator[list]:
        """The outputs of an endpoint, each time they change; one that it leaves as it is stays what it was."""
        body = {"data": data, "fn_index": self.numbers[name], "session_hash": session}
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
                        raise RuntimeError(event["output"].get("error") or "an error without a word")
                    is_diff = sent and event["msg"] == "process_generating"
                    parts = event["output"]["data"]
                    sent = [apply_diff(*pair) for pair in zip(sent, parts, strict=True)] if is_diff else parts
                    shown = [old if is_skip(new) else new for old, new in zip(shown, sent, strict=False)]
                    yield shown
                    if event["msg"] == "process_completed":
                        return
                elif event["msg"] == "unexpected_error":
                    raise RuntimeError(event.get("message"))


class Visitor:
    """Somebody with a word of their own, who asks again and again."""

    def __init__(self, number: int, count: int, site: Site, record: Record, expected: dict[str, str]):
        self.number, self.count, self.site, self.record, self.expected = number, count, site, record, expected
        self.word = own_word(number)
        self.rng = random.Random(number)

    async def stay(self, until: float) -> None:
        while time.monotonic() < until:
            try:
                await self.visit()
            except Exception as error:  # everything that is no Busy is a finding
                self.record.problems.append(f"visitor {self.number}: {type(error).__name__}: {error}")
            await asyncio.sleep(self.rng.uniform(0.2, 2))

    async def visit(self) -> None:
        """One conversation: a question in words, about a picture or spoken, and perhaps one more."""
        session = f"{self.word}-{self.rng.random()}"
        kind = self.rng.choice(["text", "picture", "picture", "voice"])
        history: list = []
        if kind == "text":
            history = await self.ask(session, kind, f"My word is {self.word}. What is my word?", None, history)
        elif kind == "voice":
            history = await self.ask(session, kind, await self.site.upload(SPEECH), None, history)
        else:
            photo = self.rng.choice(PHOTOS)
            history = await self.ask(session, kind, DESCRIBE, await self.site.upload(photo), history)
            self.compare(photo.name, history)
            if history and self.rng.random() < 0.5:
                history = await self.ask(session, "follow-up", FOLLOW_UP, None, history)
                self.compare(f"{photo.name}, then", history)

    async def ask(self, session: str, kind: str, question: Any, picture: dict | None, history: list) -> list:
        """The conversation with the question and its answer; nothing if the visitor left before its end."""
        is_leaving = self.rng.random() < LEAVING
        add = "add_voice" if kind == "voice" else "add_text"
        _, _, asked_about, asked = await self.last(add, [question, picture, history, None], session)
        begun, first, after = time.monotonic(), None, []
        reply = self.patiently("reply", [asked_about, None, asked, 0, LONGEST, False], session)
        async with aclosing(reply):  # who leaves hangs up
            async for (after,) in reply:
                first = first or time.monotonic() - begun
                if is_leaving and len(after) > len(asked_about):
                    self.record.kinds["left"] += 1
                    return []
        self.record.waits.append(first or 0)
        self.record.kinds[kind] += 1
        self.record.served[self.number] += 1
        self.look_over(after, kind, len(asked_about))
        return after

    async def last(self, name: str, data: list, session: str) -> list:
        return [outputs async for outputs in self.patiently(name, data, session)][-1]

    async def patiently(self, name: str, data: list, session: str) -> AsyncIterator[list]:
        """As ``Site.call``, again and again while there is no room."""
        while True:
            try:
                async with aclosing(self.site.call(name, data, session)) as calls:
                    async for outputs in calls:
                        yield outputs
                return
            except Busy:
                self.record.kinds["busy"] += 1
                await asyncio.sleep(self.rng.uniform(0.5, 3))

    def look_over(self, history: list, kind: str, asked: int) -> None:
        """What must hold of every conversation."""
        whole = json.dumps(history)
        others = {word for word in (own_word(number) for number in range(self.count)) if word in whole} - {self.word}
        if others:
            self.record.problems.append(f"visitor {self.number} read words of others: {others}")
        if kind == "voice" and SAID not in whole:
            self.record.problems.append(f"visitor {self.number} was not heard: {whole}")
        if len(history) != asked + 1 or not said(history):
            self.record.problems.append(f"visitor {self.number} got no answer: {whole[-300:]}")

    def compare(self, name: str, history: list) -> None:
        if history and said(history) != self.expected.setdefault(name, said(history)):
            self.record.problems.append(f"{name}: {said(history)!r} in place of {self.expected[name]!r}")


def own_word(number: int) -> str:
    """A word that nobody else says."""
    return f"zq{number:03d}x"


def is_skip(output: Any) -> bool:
    """Whether an endpoint leaves this output as it is."""
    return isinstance(output, dict) and output.get("__type__") == "update"


def said(history: list) -> str:
    """The last answer of a conversation."""
    content = history[-1]["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


async def alone(site: Site, expected: dict[str, str]) -> None:
    """What is answered about each picture when nobody else is there."""
    record = Record()
    visitor = Visitor(0, 1, site, record, expected)
    visitor.rng.random = lambda: 1.0  # stays to the end
    for photo in PHOTOS:
        history = await visitor.ask(f"alone-{photo.name}", "picture", DESCRIBE, await site.upload(photo), [])
        visitor.compare(photo.name, history)
        history = await visitor.ask(f"alone-{photo.name}", "follow-up", FOLLOW_UP, None, history)
        visitor.compare(f"{photo.name}, then", history)
    if record.problems:
        raise SystemExit(f"Even alone: {record.problems}")


async def crowd(site: Site, count: int, seconds: float, expected: dict[str, str]) -> Record:
    record, until = Record(), time.monotonic() + seconds
    await asyncio.gather(*(Visitor(number, count, site, record, expected).stay(until) for number in range(count)))
    return record


async def first_word(site: Site, question: str, tokens: int = 16) -> float:
    """Seconds until an answer begins."""
    turn = {"role": "user", "content": [{"type": "text", "text": question}]}
    begun = time.monotonic()
    async with aclosing(site.call("reply", [[turn], None, 0, 0, tokens, False], f"light-{random.random()}")) as calls:
        async for _ in calls:
            return time.monotonic() - begun
    raise SystemExit("no answer")


async def beside_long_ones(site: Site, long_ones: int) -> tuple[float, float]:
    """Seconds to the first word of a light question: alone, and while long answers are written; medians of five."""
    single = median([await first_word(site, f"Is {number} more than two?") for number in range(5)])

    async def long(number: int) -> None:
        turn = {"role": "user", "content": [{"type": "text", "text": f"Tell me {number} long stories."}]}
        async for _ in site.call("reply", [[turn], None, 0, 1, 1024, False], f"long-{number}"):
            pass

    tasks = [asyncio.create_task(long(number)) for number in range(long_ones)]
    await asyncio.sleep(3)
    beside = median([await first_word(site, f"Is {number} more than three?") for number in range(5)])
    if any(task.done() for task in tasks):
        print("(a long answer was over before the light ones)")
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
        await crowd(site, options.clients, options.minutes * 6, expected)  # so that caches are as full as they get
        await asyncio.sleep(COOLING)
        before = _status(process, "VmRSS")
        record = await crowd(site, options.clients, options.minutes * 60, expected)
        await asyncio.sleep(COOLING)
        after, peak = _status(process, "VmRSS"), _status(process, "VmHWM")
    return {
        "visitors": options.clients,
        "minutes": options.minutes,
        "what happened": dict(record.kinds),
        "answers to the visitor served least, most": [
            min(record.served[number] for number in range(options.clients)),
            max(record.served.values()),
        ],
        "seconds from the question in the page to the first word: median, 95%, longest": [
            round(median(record.waits), 1),
            round(quantiles([*record.waits, max(record.waits)], n=20, method="inclusive")[-1], 1),
            round(max(record.waits), 1),
        ],
        "seconds to the first word of a light question: alone, beside two long answers": [
            round(single, 2),
            round(beside, 2),
        ],
        "memory in GB: before, after, peak": [round(value / 1e9, 3) for value in (before, after, peak)],
        "memory after, against before": round(after / before, 3),
        "problems": record.problems,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50, help="visitors at the same time (default: 50)")
    parser.add_argument("--minutes", type=float, default=5, help="for how long they come (default: 5)")
    parser.add_argument("--out", help="a JSON file for the figures")
    options = parser.parse_args()
    with serving() as (page, address, _):
        figures = asyncio.run(measure(address, page.pid, options))
        log = page.poll()
    if log is not None:
        figures["problems"].append(f"the app ended with {log}")
    for name, value in figures.items():
        print(f"{name}: {value}")
    if options.out:
        Path(options.out).write_text(json.dumps(figures, indent=2) + "\n")
    unserved = figures["answers to the visitor served least, most"][0] == 0
    grown = figures["memory after, against before"] > 1.1
    sys.exit("This must not be." if figures["problems"] or unserved or grown else 0)


if __name__ == "__main__":
    main()
