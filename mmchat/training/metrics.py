"""How good answers are, against what people wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence


def words(text: str) -> list[str]:
    """Lower-case words, without punctuation: how captions are compared."""
    return re.findall(r"[a-z0-9'-]+", text.lower())


def corpus_bleu4(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 over a whole collection, 0 to 1 (Papineni et al. 2002).

    Args:
        answers: one a picture.
        references: what people wrote of each picture.
    """
    from nltk.translate.bleu_score import corpus_bleu

    return float(corpus_bleu([[words(text) for text in texts] for texts in references], [words(a) for a in answers]))
