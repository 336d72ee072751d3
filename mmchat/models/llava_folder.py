"""A standard LLaVA folder as three models: language model, image encoder (LLaVA: vision tower) and projector.

``LlavaForConditionalGeneration`` of transformers keeps all three in the same files. Each is read from them by the names
of its tensors, so nothing is converted on disk and nothing is in memory twice.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import WeightsError, counted
from .jinja_template import IMAGE_TOKEN, ChatTemplate, read_template

if TYPE_CHECKING:
    from transformers import LlavaConfig

MODEL_CONFIG = "config.json"
MODEL_TYPE = "llava"
TEXT_MODELS = ("llama", "mistral", "phi3", "qwen2")
IMAGE_ENCODERS = ("clip_vision_model", "siglip_vision_model")
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")
INDEX_FILE = "model.safetensors.index.json"

# Names of tensors in the files → names in the part. Files of transformers before 4.52 and since differ.
LANGUAGE_MODEL_NAMES = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
}
IMAGE_ENCODER_NAMES = {r"^(model\.)?vision_tower\.(vision_model\.)?": ""}
PROJECTOR_PREFIXES = ("multi_modal_projector.", "model.multi_modal_projector.")


@dataclass(frozen=True)
class LlavaFolder:
    """A LLaVA folder whose config has been checked."""

    folder: Path
    name: str  # for messages
    config: LlavaConfig

    @property
    def layers(self) -> int | tuple[int, ...]:
        """The layer of the image encoder that the features come from, or several whose features are joined."""
        found = self.config.vision_feature_layer
        return found if isinstance(found, int) else tuple(found)

    @property
    def keeps_first(self) -> bool:
        """Whether the first feature, CLIP's class token, is kept."""
        return bool(self.config.vision_feature_select_strategy == "full")

    def projector_state(self) -> dict[str, torch.Tensor]:
        """The projector's tensors: ``linear_1`` and ``linear_2``, each with ``weight`` and perhaps ``bias``.

        Raises:
            WeightsError: a file is missing or damaged, or the projector is of another kind.
        """
        state = {}
        for file in self.files():
            try:
                with safe_open(file, "pt") as tensors:
                    for key in tensors.keys():  # noqa: SIM118 (not a dictionary)
                        for prefix in PROJECTOR_PREFIXES:
                            if key.startswith(prefix):
                                state[key.removeprefix(prefix)] = tensors.get_tensor(key).float()
            except (OSError, SafetensorError) as error:
                raise WeightsError(f"{file.name} of '{self.name}' is damaged. Fetch it again.") from error
        parts = ("weight", "bias") if self.config.multimodal_projector_bias else ("weight",)
        if state.keys() != {f"linear_{number}.{part}" for number in (1, 2) for part in parts}:
            raise WeightsError(
                f"The projector of '{self.name}' is not two linear layers, as LLaVA's is: it has "
                f"{', '.join(sorted(state)) or 'no tensors'}."
            )
        return state

    def files(self) -> list[Path]:
        """The files with the weights.

        Raises:
            WeightsError: one is missing.
        """
        names = ["model.safetensors"]
        if (self.folder / INDEX_FILE).is_file():
            try:
                names = sorted(set(json.loads((self.folder / INDEX_FILE).read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise WeightsError(f"{INDEX_FILE} of '{self.name}' is damaged. Fetch it again.") from error
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise WeightsError(f"'{self.name}' lacks {missing[0]}, which holds a part of its weights.")
        return [self.folder / name for name in names]


def is_llava_folder(folder: Path) -> bool:
    """Whether a folder holds a model of the type "llava"."""
    return (read_json(folder / MODEL_CONFIG) or {}).get("model_type") == MODEL_TYPE


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def open_llava(folder: Path, name: str = "") -> LlavaFolder:
    """Reads and checks a LLaVA folder's config.

    Args:
        name: what to call it in messages; the folder's name if empty.

    Raises:
        WeightsError: the config is damaged, or a part of the model is of a kind that mmchat does not know.
    """
    from transformers import AutoConfig

    name = name or folder.name
    try:
        raw = json.loads((folder / "config.json").read_text())
        text = raw.get("text_config", {}).get("model_type", "llama")
        encoder = raw.get("vision_config", {}).get("model_type", "clip_vision_model")
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"The config.json of '{name}' is missing or damaged.") from error
    if text not in TEXT_MODELS:
        raise WeightsError(f"'{name}' has a text model of the type '{text}'; supported are {', '.join(TEXT_MODELS)}.")
    if encoder not in IMAGE_ENCODERS:
        raise WeightsError(f"'{name}' has an image encoder of the type '{encoder}'; CLIP and SigLIP are supported.")
    activation = raw.get("projector_hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise WeightsError(f"The projector of '{name}' has the activation '{activation}', which is not supported.")
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers' checks raise several types
        raise WeightsError(f"transformers cannot read the config.json of '{name}' as a LLaVA model.") from error
    layer_count = config.vision_config.num_hidden_layers
    layers = config.vision_feature_layer
    for layer in [layers] if isinstance(layers, int) else layers:
        if not -layer_count <= layer + 1 <= layer_count + 1:
            raise WeightsError(f"The image encoder of '{name}' has {layer_count} layers; there is no layer {layer}.")
    if config.tie_word_embeddings:
        config.text_config.tie_word_embeddings = True
    return LlavaFolder(folder, name, config)


def load_part(
    llava: LlavaFolder, model_class: Any, config: Any, names: dict[str, str], what: str, **options: Any
) -> Any:
    """Loads one model of a LLaVA folder, leaving the others on disk.

    Args:
        model_class: a class of transformers with ``from_pretrained``.
        config: the part's own config.
        names: see ``LANGUAGE_MODEL_NAMES``.
        what: the part's name in messages.
        options: for ``from_pretrained``.

    Raises:
        WeightsError: a file or a tensor is missing or damaged.
    """
    from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

    llava.files()
    verbosity = get_verbosity()
    set_verbosity_error()  # it would list the tensors of the other parts
    try:
        model, report = model_class.from_pretrained(
            llava.folder, config=config, key_mapping=names, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise WeightsError(f"The {what} of '{llava.name}' is damaged or does not fit its config.json.") from error
    finally:
        set_verbosity(verbosity)
    if report["missing_keys"] or report["mismatched_keys"]:
        count = len(report["missing_keys"]) + len(report["mismatched_keys"])
        raise WeightsError(
            f"The {what} of '{llava.name}' lacks {counted(count, 'tensor')} that its config.json promises."
        )
    return model


def llava_template(folder: Path, name: str = "") -> ChatTemplate:
    """The chat template of a LLaVA folder, and its image token.

    Raises:
        WeightsError: there is no template.
    """
    token = None
    for file in ("processor_config.json", "tokenizer_config.json"):
        found = (read_json(folder / file) or {}).get("image_token")
        token = token or (found.get("content") if isinstance(found, dict) else found)
    return ChatTemplate(read_template(folder, name or folder.name), str(token or IMAGE_TOKEN))
