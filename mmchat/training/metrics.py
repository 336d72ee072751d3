"""How good answers are, against what people wrote; every figure with the interval it may lie in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95% interval, by resampling the questions with replacement (Efron 1979, the bootstrap)."""

    value: float
    low: float
    high: float
    count: int  # questions it rests on

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(count: int, statistic: Callable[[np.ndarray], float], seed: int = 0) -> Estimate:
    """The estimate of a statistic of ``count`` items.

    Args:
        statistic: takes the numbers of the items to compute it on, [count].
    """
    random_numbers = np.random.default_rng(seed)
    resampled = [statistic(random_numbers.integers(0, count, count)) for _ in range(RESAMPLES)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(float(statistic(np.arange(count))), float(low), float(high), count)


def words(text: str) -> str:
    """Lower-case words without punctuation, a space between them: how answers are compared."""
    return " ".join(re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*", text.lower()))


def caption_metrics(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Estimate]:
    """BLEU-1 to 4 (Papineni et al. 2002), ROUGE-L (Lin 2004) and CIDEr (Vedantam et al. 2015), as COCO computes them.

    COCO's tokeniser needs Java; ``words`` stands in for it.

    Args:
        answers: one for each picture.
        references: what people wrote of each picture.
    """
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider_scorer import CiderScorer
    from pycocoevalcap.rouge.rouge import Rouge

    bleu, cider, rouge, rouge_scores = BleuScorer(n=4), CiderScorer(n=4, sigma=6.0), Rouge(), []
    for answer, texts in zip(answers, references, strict=True):
        answer, texts = words(answer), [words(text) for text in texts]
        bleu += (answer, texts)
        cider += (answer, texts)
        rouge_scores.append(rouge.calc_score([answer], texts) if answer else 0.0)
    bleu.compute_score(option="closest", verbose=0)
    _, cider_scores = cider.compute_score()
    result = {f"BLEU-{order}": bootstrap(len(answers), _corpus_bleu(bleu.ctest, order)) for order in range(1, 5)}
    for name, scores in (("ROUGE-L", rouge_scores), ("CIDEr", cider_scores)):
        result[name] = bootstrap(len(answers), _mean(scores))
    return result


def _corpus_bleu(tests: list[dict], order: int) -> Callable[[np.ndarray], float]:
    """BLEU of a sample, from the counts that pycocoevalcap made of each answer: they add up over a collection."""
    guessed = np.array([test["guess"][:order] for test in tests], dtype=float)  # [answers, order]
    correct = np.array([test["correct"][:order] for test in tests], dtype=float)
    length = np.array([test["testlen"] for test in tests], dtype=float)
    closest = [min(test["reflen"], key=lambda one: (abs(one - test["testlen"]), one)) for test in tests]
    reference_length = np.array(closest, dtype=float)

    def statistic(sample: np.ndarray) -> float:
        precisions = correct[sample].sum(axis=0) / np.maximum(guessed[sample].sum(axis=0), 1)
        if not precisions.all():
            return 0.0
        brevity = min(0.0, 1 - reference_length[sample].sum() / max(length[sample].sum(), 1))
        return float(np.exp(np.log(precisions).mean() + brevity))

    return statistic


def _mean(values: Sequence[float]) -> Callable[[np.ndarray], float]:
    array = np.array(values, dtype=float)
    return lambda sample: float(array[sample].mean())


def accuracy(answers: Sequence[str], expected: Sequence[str]) -> Estimate:
    """The share of answers that are the expected one, word for word."""
    return bootstrap(len(answers), _mean([words(a) == words(b) for a, b in zip(answers, expected, strict=True)]))


def macro_f1(answers: Sequence[str], expected: Sequence[str]) -> Estimate:
    """F1 of each answer that is expected somewhere, averaged over these: rare answers count like frequent ones."""
    classes = sorted({words(text) for text in expected})
    number = {text: index for index, text in enumerate(classes)}
    said = np.array([number.get(words(text), -1) for text in answers])
    right = np.array([number[words(text)] for text in expected])

    def statistic(sample: np.ndarray) -> float:
        scores = []
        for index in range(len(classes)):
            is_said, is_right = said[sample] == index, right[sample] == index
            if is_right.any():
                scores.append(2 * (is_said & is_right).sum() / (is_said.sum() + is_right.sum()))
        return float(np.mean(scores))

    return bootstrap(len(answers), statistic)


def yes_no_metrics(answers: Sequence[str], expected: Sequence[str]) -> dict[str, Estimate]:
    """Accuracy, and F1 of "yes" as POPE counts it (Li et al. 2023, arXiv 2305.10355); the first word decides."""
    said = [words(text).split(" ")[0] for text in answers]
    right = [words(text) for text in expected]
    is_said, is_right = np.array([text == "yes" for text in said]), np.array([text == "yes" for text in right])

    def f1(sample: np.ndarray) -> float:
        total = is_said[sample].sum() + is_right[sample].sum()
        return float(2 * (is_said & is_right)[sample].sum() / total) if total else 0.0

    return {"accuracy": accuracy(said, right), "F1 of yes": bootstrap(len(said), f1)}


def answer_metrics(answers: Sequence[str], expected: Sequence[str]) -> dict[str, Estimate]:
    """What fits the questions: yes/no metrics where all answers are yes or no, else accuracy and macro F1."""
    if {words(text) for text in expected} <= {"yes", "no"}:
        return yes_no_metrics(answers, expected)
    return {
        "accuracy": accuracy(answers, expected),
        "always the same answer": always_the_same(expected),
        "macro F1": macro_f1(answers, expected),
    }


def always_the_same(expected: Sequence[str]) -> Estimate:
    """The accuracy of giving the most frequent answer to every question."""
    right = [words(text) for text in expected]
    frequent, _ = Counter(right).most_common(1)[0]
    return bootstrap(len(right), _mean([text == frequent for text in right]))


def word_error_rate(heard: Sequence[str], spoken: Sequence[str]) -> Estimate:
    """Words wrongly heard, missed or made up, for each word spoken, both sides through Whisper's English normaliser."""
    import jiwer
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    normalize = EnglishTextNormalizer({})
    measured = [jiwer.process_words(normalize(said), normalize(text)) for said, text in zip(spoken, heard, strict=True)]
    errors = np.array([one.substitutions + one.deletions + one.insertions for one in measured], dtype=float)
    total = np.array([one.substitutions + one.deletions + one.hits for one in measured], dtype=float)
    return bootstrap(len(measured), lambda sample: float(errors[sample].sum() / max(total[sample].sum(), 1)))
