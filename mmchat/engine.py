"""The local engine: messages in, text out. It implements ``conversation.Engine``."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoints.weights_folder import default_weights, load_model, preset_for_weights, preset_named
from .conversation import (
    TEXT_PENALTY,
    ImageSource,
    Message,
    SamplingOptions,
    dialogue_turns,
    has_images,
    rewrite_request,
    with_named_image,
    with_question,
)
from .device import choose_device, choose_preset, choose_quantization, headroom_of, release_memory
from .errors import BadInput, MmchatError
from .fetching import expect
from .inference.decoder import load_decoder
from .inference.fair_lock import FairLock
from .inference.generation import generate_text, prefill
from .inference.prefix_cache import CachedPrefix, PrefixCache, TokenKeys, common_length, prefill_boundaries
from .media import decode_image, picture_digest
from .models.chat_formats import chat_format_of
from .models.image_encoder import ImageEncoder, load_image_encoder
from .models.language_model import context_length
from .models.prompt import IMAGE_TOKEN_ID, TokenizedConversation, tokenize_conversation
from .models.speech_mixin import SpeechMixin
from .models.speech_recognition import SpeechRecognizer, find_speech_model
from .models.stored_language_model import loaded
from .models.tagger import Tag
from .models.text_to_speech import Voice
from .models.zero_shot import load_zero_shot
from .presets import AUTO, DEFAULT_PRESET, Preset, get_preset

logger = logging.getLogger(__name__)

CACHED_PICTURES = 64
SHOWN_CLASSES = 5  # in the details of an answer
CACHE_BUDGET = {"cpu": 2e8, "mps": 1e9, "cuda": 2e9}  # bytes of KV cache kept for idle conversations


def load(
    preset: str = DEFAULT_PRESET,
    weights: str | Path | None = None,
    quantization: str = "auto",
    speech: str | None = None,
) -> LocalEngine:
    """Loads the models of a preset, fetching them on first use.

    Args:
        preset: a name from ``presets.PRESETS``, or "auto": the preset that ``weights`` were trained for; without
            weights, the best one for this machine.
        weights: a weights folder that training wrote, or a LLaVA model's folder or repository; the preset's own weights
            if None.
        quantization: of the language model; one of ``device.QUANTIZATIONS``.
        speech: a Whisper model in place of the preset's: a size, a repository, a folder or a .pt file.

    Raises:
        MmchatError: there is no such preset, or models or weights are not available; the message says what to do.
    """
    if weights:
        chosen = preset_named(preset, weights)
        reason = "the weights were trained for it" if preset == AUTO else ""
    else:
        chosen, reason = choose_preset() if preset == AUTO else (get_preset(preset), "")
    if reason:
        logger.info("Preset %s: %s", chosen.name, reason)
    if speech:
        chosen = replace(chosen, speech=find_speech_model(speech))
    return LocalEngine(chosen, weights, quantization, reason)


class LocalEngine(SpeechMixin):
    """One set of models in memory.

    Threads may share an engine. Concurrent replies are generated in one batch, so a short answer does not wait for a
    long one. Each prefill chunk holds the lock once; a beam search holds it to its end.

    Args:
        weights: a weights folder that training wrote; the preset's own weights if None.
        reason: why this preset was chosen; shown in ``about``.
    """

    def __init__(self, preset: Preset, weights: str | Path | None = None, quantization: str = "auto", reason: str = ""):
        self.reason = reason
        if not weights:
            expect(preset.sources.values())
        trained = weights or default_weights(preset)
        self.preset = preset = preset_for_weights(preset, trained)
        expect(preset.sources.values())  # the weights may need another image encoder
        self.device = choose_device()
        logger.info("Computing on %s: %s", self.device.type, self.device.reason)
        language_model = preset.language_model
        self.quantization = choose_quantization(
            quantization, self.device, language_model.parameters, headroom_of(language_model)
        )
        logger.info("Quantization %s: %s", self.quantization.kind, self.quantization.reason)
        self.model, self.tokenizer = load_model(
            preset,
            trained,
            self.device.dtype,
            quantization=self.quantization.kind,
            stored=self.device.type == "cpu" and self.quantization.kind == "none",
        )
        try:
            self.model.to(self.device.type)
        except torch.OutOfMemoryError as error:
            raise MmchatError(
                "The GPU has too little free memory for this model. Try --quantization 4bit, or --preset smol."
            ) from error
        self.chat_format = chat_format_of(preset)
        self.context_length = context_length(self.model.language_model.config)  # tokens
        self.decoder = load_decoder(self.model.language_model)
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()  # image digest -> [features, image_dim]
        self.prefix_cache = PrefixCache(self.decoder, CACHE_BUDGET[self.device.type])
        self._lock = FairLock()  # the adapter is on or off for the whole model, so only one reply computes at a time
        self.speech_recognizer = SpeechRecognizer(preset.speech)
        self.voice = Voice()
        self.answers_in = preset.language_model.languages

    @property
    def about(self) -> str:
        """Which models answer, and why they were chosen, in a few sentences."""
        parts = [self.preset.description, f"Running on {self.device.type.upper()}: {self.device.reason}"]
        if self.quantization.kind != "none":
            parts.append(f"Weights in {self.quantization.kind}: {self.quantization.reason}")
        if self.reason:
            parts.append(f"The preset '{self.preset.name}' was chosen because {self.reason}")
        return ". ".join(parts) + "."

    def warm_up(self) -> None:
        """Loads the image encoder, which would otherwise load on first use, and fetches the speech model."""
        self.image_encoder  # noqa: B018 (a cached property: access loads it)
        self.speech_recognizer.fetch()
        release_memory()

    @cached_property
    def language_model(self) -> nn.Module:
        """The language model in PyTorch; where llama.cpp answers, it is loaded on first use."""
        return loaded(self.decoder.model)

    @cached_property
    def image_encoder(self) -> ImageEncoder:
        encoder = load_image_encoder(self.preset.image_encoder).to(self.device.type)
        if self.device.type == "cpu":
            encoder.release_network()
        return encoder

    def classes(self, image: ImageSource, names: Sequence[str] = ()) -> list[Tag]:
        """Names what the image encoder recognizes in an image, the most likely first.

        Without ``names`` these are the tags that the language model reads with the image.

        Args:
            image: a path or a decoded PIL image.
            names: classify among these names instead, zero-shot, with CLIP's text encoder.

        Raises:
            BadInput: the image cannot be read, or names are given and the image encoder is not CLIP.
        """
        if names:
            classifier = load_zero_shot(tuple(names), self.preset.image_encoder)
            with self._lock:
                return classifier(self.image_encoder.contrastive_embeddings([decode_image(image)])[0])
        if not self.model.tagger:
            return []
        with self._lock:
            classes, words = self.model.tagger(self.image_features(image))
        found = sorted([*classes, *words], key=lambda tag: tag.probability)
        return list({tag.name: tag for tag in found}.values())[::-1]  # if both know a name, the more likely tag stays

    def details(self, answer: str, images: Sequence[ImageSource] = ()) -> dict[str, Any]:
        """Facts about an answer: the model, the number of tokens, and the most likely classes of each image."""
        with self._lock:
            tokens = len(self.tokenizer.encode(answer, add_special_tokens=False))
        classes = [[tag.name for tag in self.classes(image)[:SHOWN_CLASSES]] for image in images]
        return {"model": self.preset.name, "tokens": tokens, "classes": classes}

    def reply(
        self,
        messages: Sequence[Message],
        options: SamplingOptions | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> Iterator[str]:
        """Streams the answer to a conversation. Closing the iterator stops generation.

        The base model alone answers a conversation without images. With an image anywhere in it, the adapter is on, and
        image tokens stand where the image was shown.

        Args:
            messages: the conversation, ending with a user's question. An image without text asks for a description.
            options: sampling options; the defaults if None.
            notify: called with a sentence when the oldest turns are dropped to fit the context.

        Raises:
            BadInput: there is no question, an image cannot be read, or the question alone exceeds the context.
        """
        options = options or SamplingOptions()
        messages = self._as_asked(messages)
        options = self._with_defaults(options, has_images(messages))
        with self._lock:  # the tokenizer is not thread-safe either
            encoded = self._fit(messages, options.max_new_tokens, notify)
        yield from self._in_turns(self._generate(encoded, options, with_adapter=has_images(messages)))

    def prefill(self, messages: Sequence[Message]) -> None:
        """Prefills a conversation up to the end of its last image, while the question about it is still being typed.

        The first word then comes as soon as in a conversation without a new image.

        Args:
            messages: as for ``reply``; the last message needs no text. If it has no image, there is nothing to do.

        Raises:
            BadInput: an image cannot be read.
        """
        if not messages[-1].images:
            return
        with self._lock:
            encoded = self.tokenize(self._as_asked(messages))
            end = max(encoded.image_ends, default=0)
            is_known = self.prefix_cache.covers(self._token_keys(encoded)[:end], with_adapter=True)
        if not end or is_known or len(encoded.token_ids) > self.context_length:
            return
        ends = [each for each in prefill_boundaries(encoded, self._shared_tokens) if each <= end]
        for _ in self._in_turns(self._prefilled(encoded, ends, with_adapter=True)):
            pass

    def _in_turns(self, pieces: Generator[str, None, Any]) -> Iterator[str]:
        """The pieces that are not empty. Each is computed with the lock held, so other threads come in between."""
        try:
            while True:
                with self._lock:
                    piece = next(pieces, None)
                if piece is None:
                    return
                if piece:
                    yield piece
        finally:
            with self._lock.reentrant():  # garbage collection may run while this thread holds the lock
                pieces.close()

    def _as_asked(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation that the model reads: a small model sees only the image that the question names."""
        messages = with_question(messages)
        return with_named_image(messages) if self.preset.language_model.mixes_up_images else messages

    def _with_defaults(self, options: SamplingOptions, has_images: bool) -> SamplingOptions:
        penalty, ngram_size = options.repetition_penalty, options.no_repeat_ngram_size
        if penalty is None:
            penalty = 1.0 if has_images else TEXT_PENALTY
        if ngram_size is None:
            ngram_size = self.preset.language_model.no_repeat_ngram_size if has_images else 0
        return replace(options, repetition_penalty=penalty, no_repeat_ngram_size=ngram_size)

    def _generate(
        self, encoded: TokenizedConversation, options: SamplingOptions, with_adapter: bool
    ) -> Generator[str, None, None]:
        """Streams the answer to a tokenized conversation."""
        ends = prefill_boundaries(encoded, self._shared_tokens)
        prefix = yield from self._prefilled(encoded, ends, with_adapter)
        yield from generate_text(self.decoder, self.tokenizer, prefix.logits, options, prefix.cache)

    def _prefilled(
        self, encoded: TokenizedConversation, ends: list[int], with_adapter: bool
    ) -> Generator[str, None, CachedPrefix]:
        """Prefills what the prefix cache lacks of a tokenized conversation, up to the last end, and keeps it."""
        tokens = self._token_keys(encoded)[: ends[-1]]
        prefix = self.prefix_cache.lookup(tokens, ends, with_adapter)
        for start, end in pairwise([len(prefix.tokens), *(end for end in ends if end > len(prefix.tokens))]):
            for logits in prefill(self.decoder, self.embed(encoded, start, end), prefix.cache):
                prefix.logits = logits
                yield ""  # answers in progress advance between chunks
            prefix.tokens = tokens[:end]
        self.prefix_cache.keep(prefix)
        return prefix

    @cached_property
    def _shared_tokens(self) -> list[int]:
        """The common prefix of all conversations: the system text and the start of a question."""
        first, second = (self.tokenize([Message("user", text)]).token_ids for text in ("a", "b"))
        return first[: common_length(first, second)]

    def _token_keys(self, encoded: TokenizedConversation) -> TokenKeys:
        """One key per token, to compare conversations; the key of an image token comes from the image's content."""
        count = self.model.tokens_per_image
        images = iter([(digest, index) for digest in map(picture_digest, encoded.images) for index in range(count)])
        return [next(images) if token_id == IMAGE_TOKEN_ID else token_id for token_id in encoded.token_ids]

    def count_tokens(self, messages: Sequence[Message], answer: str) -> tuple[int, int]:
        """The number of tokens in a conversation, images included, and in an answer to it."""
        with self._lock:
            prompt = self.tokenize(self._as_asked(messages))
            return len(prompt.token_ids), len(self.tokenizer.encode(answer, add_special_tokens=False))

    def rewrite(self, question: str, draft: str, options: SamplingOptions | None = None) -> Iterator[str]:
        """Streams a draft answer in better English, written by the base model with the adapter off.

        Args:
            question: the question that the draft answers.
            draft: the text of ``reply``.
        """
        return self.reply([rewrite_request(question, draft)], options)

    def _fit(
        self, messages: list[Message], max_new_tokens: int, notify: Callable[[str], None]
    ) -> TokenizedConversation:
        """Tokenizes the conversation, dropping the oldest turns until it fits the model's context."""
        system = [message for message in messages[:1] if message.role == "system"]
        turns = dialogue_turns(messages[len(system) :])
        capacity = self.context_length - max_new_tokens  # tokens
        for dropped in range(len(turns)):
            kept = system + [message for turn in turns[dropped:] for message in turn]
            encoded = self.tokenize(kept)
            if len(encoded.token_ids) <= capacity:
                if dropped:
                    notify(f"This conversation is too long for me: I left out the oldest {_count(dropped, 'turn')}.")
                return encoded
        raise BadInput(
            f"Your question is too long for me: it takes {len(encoded.token_ids)} tokens, and {max(capacity, 0)} fit "
            "beside the answer. Please shorten it."
        )

    def tokenize(self, messages: Sequence[Message]) -> TokenizedConversation:
        """Tokenizes a conversation up to the start of the answer."""
        return tokenize_conversation(
            messages,
            self.tokenizer,
            self.chat_format,
            self.model.tokens_per_image,
            image_text=lambda image: self.model.tags(self.image_features(image)) if self.model.tagger else "",
            add_generation_prompt=True,
        )

    @torch.inference_mode()
    def embed(self, encoded: TokenizedConversation, start: int = 0, end: int | None = None) -> torch.Tensor:
        """Embeds the tokens from start to end, [1, end - start, hidden_size].

        The range must hold all tokens of an image or none.
        """
        token_ids = torch.tensor([encoded.token_ids[start:end]], device=self.model.device)
        first, last = (
            encoded.token_ids[:position].count(IMAGE_TOKEN_ID) // self.model.tokens_per_image
            for position in (start, end)
        )
        features = [self.image_features(image) for image in encoded.images[first:last]]
        return self.model.splice(token_ids, torch.stack(features) if features else None)

    def image_features(self, source: ImageSource) -> torch.Tensor:
        """The features of an image, [features, image_dim]; cached by content.

        Args:
            source: a path or a decoded PIL image.

        Raises:
            BadInput: the image cannot be read.
        """
        digest = picture_digest(source)
        if digest not in self._features:
            self._features[digest] = self.image_encoder.encode([decode_image(source)])[0]
            if len(self._features) > CACHED_PICTURES:
                self._features.popitem(last=False)
        self._features.move_to_end(digest)
        return self._features[digest]

    def forget(self, pictures: bool = False) -> None:
        """Clears the prefix cache, so the next turn of every conversation is prefilled from its start.

        Args:
            pictures: clear the cached image features, too.
        """
        with self._lock:
            self.prefix_cache.clear()
            if pictures:
                self._features.clear()


def _count(number: int, noun: str) -> str:
    return noun if number == 1 else f"{number} {noun}s"
