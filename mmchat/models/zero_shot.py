"""Zero-shot classification with CLIP (Radford et al. 2021, arXiv 2103.00020): any names, no training.

CLIP embeds images and texts in one space. Each name becomes a sentence for the text encoder. The more similar its
embedding is to that of the image, the more likely the name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import BadInput
from ..fetching import fetch
from ..fetching.sources import HubRepository
from ..presets import ImageEncoderPreset
from .tagger import MIN_CLASS_PROBABILITY, Tag, top_tags

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerFast

PROMPT = "a photo of a {}."  # the paper's prompt, for every name
BATCH_SIZE = 64  # names
TOKENIZERS = ("tokenizer.json", "vocab.json")  # without either, transformers makes an empty tokenizer


class ZeroShotClassifier:
    """A linear classifier on CLIP's image embeddings, with one row per name.

    Args:
        names: the candidates; exactly one applies (softmax).
        weight: [names, projection], normalized text embeddings times CLIP's logit scale.
    """

    def __init__(self, names: Sequence[str], weight: torch.Tensor):
        self.names, self.weight = list(names), weight

    @torch.inference_mode()
    def probabilities(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Probabilities [images, names]; each row sums to 1.

        Args:
            embeddings: [images, projection], from ``Clip.contrastive_embeddings``.
        """
        directions = torch.nn.functional.normalize(embeddings.to(self.weight), dim=1)
        return (directions @ self.weight.T).softmax(dim=1)

    def __call__(self, embedding: torch.Tensor) -> list[Tag]:
        """The likely names of an image, the best first, from its embedding, [projection]."""
        return top_tags(self.names, self.probabilities(embedding[None])[0], len(self.names), MIN_CLASS_PROBABILITY)


@lru_cache(maxsize=8)
@torch.inference_mode()
def load_zero_shot(names: tuple[str, ...], encoder: ImageEncoderPreset) -> ZeroShotClassifier:
    """Builds a classifier of these names for a CLIP encoder, with the text encoder of the same model.

    Raises:
        AssetError: the model is not available.
        BadInput: there are no names, or the image encoder is not CLIP or lacks its text encoder.
    """
    names = tuple(dict.fromkeys(filter(None, map(str.strip, names))))
    if not names:
        raise BadInput("Give at least one name to look for.")
    model, tokenizer = _load_clip(encoder)
    length = model.config.text_config.max_position_embeddings  # tokens; longer prompts are truncated
    embeddings = []
    for start in range(0, len(names), BATCH_SIZE):
        texts = [PROMPT.format(name) for name in names[start : start + BATCH_SIZE]]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        embeddings.append(model.get_text_features(**tokens).pooler_output)  # [batch, projection]
    directions = torch.nn.functional.normalize(torch.cat(embeddings), dim=1)  # [names, projection]
    return ZeroShotClassifier(names, directions * model.logit_scale.exp())


def _load_clip(encoder: ImageEncoderPreset) -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    """CLIP with both encoders, in evaluation mode, and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer, CLIPModel

    no_text_encoder = BadInput(
        f"The image encoder {encoder.title} cannot look for names: that needs CLIP with its text encoder. Choose a "
        "preset with CLIP, such as phi-3.5."
    )
    if not isinstance(encoder.source, HubRepository):
        raise no_text_encoder
    folder = fetch(encoder.source)
    has_text = AutoConfig.from_pretrained(folder).model_type == "clip"  # vision alone is a "clip_vision_model"
    if not has_text or not any((folder / file).is_file() for file in TOKENIZERS):
        raise no_text_encoder
    try:
        model, loading = CLIPModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise no_text_encoder from error
    if loading["missing_keys"]:  # transformers initializes them randomly
        raise no_text_encoder
    return model.eval(), tokenizer


def read_names(path: str | Path) -> list[str]:
    """Reads names from a text file, one per line.

    Raises:
        BadInput: the file cannot be read, or has no names.
    """
    path = Path(path)
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise BadInput(f"{path.name} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path.name} is not a text file.") from error
    if not names:
        raise BadInput(f"{path.name} has no names. Write one per line.")
    return names
