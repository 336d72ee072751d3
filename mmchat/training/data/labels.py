"""Reads labeled pictures: class folders, COCO, Pascal VOC, a JSON list, and DAQUAR's questions."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

from ...errors import BadInput
from .captions import read_splits

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}
MANY = "many"  # an uncounted crowd


@dataclass(frozen=True)
class Box:
    """A named bounding box, in pixels from the upper left corner."""

    name: str
    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        return max(self.right - self.left, 0) * max(self.bottom - self.top, 0)


@dataclass(frozen=True)
class Labeled:
    """A picture and its labels. At least one of the fields after ``group`` is set."""

    image: str
    group: str = ""  # pictures labeled together: the kinds of any picture were annotated in all of them
    objects: dict[str, int | None] | None = None  # name → count, None for a crowd; complete for the group's kinds
    boxes: tuple[Box, ...] = ()
    label: str = ""  # the thing that the photo was collected for; it may show others, too
    synset: str = ""  # the label's WordNet 3.0 synset, such as n01440764
    fine: str = ""  # the label's variety
    scene: str = ""
    questions: tuple[tuple[str, str], ...] = ()  # question and answer, written by people


def read_labels(path: str | Path, kind: str | None = None) -> list[Labeled]:
    """Reads the labeled pictures of a file or folder.

    Args:
        kind: a key of FORMATS; None detects the format.

    Raises:
        BadInput: the file is unreadable or an entry is malformed; the message names the file and the entry.
    """
    path = Path(path)
    if not path.exists():
        raise BadInput(f"{path} does not exist.")
    kind = kind or _format_of(path)
    pictures = FORMATS[kind](path)
    if not pictures:
        raise BadInput(f"{path} holds no labeled pictures in the format '{kind}'.")
    return pictures


def of_split(pictures: Sequence[Labeled], splits: str | Path | None, split: str | None) -> list[Labeled]:
    """The pictures of one split of a JSON file, split name → file names.

    Raises:
        BadInput: the file is unreadable, or has no such split, or the split has no labeled picture.
    """
    if not split:
        return list(pictures)
    if not splits:
        raise BadInput("Labels have no splits of their own: name a file of splits with --splits, or omit --split.")
    named = read_splits(splits)
    if split not in named:
        raise BadInput(f"{splits} has no split '{split}', only {', '.join(named)}.")
    wanted = set(named[split])
    found = [picture for picture in pictures if picture.image in wanted]
    if not found:
        raise BadInput(f"None of the labeled pictures is in the split '{split}' of {splits}.")
    return found


def in_folder(pictures: Sequence[Labeled], folder: str) -> list[Labeled]:
    """The pictures with their names prefixed by a folder."""
    folder = folder.strip("/")
    return [replace(picture, image=f"{folder}/{picture.image}") if folder else picture for picture in pictures]


def _format_of(path: Path) -> str:
    if path.is_dir():
        return "voc" if next(path.glob("*.xml"), None) else "folders"
    content = _json_of(path)
    if isinstance(content, dict) and "annotations" in content:
        return "coco"
    first = content[0] if isinstance(content, list) and content else None
    if isinstance(first, dict) and "image" in first:
        return "daquar" if "question" in first else "list"
    raise BadInput(
        f"{path.name} is in no known label format; use COCO instances, a JSON list of pictures with objects, a label "
        "or a scene, or a JSON list of pictures with questions and answers."
    )


def _json_of(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path.name} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadInput(f"{path.name}{line}: this is not JSON ({error}).") from error


def _entries(path: Path, content: Any, read: Callable[[dict], Any]) -> Iterator[Any]:
    """Converts each entry of a list; BadInput names the first malformed one."""
    if not isinstance(content, list):
        raise BadInput(f"{path.name} has no list of entries.")
    for number, entry in enumerate(content, start=1):
        try:
            yield read(entry)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadInput(f"{path.name}, entry {number} is malformed ({error!r}).") from error


def _text(entry: dict, name: str, default: str | None = None) -> str:
    value = entry[name] if default is None else entry.get(name, default)
    if not isinstance(value, str) or (default is None and not value.strip()):
        raise ValueError(f'"{name}" must be a text')
    return value.strip()


def _count(value: Any) -> int | None:
    if value == MANY:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f'a count must be a whole number from 1, or "{MANY}", not {value!r}')
    return value


def _from_list(path: Path) -> list[Labeled]:
    def read(entry: dict) -> Labeled:
        objects = entry.get("objects")
        image = _text(entry, "image")
        found = Labeled(
            image,
            group=PurePosixPath(image).parts[0] if "/" in image else "",
            objects=None if objects is None else {str(name): _count(count) for name, count in objects.items()},
            **{name: _text(entry, name, "") for name in ("label", "synset", "fine", "scene")},
        )
        if found.objects is None and not found.label and not found.scene:
            raise ValueError('an entry needs "objects", "label" or "scene"')
        return found

    return list(_entries(path, _json_of(path), read))


def _from_folders(path: Path) -> list[Labeled]:
    """``cat/1.jpg`` is labeled "cat", ``polar_bear/1.jpg`` "polar bear"."""
    files = (file for file in path.glob("*/**/*") if file.suffix.lower() in PICTURES)
    names = sorted(file.relative_to(path).as_posix() for file in files)
    return [Labeled(name, label=re.sub(r"[_\s]+", " ", name.split("/")[0]).strip()) for name in names]


def _from_coco(path: Path) -> list[Labeled]:
    content = _json_of(path)
    if not isinstance(content, dict):
        raise BadInput(f"{path.name} is not COCO JSON: it has no lists of images, annotations and categories.")
    lists = {name: content.get(name) for name in ("categories", "images", "annotations")}
    names = dict(_entries(path, lists["categories"], lambda entry: (entry["id"], _text(entry, "name"))))
    boxes: dict[Any, list[Box]] = {}
    images = dict(_entries(path, lists["images"], lambda entry: (entry["id"], _text(entry, "file_name"))))
    crowds = set()

    def read(entry: dict) -> None:
        left, top, width, height = map(float, entry["bbox"])
        image, name = entry["image_id"], names[entry["category_id"]]
        boxes.setdefault(image, []).append(Box(name, left, top, left + width, top + height))
        if entry.get("iscrowd"):
            crowds.add((image, name))

    list(_entries(path, lists["annotations"], read))
    return [
        _boxed(file, boxes.get(image, ()), {name for crowded, name in crowds if crowded == image})
        for image, file in images.items()
    ]


def _from_voc(path: Path) -> list[Labeled]:
    return [_voc_picture(file) for file in sorted(path.glob("*.xml"))]


def _voc_picture(file: Path) -> Labeled:
    try:
        root = ElementTree.parse(file).getroot()
        boxes = [
            Box(
                _voc_text(thing, "name"),
                *(float(_voc_text(thing, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")),
            )
            for thing in root.iter("object")
        ]
        return _boxed(_voc_text(root, "filename"), boxes)
    except ElementTree.ParseError as error:
        raise BadInput(f"{file.name}, line {error.position[0]}: this is not XML ({error}).") from error
    except (OSError, ValueError) as error:
        raise BadInput(f"{file.name} is not Pascal VOC XML: {error}.") from error


def _voc_text(element: ElementTree.Element, name: str) -> str:
    text = (element.findtext(name) or "").strip()
    if not text:
        raise ValueError(f"<{name}> is missing in <{element.tag}>")
    return text


def _boxed(image: str, boxes: Sequence[Box], crowds: set[str] = frozenset()) -> Labeled:
    counts = Counter(box.name for box in boxes)
    objects = {name: None if name in crowds else count for name, count in counts.items()}
    return Labeled(image, objects=objects, boxes=tuple(boxes))


def _from_daquar(path: Path) -> list[Labeled]:
    def read(entry: dict) -> tuple[str, tuple[str, str]]:
        return _text(entry, "image"), (_text(entry, "question"), _text(entry, "answer"))

    asked: dict[str, list[tuple[str, str]]] = {}
    for image, question in _entries(path, _json_of(path), read):
        asked.setdefault(image, []).append(question)
    return [Labeled(image, questions=tuple(questions)) for image, questions in asked.items()]


FORMATS: dict[str, Callable[[Path], list[Labeled]]] = {
    "list": _from_list,
    "folders": _from_folders,
    "coco": _from_coco,
    "voc": _from_voc,
    "daquar": _from_daquar,
}
