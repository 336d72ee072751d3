"""Markdown → the sentences that a person reading it aloud would say."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

MAX_SENTENCE = 300  # characters; a longer sentence is spoken in clauses, so its sound does not come all at once
ABBREVIATIONS = {"e.g.": "for example", "i.e.": "that is", "vs.": "versus", "w/": "with", "w/o": "without"}
SIGNS = {
    "→": " to ",
    "⇒": " so ",
    "×": " times ",
    "÷": " divided by ",
    "≈": " about ",
    "≠": " is not equal to ",
    "≤": " is at most ",
    "≥": " is at least ",
    "π": " pi ",
    "²": " squared",
    "³": " cubed",
    "•": " ",
    "|": " ",
    "~": " ",
    "*": " ",
    "`": " ",
    "“": '"',
    "”": '"',
}
NO_STOP = r"\b(?:\.(?!\s*$|\s+[A-Z]))?"  # an abbreviation's dot, unless it ends the sentence, too
READINGS = [
    (re.compile(pattern), said)
    for pattern, said in (
        (rf"\betc{NO_STOP}", "et cetera"),
        (rf"(?<![\d.,])([1½¼¾]) tbsp{NO_STOP}", r"\1 tablespoon"),
        (rf"(?<![\d.,])([1½¼¾]) tsp{NO_STOP}", r"\1 teaspoon"),
        (rf"\btbsp{NO_STOP}", "tablespoons"),
        (rf"\btsp{NO_STOP}", "teaspoons"),
        (r"\s&\s", " and "),
        (r"(?<=\d)M\b", " million"),
        (r"(?<=\.\d)B\b", " billion"),  # not in "Room 12B"
        (r"(?<=\d:\d\d)\s?[-–]\s?(?=\d)", " to "),
        (r"(?<=\d) ?\+ ?(?=\d)", " plus "),
        (r"(?<=\d) ?− ?(?=\d)", " minus "),
        (r"(?<![^\s(])[-−](?=\d)", "minus "),
        (r"(?<=\d)\s*\*\s*(?=\d)", " times "),
    )
]
SUM = re.compile(r"\d\s*[=+×÷*]")  # beside these, a dash between numbers is a minus; elsewhere it means "to"
URL = re.compile(r"(?:https?://|www\.)[^\s<>()\"']+[^\s<>()\"'.,;:!?]")
MAIL = re.compile(r"\b([\w.+-]+)@((?:[\w-]+\.)+\w+)\b")
FILE = re.compile(
    r"\b([\w-]+)\.(py|js|ts|md|txt|json|csv|html|css|yaml|yml|toml|sh|jpg|png|pdf|wav|com|org|net|io|dev)\b"
)
SENTENCE_END = re.compile(r"(?<=[.!?…])[\"')\]]*\s+(?=\S)")
CLAUSE_END = re.compile(r"(?<=[,;:—])\s+")
TITLES = (
    "Mr",
    "Mrs",
    "Ms",
    "Dr",
    "Prof",
    "St",
    "Jr",
    "Sr",
    "No",
    "vs",
    "e.g",
    "i.e",
    "approx",
    "Fig",
    "Mt",
    "Gen",
    "Col",
)
MONTHS = ("Jan", "Feb", "Mar", "Apr", "Jun", "Jul", "Aug", "Sep", "Sept", "Oct", "Nov", "Dec")


def sentences(markdown: str) -> list[str]:
    """What to say, one sentence each, without Markdown, emoji and addresses that nobody would spell."""
    tree = SyntaxTreeNode(_parser().parse(markdown))
    blocks = [block for node in tree.children for block in _blocks(node)]
    return [sentence for block in blocks for sentence in _split(block)]


@cache
def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"])


def _blocks(node: SyntaxTreeNode) -> Iterator[str]:
    """The texts of a node, one per paragraph, item, heading, table row or code block."""
    match node.type:
        case "heading" | "paragraph":
            yield _ended(_clean(_inline(node)))
        case "fence" | "code_block":
            yield _announced(node)
        case "ordered_list":
            start = int(node.attrs.get("start", 1))
            for number, item in enumerate(node.children, start):
                first, *rest = [block for child in item.children for block in _blocks(child)] or [""]
                yield f"{number}: {first}"
                yield from rest
        case "table":
            yield from _rows(node)
        case "html_block" | "hr":
            return
        case _:  # bullet lists, their items, and quotes hold other blocks
            for child in node.children:
                yield from _blocks(child)


def _inline(node: SyntaxTreeNode) -> str:
    """The words of a paragraph: links by their text, pictures by their description, code without its signs."""
    parts: list[str] = []
    for child in node.walk():
        match child.type:
            case "text":
                parts.append(child.content)
            case "code_inline":
                parts.append(_said_code(child.content))
            case "softbreak" | "hardbreak":
                parts.append(" ")
    return "".join(parts)


def _said_code(code: str) -> str:
    """Code in a sentence: its names, options and paths, with underscores and brackets as pauses."""
    code = re.sub(r"(?<!\S)--?(?=\w)", "dash ", code.replace("/", " slash "))
    return " ".join(re.sub(r"[_(){}\[\]<>;=\"']+", " ", code).split())


def _announced(node: SyntaxTreeNode) -> str:
    """A block of code: nobody reads one aloud, so say that it is there."""
    lines = len(node.content.strip("\n").split("\n"))
    language = node.info.split()[0] if node.info.split() else ""
    what = f"{language.title()} code" if language.isalpha() else "code"
    return f"Here is some {what}, {lines} line{'s' if lines > 1 else ''} long."


def _rows(table: SyntaxTreeNode) -> Iterator[str]:
    """Each row of a table as "header: cell" pairs."""
    head, *body = [row for part in table.children for row in part.children]
    names = [_clean(_inline(cell)) for cell in head.children]
    for row in body:
        cells = zip(names, (_clean(_inline(cell)) for cell in row.children), strict=False)
        yield _ended("; ".join(f"{name}: {cell}" if name else cell for name, cell in cells))


def _ended(text: str) -> str:
    """The text with a full stop, which a heading or a list item may lack."""
    text = text.strip()
    return text if not text or text[-1] in ".!?…:" else f"{text.rstrip(',;')}."


def _clean(text: str) -> str:
    """Replaces what a person would not spell out."""
    text = URL.sub(lambda found: _said_address(found[0]), text)
    text = MAIL.sub(lambda found: f"{found[1]} at {found[2].replace('.', ' dot ')}", text)
    text = FILE.sub(r"\1 dot \2", text)
    for written, said in ABBREVIATIONS.items():
        text = re.sub(rf"(?<!\w){re.escape(written)}(?!\w)", said, text, flags=re.IGNORECASE)
    if SUM.search(text):
        text = re.sub(r"(?<=\d) [-–] (?=\d)", " minus ", text)
    for pattern, said in READINGS:
        text = pattern.sub(said, text)
    text = "".join(SIGNS.get(character, character) for character in _without_emoji(text))
    return re.sub(r"\s+([.,;:!?])", r"\1", " ".join(text.split()))


def _said_address(url: str) -> str:
    """The site of an address: "docs.example.com", spoken; a person leaves out the rest of a long one."""
    host, _, path = re.sub(r"^https?://|^www\.|^https?://www\.", "", url).removeprefix("www.").partition("/")
    short = path.strip("/")
    said = host.split(":")[0].replace(".", " dot ")
    return f"{said} slash {short}" if re.fullmatch(r"[a-z]{1,15}", short) else said


def _without_emoji(text: str) -> str:
    """Leaves emoji out; a text that is nothing else is named, such as "smiling face"."""
    kept = "".join(character for character in text if not _is_emoji(character))
    if kept.strip(" .!") or not text.strip(" .!"):
        return kept
    names = (unicodedata.name(character, "").lower() for character in text if _is_emoji(character))
    return ", ".join(name for name in names if name and "variation" not in name and "joiner" not in name) + "."


def _is_emoji(character: str) -> bool:
    return (
        unicodedata.category(character) in ("So", "Sk", "Cs", "Cn")
        and ord(character) > 0x2000
        or character in "\ufe0f\u200d"
    )


def _split(text: str) -> Iterator[str]:
    """Sentences of a paragraph; long ones in clauses."""
    start = 0
    for end in SENTENCE_END.finditer(text):
        before = text[start : end.start()]
        last = before.rsplit(" ", 1)[-1].lstrip("(\"'")
        is_initial = re.fullmatch(r"[A-Z]\.", last) is not None
        is_date = last.rstrip(".") in MONTHS and text[end.end()].isdigit()
        if last.rstrip(".") in TITLES or is_initial or is_date or text[end.end()].islower():
            continue
        if re.fullmatch(r"\d+[.:]", before):  # the number of a list item
            continue
        yield from _clauses(before + end[0].rstrip())
        start = end.end()
    yield from _clauses(text[start:])


def _clauses(sentence: str) -> Iterator[str]:
    sentence = sentence.strip()
    if len(sentence) <= MAX_SENTENCE:
        if any(character.isalnum() for character in sentence):
            yield sentence
        return
    clause = ""
    for part in CLAUSE_END.split(sentence):
        if clause and len(clause) + len(part) >= MAX_SENTENCE:
            yield clause
            clause = part
        else:
            clause = f"{clause} {part}".strip()
    yield clause
