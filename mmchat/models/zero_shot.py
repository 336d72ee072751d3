"""Zero-shot classification: which of any names a picture is most like, by CLIP (Radford et al. 2021, arXiv 2103.00020).

CLIP's two halves map pictures and texts into one space. Each name goes into a sentence for the text half; the nearer
its embedding is to that of a picture, the likelier the name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from ..errors import BadInput
from ..fetching import fetch
from ..presets import HubRepository, ImageEncoderPreset
from .tagger import LEAST_CLASS, Tag, likeliest

PROMPT = "a photo of a {}."  # whatever the name: the paper's prompt, which CLIP knows from its training
BATCH = 64  # names
TOKENIZERS = ("tokenizer.json", "vocab.json")  # without one of them, transformers makes an empty tokenizer


class ZeroShotClassifier:
    """Tells which of some names CLIP's embedding of a picture is nearest to.

    Args:
        names: what there may be in a picture, of which one is the main thing.
        weight: [names, width], the direction in which each name lies, times CLIP's own scale.
    """

    def __init__(self, names: Sequence[str], weight: torch.Tensor):
        self.names, self.weight = list(names), weight

    @torch.inference_mode()
    def probabilities(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[pictures, names], each row with the sum 1.

        Args:
            embeddings: [pictures, width], as ``Clip.embed`` gives them.
        """
        directions = torch.nn.functional.normalize(embeddings.to(self.weight), dim=1)
        return (directions @ self.weight.T).softmax(dim=1)

    def __call__(self, embedding: torch.Tensor) -> list[Tag]:
        """The likely names of a picture, likeliest first, from its embedding, [width]."""
        return likeliest(self.names, self.probabilities(embedding[None])[0], len(self.names), LEAST_CLASS)


@lru_cache(maxsize=8)
@torch.inference_mode()
def load_zero_shot(names: tuple[str, ...], encoder: ImageEncoderPreset) -> ZeroShotClassifier:
    """A classifier of these names for the pictures of a CLIP encoder, made by the text half of the same model.

    Raises:
        AssetError: the model cannot be had.
        BadInput: there are no names, or the encoder is no CLIP with its text half.
    """
    names = tuple(dict.fromkeys(filter(None, map(str.strip, names))))
    if not names:
        raise BadInput("There are no names to look for.")
    model, tokenizer = _whole_clip(encoder)
    length = model.config.text_config.max_position_embeddings  # tokens; longer names are cut off
    embeddings = []
    for start in range(0, len(names), BATCH):
        texts = [PROMPT.format(name) for name in names[start : start + BATCH]]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        embeddings.append(model.get_text_features(**tokens).pooler_output)  # [batch, width]
    directions = torch.nn.functional.normalize(torch.cat(embeddings), dim=1)  # [names, width]
    return ZeroShotClassifier(names, directions * model.logit_scale.exp())


def _whole_clip(encoder: ImageEncoderPreset) -> tuple:
    """CLIP with its text half, in evaluation mode, and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer, CLIPModel

    no_text_half = BadInput(
        f"The image encoder {encoder.title} cannot look for names of yours: that takes CLIP with its text encoder."
    )
    if not isinstance(encoder.source, HubRepository):
        raise no_text_half
    folder = fetch(encoder.source)
    is_whole = AutoConfig.from_pretrained(folder).model_type == "clip"  # the vision half is a "clip_vision_model"
    if not is_whole or not any((folder / file).is_file() for file in TOKENIZERS):
        raise no_text_half
    try:
        model, loading = CLIPModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise no_text_half from error
    if loading["missing_keys"]:  # transformers would fill them with random numbers
        raise no_text_half
    return model.eval(), tokenizer


def read_names(path: str | Path) -> list[str]:
    """The names in a text file, one a line.

    Raises:
        BadInput: it cannot be read, or holds none.
    """
    path = Path(path)
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise BadInput(f"{path.name} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path.name} is not a text file.") from error
    if not names:
        raise BadInput(f"{path.name} holds no names; write one on each line.")
    return names
