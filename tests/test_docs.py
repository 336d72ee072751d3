"""README and docs: commands parse, and a test runs them or they say untested; links and the tree are right."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mmchat.__main__ import parse
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.append(ROOT / "weights" / "smol" / "README.md")
# Beginnings of commands → the test or workflow that runs them, and what of the command stands there.
RUN_IN = {
    "make check": ("../.github/workflows/check.yml", "run: make check"),
    "make run": ("test_hub.py", '"app.py"]'),  # the rest of it, the installation, is that of `make test`, too
    "make test": ("../.github/workflows/test.yml", "run: make test"),
    "pip download --no-deps": ("test_assets.py", "wheels"),  # through mmchat, which calls pip like this
    "transformers serve": ("test_remote.py", '"serve"'),
    "mmchat ask": ("test_terminal.py", 'run("ask"'),
    "mmchat batch": ("test_terminal.py", 'run("batch"'),
    "mmchat classes": ("test_terminal.py", 'run("classes"'),
    "mmchat doctor": ("test_doctor.py", 'main(["doctor"])'),
    "mmchat serve": ("test_terminal.py", '"mmchat", "serve"'),
    "mmchat space": ("test_space.py", 'main(["space"'),
    "python training_scripts/average_weights.py": ("test_trainer.py", "average_weights.py"),
    "python training_scripts/embed_images.py": ("test_scripts.py", "embed_images.py"),
    "python training_scripts/evaluate.py": ("test_evaluation.py", "evaluate.py"),
    "python training_scripts/export_gguf.py": ("test_gguf_export.py", "export_gguf.py"),
    "python training_scripts/export_llava.py": ("test_llava.py", "export_llava.py"),
    "python training_scripts/finetune_qlora.py --start-from weights/smol --train feedback/": (
        "test_browser_feedback.py",
        '"feedback/conversations.json"',
    ),
    "python training_scripts/finetune_qlora.py": ("test_scripts.py", "finetune_qlora.py"),
    "python training_scripts/import_checkpoint.py": ("test_importing.py", "import_checkpoint.py"),
    "python training_scripts/prepare_data.py captions": ("test_scripts.py", "prepare_data.py {options}"),
    "python training_scripts/prepare_data.py labels": ("test_labels.py", "prepare_data.py labels"),
    "python training_scripts/prepare_data.py split": ("test_scripts.py", "prepare_data.py split"),
    "python training_scripts/pretrain_projector.py": ("test_scripts.py", "pretrain_projector.py"),
}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> Iterator[tuple[list[str], str]]:
    """Every command of a page in words, its variables filled in, and its comment."""
    for block in blocks(page, "sh"):
        variables: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            code, _, comment = line.partition(" #")
            for command in code.split("&&"):
                command = re.sub(r"\$(\w+)", lambda name: variables[name[1]], command)  # noqa: B023
                words = shlex.split(command)
                while words and re.match(r"\w+=", words[0]):
                    name, _, value = words.pop(0).partition("=")
                    variables[name] = value
                if words:
                    yield words, comment


ALL = [(page.name, words, comment) for page in PAGES for words, comment in commands(page)]


@pytest.mark.parametrize(("page", "words", "comment"), ALL, ids=[" ".join(words)[:60] for _, words, _ in ALL])
def test_every_command_is_understood_or_named_as_untested(page, words, comment, monkeypatch):
    text = " ".join(words)
    for word in words:
        if word.startswith(("examples/", "weights/", "training_scripts/", "benchmarks/")):
            assert (ROOT / word).exists(), f"{page}: {word} is not there"
    if words[0] == "make":
        check_make(*words[1:])
    elif words[0] == "mmchat":
        parse(words[1:])
    elif scripts := [index for index, word in enumerate(words) if word.startswith("training_scripts/")]:
        check_script(words[scripts[0] :], monkeypatch)
    if "untested" in comment:
        return
    covered = [covering for start, covering in RUN_IN.items() if text.startswith(start)]
    assert covered, f"{page}: no test runs '{text}': write one, or end the line with '# untested'"
    test, needle = covered[0]
    assert needle in (ROOT / "tests" / test).read_text(encoding="utf-8")


def check_make(target: str, *options: str) -> None:
    known = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    assert target in known
    if target == "run" and options:
        parse(["serve", *shlex.split(options[0].removeprefix("OPTIONS="))])


def test_the_steps_of_the_demo_parse(monkeypatch):
    dry = subprocess.run(["make", "-n", "train-demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    steps = [shlex.split(line)[1:] for line in dry.replace("\\\n", " ").splitlines() if "training_scripts/" in line]
    assert len(steps) == 6
    monkeypatch.chdir(ROOT)
    for words in steps:
        with monkeypatch.context() as patched:
            check_script(words, patched)


def check_script(words: list[str], monkeypatch) -> None:
    """The script's own parser takes these flags; nothing runs after it."""

    class Parsed(Exception):
        pass

    def parse_only(parser, *arguments, **options):
        parse_args(parser, *arguments, **options)
        raise Parsed

    parse_args = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [words[0], *words[1:]])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def test_the_readme_prints_what_it_says(engine, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("mmchat.engine.load", lambda preset: engine)
    (code,) = blocks(ROOT / "README.md", "python")
    exec(compile(code, "README.md", "exec"), {})
    printed = (ROOT / "README.md").read_text(encoding="utf-8").split("It prints:\n\n```text\n")[1].split("```")[0]
    assert capsys.readouterr().out.strip() == printed.strip()


def test_the_page_answers_programs_as_documented(address, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = [code for code in blocks(ROOT / "docs" / "deploying.md", "python") if "gradio_client" in code]
    exec(compile(code.replace("http://127.0.0.1:7860", address), "deploying.md", "exec"), {})
    assert capsys.readouterr().out.strip().splitlines()[-1]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        linked = page.parent / target if target else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_tree_of_the_readme_is_the_tree():
    tree = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("## Repository layout\n\n```text\n")[1].split("```")[0]
    )
    names = re.findall(r"^( {0,2})([\w./]+) ", tree, re.MULTILINE)
    missing = [name for indent, name in names if not (ROOT / ("mmchat" if indent else "") / name).exists()]
    assert len(names) > 15 and not missing
    shown = {name.strip("/") for _, name in names}
    assert not [
        path.name for path in (ROOT / "mmchat").iterdir() if (path / "__init__.py").is_file() and path.name not in shown
    ]


def test_modules_that_the_docs_name_exist():
    known = [str(path) for folder in ("mmchat", "training_scripts", "tests") for path in (ROOT / folder).rglob("*.py")]
    for page in PAGES:
        for name in re.findall(r"`([\w/]+\.py)`", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists() or any(path.endswith(f"/{name}") for path in known), f"{page.name}: {name}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_constraints_pin_everything_that_is_installed():
    def plain(name: str) -> str:
        return re.match(r"[\w.-]+", name)[0].lower().replace("_", "-")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if line]
    wanted += [name for extra in project["optional-dependencies"].values() for name in extra]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {plain(line) for line in lines if "==" in line}
    assert {plain(name) for name in wanted} - {"mmchat"} <= pinned
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    assert {pin for hook in hooks for pin in hook.get("additional_dependencies", [])} <= set(lines)


def test_the_workflows_run_the_documented_commands():
    runs = []
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        runs += [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    packages = "sudo apt-get install"
    assert sorted(run for run in runs if not run.startswith(packages)) == ["make check", "make test"]
