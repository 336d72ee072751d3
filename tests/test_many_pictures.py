"""Many pictures and one question: ZIPs, hostile ones included, and the files of answers."""

from __future__ import annotations

import csv
import io
import json
import stat
import zipfile

import pytest
from PIL import Image

from mmchat import BadInput, SamplingOptions
from mmchat.__main__ import main
from mmchat.serving import bulk
from mmchat.serving.bulk import about_each, answer_questions, list_pictures, write_csv, write_jsonl

SHORT = SamplingOptions(temperature=0, max_new_tokens=6)


def png():
    data = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(data, "PNG")
    return data.getvalue()


def zipped(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def test_pictures_and_a_zip_are_answered_in_order(engine, tmp_path, photo):
    members = [("one/a.png", png()), ("b.png", b"no picture"), ("__MACOSX/x", b"x"), ("one/.DS_Store", b"x")]
    pictures = list_pictures([photo, zipped(tmp_path / "more.zip", members)])
    rows = list(answer_questions(engine, about_each(pictures, "What is it?"), SHORT))
    assert [row["image"] for row in rows] == ["astronaut.jpg", "one/a.png", "b.png"]
    assert rows[0]["answer"] and rows[1]["answer"] and rows[2]["answer"] is None and "picture" in rows[2]["error"]
    write_jsonl(tmp_path / "answers.jsonl", rows)
    assert [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "more.zip"]  # nothing unpacked


def test_stopping_keeps_what_is_there(engine, photo):
    rows = answer_questions(engine, about_each(list_pictures([photo, photo]), "What is it?"), SHORT)
    kept = [next(rows)]
    rows.close()
    assert len(kept) == 1 and kept[0]["answer"]


def link():
    member = zipfile.ZipInfo("link.png")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ([("/etc/a.png", b"")], "odd name"),
        ([("../a.png", b"")], "odd name"),
        ([("C:\\a.png", b"")], "odd name"),
        ([("a\x1b.png", b"")], "odd name"),
        ([(link(), "/etc/passwd")], "a link"),
        ([("inner.zip", b"PK")], "another archive"),
        ([("notes.txt", b"text")], "no picture"),
        ([("bomb.png", bytes(15 << 20))], "too large unpacked"),
        ([("bomb.png", bytes(25 << 20))], "too large unpacked"),
        ([(f"{n}.png", b"") for n in range(201)], "at most 200"),
        ([(f"{n}.png", b"") for n in range(1001)], "too many files"),
        ([("folder/", b"")], "no pictures"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_hostile_zips_are_refused(tmp_path, members, sentence):
    with pytest.raises(BadInput, match=sentence):
        list_pictures([zipped(tmp_path / "a.zip", members)])


def test_damaged_encrypted_and_lying_zips(tmp_path, monkeypatch):
    (tmp_path / "no.zip").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(BadInput, match="not a ZIP"):
        list_pictures([tmp_path / "no.zip"])
    whole = zipped(tmp_path / "a.zip", [("a.png", png())])
    locked = bytearray(whole.read_bytes())
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    with pytest.raises(BadInput, match="encrypted"):
        list_pictures([tmp_path / "locked.zip"])
    monkeypatch.setattr(bulk, "MAX_DIRECTORY", 40)  # an entry has more
    with pytest.raises(BadInput, match="too many files"):
        list_pictures([whole])
    monkeypatch.setattr(bulk, "MAX_MEMBER", 10)
    with pytest.raises(BadInput, match="too large unpacked"):
        bulk.Picture("a.png", whole, "a.png").open()


def test_cells_are_not_formulas(tmp_path):
    names = ["=1+1", "+1", "-1", "@x", "\t=1", " =1", "plain"]
    write_csv(tmp_path / "a.csv", [{"image": name, "question": "q", "answer": "=HYPERLINK()"} for name in names])
    with (tmp_path / "a.csv").open(encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert all(row["image"].startswith("'") for row in rows[:-1]) and rows[-1]["image"] == "plain"
    assert all(row["answer"] == "'=HYPERLINK()" for row in rows)


def test_the_command_and_the_page_write_the_same(engine, photo, tmp_path, monkeypatch):
    pictures = [photo, photo.with_name("bus.jpg"), tmp_path / "damaged.png"]
    pictures[2].write_bytes(b"no picture")
    asked = [{"image": str(path), "question": "What is it?"} for path in pictures]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    monkeypatch.setattr("mmchat.engine.load", lambda *_: engine)
    command = ["batch", str(tmp_path / "asked.jsonl"), "--out", str(tmp_path / "command.jsonl")]
    assert main([*command, "--temperature", "0", "--max-new-tokens", "6"]) == 0
    listed = list_pictures(pictures, [str(path) for path in pictures])
    write_jsonl(tmp_path / "page.jsonl", list(answer_questions(engine, about_each(listed, "What is it?"), SHORT)))
    assert (tmp_path / "command.jsonl").read_text() == (tmp_path / "page.jsonl").read_text()
