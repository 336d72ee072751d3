"""The `mmchat` command; `python -m mmchat` does the same.

mmchat serve
mmchat ask "What is in this picture?" --image cat.jpg
mmchat batch questions.jsonl --out answers.jsonl
mmchat classes cat.jpg
mmchat space --out space/
mmchat doctor
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .conversation import Message, SamplingOptions
from .errors import BadInput, MmchatError
from .presets import AUTO, DEFAULT_PRESET, PRESETS, SMOL

# Rounds for which an OpenMP thread waits without yielding its core; read when PyTorch is imported. By default a thread
# spins so long that an answer takes ten times as long wherever another program wants the cores, too.
SPIN_COUNT = "1000"

if TYPE_CHECKING:  # torch takes seconds to import, and --help should not wait for it
    from .engine import LocalEngine


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    options = parse(arguments)
    logging.basicConfig(level=options.log_level, format="%(message)s")
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    try:
        status: int = options.run(options)
        return status
    except MmchatError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses the flags of every command. ``run`` is the function of the chosen command."""
    parser = argparse.ArgumentParser(
        prog="mmchat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"mmchat {__version__}")
    parser.set_defaults(log_level=logging.WARNING)
    commands = parser.add_subparsers(required=True, metavar="command")

    serve_command = commands.add_parser("serve", help="serve the page")
    _add_model_flags(serve_command)
    _add_speech_flag(serve_command)
    _add_page_flags(serve_command)
    serve_command.set_defaults(run=serve, log_level=logging.INFO)

    ask_command = commands.add_parser("ask", help="ask one question and stream the answer")
    ask_command.add_argument("question", nargs="?", default="", help="the question; or pass a recording with --audio")
    ask_command.add_argument("--image", action="append", default=[], help="a picture to ask about; may be repeated")
    ask_command.add_argument("--audio", help="a recording of the question")
    ask_command.add_argument("--language", help="of the recording, such as de or German (default: detect it)")
    ask_command.add_argument("--translate", action="store_true", help="translate the recording into English")
    ask_command.add_argument("--speak", metavar="WAV", help="also write the answer to this file, read aloud")
    _add_model_flags(ask_command)
    _add_speech_flag(ask_command)
    _add_sampling_flags(ask_command)
    ask_command.set_defaults(run=ask)

    batch_command = commands.add_parser("batch", help="answer a file of questions")
    batch_command.add_argument(
        "questions", type=Path, help='one question per line: {"image": path or null, "question": text}'
    )
    batch_command.add_argument(
        "--out", type=Path, required=True, help='the same lines with an "answer"; existing lines are kept'
    )
    _add_model_flags(batch_command)
    _add_sampling_flags(batch_command)
    batch_command.set_defaults(run=batch)

    classes_command = commands.add_parser("classes", help="name what the image encoder recognizes in pictures")
    classes_command.add_argument("images", nargs="+", help="pictures")
    classes_command.add_argument(
        "--names", metavar="FILE", help="choose among the names in this file, one per line (needs a preset with CLIP)"
    )
    _add_model_flags(classes_command)
    classes_command.set_defaults(run=classes)

    space_command = commands.add_parser("space", help="assemble the files of a Hugging Face Space")
    space_command.add_argument("--out", type=Path, required=True, help="the folder to write; it must be empty")
    space_command.add_argument(
        "--preset", choices=list(PRESETS), default=SMOL.name, help="what it answers with (default: smol)"
    )
    space_command.set_defaults(run=space)

    doctor_command = commands.add_parser("doctor", help="check this machine and say what to fix")
    doctor_command.set_defaults(run=doctor)

    options = parser.parse_args(arguments)
    if options.run is ask and options.question and options.audio:
        parser.error("pass either a question or --audio, not both")
    return options


def _add_model_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--preset",
        default=os.environ.get("MMCHAT_PRESET", DEFAULT_PRESET),
        help=f"which models to use: {', '.join([AUTO, *PRESETS])} (default: MMCHAT_PRESET, or {DEFAULT_PRESET})",
    )
    command.add_argument(
        "--weights",
        help="a weights folder that training or importing wrote, or a LLaVA model (default: the preset's own)",
    )
    command.add_argument(
        "--quantization",
        default=os.environ.get("MMCHAT_QUANTIZATION", "auto"),
        help="of the language model: auto, none, 8bit, 4bit or 4bit-double (default: MMCHAT_QUANTIZATION, or auto)",
    )


def _add_speech_flag(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--speech",
        default=os.environ.get("MMCHAT_SPEECH"),
        help="another Whisper model: tiny.en or base, which need no Hub, another size, a repository, a folder or a "
        ".pt file (default: MMCHAT_SPEECH, or the preset's own)",
    )


def _add_sampling_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--rewrite", action="store_true", help="let the base model, without its adapter, rewrite each answer"
    )
    command.add_argument("--temperature", type=float, help="0 always picks the likeliest token")
    command.add_argument("--beams", type=int, help="above 1: beam search (slower)")
    command.add_argument("--max-new-tokens", type=int, help="maximum length of an answer, in tokens")


def _add_page_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--server",
        default=os.environ.get("MMCHAT_SERVER"),
        help="a model server that speaks OpenAI's API, such as http://localhost:8000/v1, instead of a local model "
        "(default: MMCHAT_SERVER, or none)",
    )
    command.add_argument(
        "--rate-limit",
        default=os.environ.get("MMCHAT_RATE_LIMIT") or "0",
        help="questions per minute from one address; 0 for no limit (default: MMCHAT_RATE_LIMIT, or 0)",
    )
    command.add_argument("--api", action="store_true", help="also serve OpenAI's chat API under /v1 (or MMCHAT_API=1)")
    command.add_argument(
        "--metrics", action="store_true", help="also serve Prometheus' metrics under /metrics (or MMCHAT_METRICS=1)"
    )
    command.add_argument("--host", help="the address to listen on (default: this machine only)")
    command.add_argument("--port", type=int, help="the port to listen on (default: the first free one from 7860)")


def serve(options: argparse.Namespace) -> int:
    """Serves the page until it is stopped."""
    from .serving.serve import serve

    return serve(options)


def ask(options: argparse.Namespace) -> int:
    """Streams the answer to one question to stdout."""
    engine, sampling = _start(options)
    question = options.question
    if options.audio:
        question = _heard(engine, options)
    pieces = engine.reply([Message("user", question, options.image)], sampling)
    if options.rewrite:
        draft = "".join(pieces)
        print(f"Draft: {draft}", file=sys.stderr)
        pieces = engine.rewrite(question, draft, sampling)
    answer = ""
    for piece in pieces:
        answer += piece
        print(piece, end="", flush=True)
    print()
    if options.speak:
        from .models.text_to_speech import write_wav

        write_wav(options.speak, *engine.speak(answer))
    return 0


def _heard(engine: LocalEngine, options: argparse.Namespace) -> str:
    """Transcribes the recording of a question and prints what was heard."""
    heard = engine.transcribe(options.audio, options.language, "translate" if options.translate else "transcribe")
    print(f"> {heard.text}", file=sys.stderr)
    if not options.translate and engine.answers_in and heard.language not in engine.answers_in:
        name = engine.languages.get(heard.language, heard.language)
        print(f"The model that answers does not speak {name}: add --translate to ask it in English.", file=sys.stderr)
    return heard.text


def batch(options: argparse.Namespace) -> int:
    """Answers a file of questions in order. If interrupted, the next run resumes where it stopped."""
    from tqdm import tqdm

    from .serving.bulk import json_line

    lines = _read_lines(options.questions)
    done = _finished(options.out, lines)
    if done == len(lines):
        print(f"{options.out} already answers all {done} questions. Delete it to ask again.", file=sys.stderr)
        return 0
    try:
        sink = options.out.open("a", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{options.out} cannot be written.") from error
    engine, sampling = _start(options)
    failed = 0
    with sink:
        for line_number, line in tqdm(lines[done:], initial=done, total=len(lines), unit="question"):
            row = _answer_line(engine, sampling, line, options.rewrite)
            if row["answer"] is None:
                failed += 1
                tqdm.write(f"Line {line_number} skipped: {row['error']}", file=sys.stderr)
            sink.write(json_line(row))
            sink.flush()
    return 1 if failed == len(lines) else 0


def classes(options: argparse.Namespace) -> int:
    """Prints what the image encoder recognizes in each picture, likeliest first."""
    from .models.zero_shot import read_names

    names = read_names(options.names) if options.names else ()
    engine, _ = _start(options)
    for image in options.images:
        found = ", ".join(f"{tag.name} {tag.probability:.0%}" for tag in engine.classes(image, names))
        print(f"{image}: {found or 'nothing recognized'}")
    return 0


def space(options: argparse.Namespace) -> int:
    """Writes the folder of a Space, ready to push."""
    from .serving.space import assemble

    files = assemble(options.out, options.preset)
    size = sum((options.out / file).stat().st_size for file in files) / 1e6
    print(
        f"{len(files)} files, {size:.0f} MB in {options.out}. Create a Space with the SDK Gradio and push them there."
    )
    return 0


def doctor(_: argparse.Namespace) -> int:
    """Prints what it finds on this machine and how to fix what is wrong. Returns 1 if anything is."""
    from .serving.doctor import examine

    is_well = True
    for finding in examine():
        print(f"{finding.mark} {finding.name}: {finding.text}", flush=True)
        if finding.advice:
            is_well = False
            print(f"  → {finding.advice}", flush=True)
    return 0 if is_well else 1


def _start(options: argparse.Namespace) -> tuple[LocalEngine, SamplingOptions]:
    from .engine import load

    given = {name: getattr(options, name, None) for name in ("temperature", "beams", "max_new_tokens")}
    sampling = SamplingOptions(**{name: value for name, value in given.items() if value is not None})
    return load(options.preset, options.weights, options.quantization, getattr(options, "speech", None)), sampling


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """The non-blank lines of a file, with their line numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not a text file.") from error
    # str.splitlines would also split at characters that a JSON string may contain.
    return [(line_number, line) for line_number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _finished(path: Path, questions: list[tuple[int, str]]) -> int:
    """Number of questions already answered. Drops a last line that an interruption cut short.

    Raises:
        BadInput: the file answers other questions, or cannot be read.
    """
    if not path.exists():
        return 0
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from error
    whole = content[: content.rfind(b"\n") + 1]
    answers = [_entry(line) for line in whole.decode("utf-8", "replace").split("\n")[:-1]]
    asked = [_entry(line) for _, line in questions[: len(answers)]]
    if len(asked) < len(answers) or any(
        entry != {key: answer.get(key) for key in entry} for entry, answer in zip(asked, answers, strict=False)
    ):
        raise BadInput(f"{path} answers other questions. Name another file with --out, or remove it.")
    if len(whole) < len(content):
        path.write_bytes(whole)
    return len(answers)


def _answer_line(engine: LocalEngine, sampling: SamplingOptions, line: str, rewrite: bool) -> dict[str, Any]:
    """The row of a line: its answer, or an error."""
    from .serving.bulk import answer_questions, read_line, refused

    try:
        rows = answer_questions(engine, [read_line(line)], sampling, rewrite)
        return next(row for row in rows if isinstance(row, dict))  # nothing else waits in line here
    except BadInput as error:
        return {**_entry(line), **refused(error)}


def _entry(line: str) -> dict[str, Any]:
    """The JSON object on a line; ``{"line": line}`` if there is none."""
    try:
        entry = json.loads(line)
    except ValueError:
        entry = None
    return entry if isinstance(entry, dict) else {"line": line}


if __name__ == "__main__":
    sys.exit(main())
