#!/usr/bin/env python
"""Times the opening of the page in Chromium: until the question box can be typed into, with files and bytes.

Without models. Give another checkout, such as a git worktree of an earlier commit, to compare with; the two take turns.
Needs playwright and Chromium.

python benchmarks/page.py
python benchmarks/page.py --against ../earlier --visits 20
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SERVER = """
from pathlib import Path
import mmchat
from mmchat.serving import page

class Engine:
    about = "A stand-in."

    def reply(self, *_, **__):
        yield "Yes."

demo = page.build(Engine(), Path(mmchat.__file__).parent.parent / "examples")
page.launch(demo, prevent_thread_lock=True, quiet=True)
print(demo.local_url, flush=True)
demo.block_thread()
"""
WATCH = """performance.setResourceTimingBufferSize(1000);
const isUsable = box => box.checkVisibility() && !box.disabled && !box.readOnly && box.clientWidth > 50;
const look = () => {
    if ([...document.querySelectorAll('textarea')].some(isUsable)) window.usable = performance.now();
    else requestAnimationFrame(look);
};
look();"""
FIGURES = """() => {
    const files = performance.getEntries().filter(entry => ['navigation', 'resource'].includes(entry.entryType));
    return [window.usable, files.length, files.reduce((sum, file) => sum + file.encodedBodySize, 0)];
}"""
SETTLED = 1000  # milliseconds after which nothing more is fetched


@contextmanager
def serving(folder: Path):
    """Address of the page of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with tempfile.TemporaryDirectory() as outside:
        command = [sys.executable, "-c", SERVER]
        server = subprocess.Popen(command, env=environment, cwd=outside, stdout=subprocess.PIPE, text=True)
        try:
            yield server.stdout.readline().strip()  # type: ignore[union-attr]
        finally:
            server.terminate()
            server.wait()


def visit(context, address: str) -> list[float]:
    """Milliseconds until the question box is usable, files, and bytes of one visit."""
    page = context.new_page()
    page.add_init_script(WATCH)
    page.goto(address, wait_until="commit")
    page.wait_for_function("window.usable", polling=50)
    page.wait_for_timeout(SETTLED)
    figures = page.evaluate(FIGURES)
    page.close()
    return figures


def main() -> None:
    from playwright.sync_api import sync_playwright

    from tests.browsing import FLAGS, find_chromium

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="a checkout to compare with")
    parser.add_argument("--visits", type=int, default=15, help="first visits to each (default: 15)")
    options = parser.parse_args()
    folders = [ROOT, *([options.against.resolve()] if options.against else [])]
    seen: dict[tuple[Path, str], list[list[float]]] = {}
    with ExitStack() as stack:
        addresses = {folder: stack.enter_context(serving(folder)) for folder in folders}
        playwright = stack.enter_context(sync_playwright())
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        for number in range(-1, options.visits):  # the first visit warms the server up
            for folder in folders if number % 2 else folders[::-1]:
                context = browser.new_context()
                for kind in ("first visit", "second visit"):
                    figures = visit(context, addresses[folder])
                    if number >= 0:
                        seen.setdefault((folder, kind), []).append(figures)
                context.close()
        browser.close()
    for (folder, kind), visits in seen.items():
        milliseconds, files, size = (median(values) for values in zip(*visits, strict=True))
        print(f"{folder.name}, {kind}: {milliseconds / 1000:.2f} s, {files:.0f} files, {size / 1000:.0f} kB")
    for kind in ("first visit", "second visit") if options.against else ():
        pairs = zip(seen[ROOT, kind], seen[folders[1], kind], strict=True)
        print(f"{kind}: {median(ours[0] / theirs[0] for ours, theirs in pairs):.2f} times as long")


if __name__ == "__main__":
    main()
