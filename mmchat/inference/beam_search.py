"""Beam search: transformers' ``generate`` chooses the tokens, a decoder computes their logits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import torch

from ..conversation import SamplingOptions

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from .batch import Rows
    from .decoder import Cache, Decoder


@torch.inference_mode()
def beam_search(
    decoder: Decoder, logits: torch.Tensor, options: SamplingOptions, stop_ids: set[int], cache: Cache
) -> list[int]:
    """The token ids of the likeliest answer to a prefilled prompt.

    Args:
        logits: of the prompt's last token, [1, vocabulary].
        options: temperature, top_p and seed are ignored.
        cache: of the prompt; it is not modified.
    """
    beams = Beams(decoder.batch.rows)
    try:
        beams.start(cache, options.beams)
        # generate is told of a prompt of one token, whose logits are there already
        token_ids = _generator(beams, logits).generate(
            inputs_embeds=logits.new_zeros(1, 1, 1),
            attention_mask=torch.ones(1, 1, dtype=torch.long, device=logits.device),
            past_key_values=beams,
            generation_config=beam_settings(options, stop_ids),
        )  # [1, new tokens]
    finally:
        beams.close()
    return list(map(int, token_ids[0]))


class Beams:
    """The rows of a search, in the place of transformers' KV cache."""

    is_compileable = False

    def __init__(self, rows: Rows):
        self._rows = rows
        self.beams: list[Any] = []

    def start(self, cache: Cache, number: int) -> None:
        """Adds this many beams that continue a prompt."""
        for _ in range(number):
            self.beams.append(self._rows.add(cache))

    def get_seq_length(self, layer: int = 0) -> int:
        return 0  # asked before the first pass only

    def step(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Appends a token to each beam → logits, [beams, vocabulary]."""
        logits = dict(self._rows.step(dict(zip(self.beams, token_ids, strict=True))))
        return torch.stack([logits[beam] for beam in self.beams])

    def reorder_cache(self, sources: torch.Tensor) -> None:
        """Makes each beam a copy of another one; called by ``generate``."""
        self._rows.reorder(self.beams, sources.tolist())

    def close(self) -> None:
        for beam in self.beams:
            self._rows.remove(beam)


def _generator(beams: Beams, logits: torch.Tensor) -> Any:
    from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class Generator(GenerationMixin):
        """What ``generate`` asks of a model."""

        main_input_name = "input_ids"
        device, dtype = logits.device, logits.dtype
        config, generation_config = PreTrainedConfig(vocab_size=logits.shape[1]), GenerationConfig()

        def prepare_inputs_for_generation(
            self,
            input_ids: torch.Tensor,  # [beams, written tokens]
            inputs_embeds: Any = None,
            attention_mask: Any = None,
            past_key_values: Any = None,
            is_first_iteration: bool = False,
            **_: Any,
        ) -> dict[str, Any]:
            return {"token_ids": None if is_first_iteration else input_ids[:, -1].tolist()}

        def __call__(self, token_ids: list[int] | None, return_dict: bool = True) -> CausalLMOutputWithPast:
            rows = beams.step(token_ids) if token_ids else logits.expand(len(beams.beams), -1)  # [beams, vocabulary]
            return CausalLMOutputWithPast(logits=rows[:, None], past_key_values=beams)

        forward = __call__

    return Generator()


def beam_settings(options: SamplingOptions, stop_ids: set[int]) -> GenerationConfig:
    """The options as transformers' settings for greedy or beam search."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=options.beams,
        max_new_tokens=options.max_new_tokens,
        repetition_penalty=options.repetition_penalty or 1.0,
        no_repeat_ngram_size=options.no_repeat_ngram_size or 0,
        eos_token_id=sorted(stop_ids),
        pad_token_id=next(token_id for token_id in count() if token_id not in stop_ids),  # any token; it is cut off
    )
