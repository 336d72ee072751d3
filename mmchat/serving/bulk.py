"""Many questions: reads pictures, ZIPs and lines, answers one by one, writes CSV and JSON lines.

The page "Batch" and the command `mmchat batch` differ only in where the questions come from.
"""

from __future__ import annotations

import csv
import io
import json
import stat
import zipfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO

from ..conversation import Engine, Message, SamplingOptions
from ..errors import BadInput
from ..media import open_image
from .request_queue import Waiting

MAX_PICTURES = 200
MAX_MEMBER, MAX_TOTAL = 20 << 20, 500 << 20  # bytes, unpacked: of one file in a ZIP, and of all
MAX_DIRECTORY = 1 << 20  # bytes, of a ZIP
MAX_RATIO = 50  # unpacked to packed size; pictures are compressed already
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
IGNORED = ("__MACOSX/", ".DS_Store", "Thumbs.db")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # a spreadsheet would compute a cell that begins so


@dataclass(frozen=True)
class Picture:
    """A picture of a batch, read when its turn comes."""

    name: str
    path: Path
    member: str | None = None  # its name inside the ZIP at ``path``

    def open(self) -> Any:
        """Decodes it.

        Raises:
            BadInput: it is damaged, too large, or no picture.
        """
        if self.member is None:
            return open_image(self.path)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as source:
                return open_image(_limited(source))
        except (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
            raise BadInput("This file of the ZIP is damaged.") from error


def list_pictures(files: Sequence[str | Path], names: Sequence[str] = ()) -> list[Picture]:
    """The pictures among files and in ZIPs, in order. Nothing is unpacked to disk.

    Args:
        names: what to call the files; their own names if empty.

    Raises:
        BadInput: there are none or too many, or a ZIP is damaged or looks like an attack.
    """
    pictures: list[Picture] = []
    for index, file in enumerate(map(Path, files)):
        name = names[index] if names else file.name
        if is_zip(file) or (file.suffix.lower() not in SUFFIXES and zipfile.is_zipfile(file)):
            pictures += _members(file, name)
        else:
            pictures.append(Picture(name, file))
        if len(pictures) > MAX_PICTURES:
            raise BadInput(f"Please send at most {MAX_PICTURES} pictures at a time.")
    if not pictures:
        raise BadInput("There are no pictures in what you sent.")
    return pictures


def is_zip(file: str | Path) -> bool:
    """Whether a file's name is that of a ZIP."""
    return Path(file).suffix.lower() == ".zip"


class _Directory(io.FileIO):
    """A ZIP whose directory alone is read; zipfile builds an object for each entry, so no large one is read."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size and size > MAX_DIRECTORY:
            raise zipfile.LargeZipFile
        return super().read(size)


def _members(path: Path, name: str) -> list[Picture]:
    """The pictures in a ZIP, after a look at its directory."""
    too_many = f"'{name}' holds too many files. Please send at most {MAX_PICTURES} pictures at a time."
    try:
        with _Directory(path) as source, zipfile.ZipFile(source) as archive:
            members = archive.infolist()
    except zipfile.LargeZipFile as error:
        raise BadInput(too_many) from error
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise BadInput(f"'{name}' is not a ZIP file that I can read.") from error
    if len(members) > 5 * MAX_PICTURES:
        raise BadInput(too_many)
    members = [each for each in members if not each.is_dir() and not _is_ignored(each.filename)]
    for member in members:
        _check(member, name)
    if sum(member.file_size for member in members) > MAX_TOTAL:
        raise BadInput(f"'{name}' unpacks to more than {MAX_TOTAL >> 20} MB. Please send fewer pictures at a time.")
    return [Picture(member.filename, path, member.filename) for member in members]


def _is_ignored(filename: str) -> bool:
    return filename.startswith(IGNORED[0]) or PurePosixPath(filename).name in IGNORED


def _check(member: zipfile.ZipInfo, name: str) -> None:
    """Refuses a ZIP for a member that no honest one has."""
    filename = member.orig_filename
    parts = PurePosixPath(filename).parts
    odd = filename.startswith("/") or ".." in parts or "\\" in filename or ":" in filename or len(filename) > 200
    if odd or not filename.isprintable():
        raise BadInput(f"'{name}' holds a file with an odd name, so I do not open it.")
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
        raise BadInput(f"'{name}' holds a link or a special file, so I do not open it.")
    if member.flag_bits & 1:
        raise BadInput(f"'{name}' is encrypted. Please send it without a password.")
    if filename.lower().endswith((".zip", ".gz", ".7z", ".rar", ".tar")):
        raise BadInput(f"'{name}' holds another archive. Please send the pictures themselves.")
    if member.file_size > MAX_MEMBER or member.file_size > MAX_RATIO * max(member.compress_size, 20_000):
        raise BadInput(f"'{name}' holds a file that is too large unpacked, so I do not open it.")
    if not filename.lower().endswith(SUFFIXES):
        raise BadInput(f"'{name}' holds a file that is no picture: {filename[-60:]}.")


def _limited(source: IO[bytes]) -> BinaryIO:
    """The content of a member; the size in a ZIP's directory may be a lie."""
    content = source.read(MAX_MEMBER + 1)
    if len(content) > MAX_MEMBER:
        raise BadInput("This file of the ZIP is too large unpacked.")
    return io.BytesIO(content)


@dataclass(frozen=True)
class Question:
    """A question of a batch, about a picture or none."""

    text: str
    picture: Picture | None
    entry: dict[str, Any]  # what its row begins with


def about_each(pictures: Iterable[Picture], text: str) -> Iterator[Question]:
    """The same question about each picture."""
    return (Question(text, picture, {"image": picture.name, "question": text}) for picture in pictures)


def read_line(line: str) -> Question:
    """A line of a file of questions: ``{"image": path or null, "question": text}``, and whatever the row is to repeat.

    Raises:
        BadInput: the line is not of this form.
    """
    try:
        entry = json.loads(line)
        image, text = entry.get("image"), entry["question"]
    except (ValueError, AttributeError, KeyError) as error:
        raise BadInput('it is not of the form {"image": path or null, "question": text}.') from error
    if not isinstance(text, str) or not isinstance(image, (str, type(None))):
        raise BadInput('"question" must be text, and "image" a path or null.')
    return Question(text, Picture(image, Path(image)) if image else None, entry)


def answer_questions(
    engine: Engine, questions: Iterable[Question], options: SamplingOptions | None = None, rewrite: bool = False
) -> Iterator[dict[str, Any] | Waiting]:
    """Answers questions in order, for the page and the command: each question's entry with ``"answer"``.

    A rewritten answer stands after its ``"draft"``. While a question waits in line at a ``QueuedEngine``, it yields
    ``Waiting``. A question that cannot be answered gets ``"answer": None`` and an ``"error"``. Closing the iterator
    stops the work; results already yielded stand.
    """
    for question in questions:
        row = dict(question.entry)
        try:
            pictures = [question.picture.open()] if question.picture else []
            row["answer"] = yield from _joined(engine.reply([Message("user", question.text, pictures)], options))
            if rewrite:
                row["draft"] = row.pop("answer")
                row["answer"] = yield from _joined(engine.rewrite(question.text, row["draft"], options))
            yield row
        except BadInput as error:
            yield {**question.entry, **refused(error)}


def refused(error: BadInput) -> dict[str, Any]:
    """What a row says in place of an answer."""
    return {"answer": None, "error": str(error)}


def _joined(pieces: Iterator[str]) -> Generator[Waiting, None, str]:
    """Passes on what waits in line, and returns the whole text."""
    text = ""
    with closing(pieces):  # type: ignore[type-var]
        for piece in pieces:
            if isinstance(piece, Waiting):
                yield piece
            text += piece
    return text


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes answers for a spreadsheet; no cell is a formula."""
    with path.open("w", encoding="utf-8-sig", newline="", errors="replace") as sink:
        writer = csv.writer(sink)
        columns = ("image", "question", "answer", "error")
        writer.writerow(columns)
        writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)


def _cell(value: str | None) -> str:
    text = value or ""
    return f"'{text}" if text.lstrip(" ").startswith(FORMULA) else text


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes answers as JSON lines."""
    with path.open("w", encoding="utf-8", errors="replace") as sink:
        sink.writelines(map(json_line, rows))


def json_line(row: dict[str, Any]) -> str:
    """A row as a line of JSON."""
    return json.dumps(row, ensure_ascii=False) + "\n"
