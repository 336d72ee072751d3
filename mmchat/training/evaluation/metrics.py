"""Metrics of answers against human references, each with a bootstrap confidence interval."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000

# Hedges, with the "I am" and the "but" around them.
HEDGE = re.compile(
    r"\b(?:(?:i am|i['’]m) )?not sure\b(?:,? but\b)?"
    r"|\b(?:perhaps|maybe|might be|may be|looks like|probably|possibly)\b",
    re.IGNORECASE,
)
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
NUMBERS = {word: number for number, word in enumerate(NUMBER_WORDS)} | {"couple": 2, "pair": 2, "both": 2, "dozen": 12}
WEAK_NUMBERS = {"a": 1, "an": 1, "no": 0, "none": 0}  # used only without another number: "a group of three" is 3
ARTICLES = {"a", "an", "the"}
IRREGULAR = {
    "man": "men", "woman": "women", "child": "children", "person": "people", "mouse": "mice", "goose": "geese",
    "foot": "feet", "tooth": "teeth",
}  # fmt: skip
NAME_WORDS = 8  # words of an answer in which a name counts: "This is a picture of a golden retriever" has eight
DETAIL_REFERENCES = 5  # captions that a detailed description is compared with
CONSTANT_CANDIDATES = 50  # most frequent names that are tried as the constant answer


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% confidence interval by bootstrap (Efron 1979)."""

    value: float
    low: float
    high: float
    count: int  # number of questions

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(count: int, statistic: Callable[[np.ndarray], float], seed: int = 0) -> Estimate:
    """Estimates a statistic of ``count`` items and its 95% interval, by resampling the items with replacement.

    Args:
        statistic: computes the value from item indices, [count].
    """
    random_numbers = np.random.default_rng(seed)
    resampled = [statistic(random_numbers.integers(0, count, count)) for _ in range(RESAMPLES)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(float(statistic(np.arange(count))), float(low), float(high), count)


def words(text: str) -> str:
    """Normalizes text for comparison: lower-case words without punctuation, separated by spaces."""
    return " ".join(re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*", text.lower()))


def sentences(text: str) -> list[str]:
    """The sentences of a text, normalized by ``words``."""
    return [found for part in re.split(r"[.!?]+(?:\s|$)", text) if (found := words(part))]


def is_hedged(answer: str) -> bool:
    """Whether an answer expresses doubt."""
    return bool(HEDGE.search(answer))


def statement(answer: str) -> str:
    """An answer without hedges, normalized by ``words``: "Perhaps a dog." → "a dog"."""
    return words(HEDGE.sub(" ", answer))


def share(flags: Sequence[bool]) -> Estimate:
    """The fraction of true flags."""
    return bootstrap(len(flags), _mean(flags))


def caption_metrics(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Estimate]:
    """BLEU-1 to 4 (Papineni et al. 2002), ROUGE-L (Lin 2004) and CIDEr (Vedantam et al. 2015), as COCO computes them.

    ``words`` replaces COCO's tokenizer, which needs Java.

    Args:
        answers: one per picture.
        references: the human captions of each picture.
    """
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    bleu = BleuScorer(n=4)
    for answer, texts in zip(answers, references, strict=True):
        bleu += (words(answer), [words(text) for text in texts])
    bleu.compute_score(option="closest", verbose=0)
    result = {f"BLEU-{order}": bootstrap(len(answers), _corpus_bleu(bleu.ctest, order)) for order in range(1, 5)}
    return result | {"ROUGE-L": rouge_l(answers, references), "CIDEr": cider(answers, references)}


def detail_metrics(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Estimate]:
    """Quality, length and repetition of detailed descriptions.

    CIDEr is computed without its length penalty: the references are captions of one sentence, and the penalty would
    give any description of four sentences a score of zero.

    Args:
        answers: one per picture.
        references: the human captions of each picture; the first DETAIL_REFERENCES are used.
    """
    references = [texts[:DETAIL_REFERENCES] for texts in references]
    return {
        "CIDEr, any length": cider(answers, references, sigma=float("inf")),
        "ROUGE-L": rouge_l(answers, references),
        "sentences": bootstrap(len(answers), _mean([len(sentences(answer)) for answer in answers])),
        "repeated 4-grams": bootstrap(len(answers), _mean([repeated(four_grams(answer)) for answer in answers])),
        "repeated sentences": bootstrap(len(answers), _mean([repeated(sentences(answer)) for answer in answers])),
    }


def cider(answers: Sequence[str], references: Sequence[Sequence[str]], sigma: float = 6.0) -> Estimate:
    """CIDEr-D. ``sigma`` sets the length penalty: a difference of ``sigma`` words multiplies a score by 0.61."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer(n=4, sigma=sigma)
    for answer, texts in zip(answers, references, strict=True):
        scorer += (words(answer), [words(text) for text in texts])
    return bootstrap(len(answers), _mean(scorer.compute_score()[1]))


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Estimate:
    """ROUGE-L: the F-measure of the longest common subsequence; 0 for an empty answer."""
    from pycocoevalcap.rouge.rouge import Rouge

    scores = [
        Rouge().calc_score([words(answer)], [words(text) for text in texts]) if words(answer) else 0.0
        for answer, texts in zip(answers, references, strict=True)
    ]
    return bootstrap(len(answers), _mean(scores))


def four_grams(text: str) -> list[tuple[str, ...]]:
    """The word 4-grams of a text."""
    found = words(text).split()
    return list(zip(found, found[1:], found[2:], found[3:], strict=False))


def repeated(parts: Sequence) -> float:
    """The fraction of parts that repeat an earlier one, 0 to 1."""
    return 1 - len(set(parts)) / len(parts) if parts else 0.0


def _corpus_bleu(tests: list[dict], order: int) -> Callable[[np.ndarray], float]:
    """Corpus BLEU of a sample, summed from pycocoevalcap's counts for each answer."""
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
    """The fraction of answers that match exactly, after normalization and without hedges."""
    return share([statement(a) == statement(b) for a, b in zip(answers, expected, strict=True)])


def macro_f1(answers: Sequence[str], expected: Sequence[str]) -> Estimate:
    """Macro F1: the mean of F1 over the expected answers, so rare answers count as much as frequent ones."""
    classes = sorted({statement(text) for text in expected})
    index_of = {text: index for index, text in enumerate(classes)}
    said = np.array([index_of.get(statement(text), -1) for text in answers])
    right = np.array([index_of[statement(text)] for text in expected])

    def statistic(sample: np.ndarray) -> float:
        scores = []
        for index in range(len(classes)):
            is_said, is_right = said[sample] == index, right[sample] == index
            if is_right.any():
                scores.append(2 * (is_said & is_right).sum() / (is_said.sum() + is_right.sum()))
        return float(np.mean(scores))

    return bootstrap(len(answers), statistic)


def yes_no_metrics(answers: Sequence[str], expected: Sequence[str]) -> dict[str, Estimate]:
    """Accuracy, F1 of "yes" and the fraction of "yes", as in POPE (Li et al. 2023, arXiv 2305.10355).

    Only the first words of the answer and of the right answer are compared.
    """
    said, right = [_first_word(text) for text in answers], [_first_word(text) for text in expected]
    is_said, is_right = np.array([text == "yes" for text in said]), np.array([text == "yes" for text in right])

    def f1(sample: np.ndarray) -> float:
        total = is_said[sample].sum() + is_right[sample].sum()
        return float(2 * (is_said & is_right)[sample].sum() / total) if total else 0.0

    return {"accuracy": accuracy(said, right), "F1 of yes": bootstrap(len(said), f1), "share of yes": share(is_said)}


def _first_word(text: str) -> str:
    return statement(text).split(" ")[0]


def count_metrics(answers: Sequence[str], expected: Sequence[str]) -> dict[str, Estimate]:
    """Accuracy and macro F1 of the numbers in the answers, as words or digits."""
    said = ["" if (number := number_of(text)) is None else str(number) for text in answers]
    return answer_metrics(said, [str(number_of(text)) for text in expected])


def number_of(answer: str) -> int | None:
    """The first number in an answer: "There are three dogs." → 3. Without a number, "a dog" is 1 and "no dog" 0."""
    found = statement(answer).split()
    strong = (int(word) if word.isdecimal() else NUMBERS.get(word) for word in found)
    weak = (WEAK_NUMBERS.get(word) for word in found)
    return next((number for number in (*strong, *weak) if number is not None), None)


def is_number(text: str) -> bool:
    """Whether a right answer consists of a number alone."""
    text = words(text)
    return text.isdecimal() or text in NUMBER_WORDS


def name_metrics(answers: Sequence[str], accepted: Sequence[Sequence[str]]) -> dict[str, Estimate]:
    """Accuracy with several right names per question, and the accuracy of the best constant answer."""
    frequent = Counter(words(name) for names in accepted for name in names).most_common(CONSTANT_CANDIDATES)
    best = max((name for name, _ in frequent), key=lambda name: sum(is_named(name, names) for names in accepted))
    return {
        "accuracy": share([is_named(answer, names) for answer, names in zip(answers, accepted, strict=True)]),
        "always the same answer": share([is_named(best, names) for names in accepted]),
    }


def is_named(answer: str, accepted: Sequence[str]) -> bool:
    """Whether an answer contains an accepted name, as whole words, singular or plural.

    Only the first NAME_WORDS words of the first sentence count, so listing many things does not pay. If they contain
    "no" or "not", no name counts.
    """
    said = next(iter(sentences(HEDGE.sub(" ", answer))), "").split()[:NAME_WORDS]
    return not {"no", "not"} & set(said) and any(_occurs(_without_article(words(name)), said) for name in accepted)


def _without_article(name: str) -> list[str]:
    parts = name.split()
    return parts[1:] if parts and parts[0] in ARTICLES else parts


def _occurs(name: list[str], said: list[str]) -> bool:
    starts = range(len(said) - len(name) + 1) if name else ()
    return any(
        said[start : start + len(name) - 1] == name[:-1] and _same_noun(said[start + len(name) - 1], name[-1])
        for start in starts
    )


def _same_noun(one: str, other: str) -> bool:
    return one == other or one in _plurals(other) or other in _plurals(one)


def _plurals(noun: str) -> set[str]:
    """Possible spellings of a plural; wrong ones among them do no harm."""
    found = {IRREGULAR.get(noun, f"{noun}s")}
    if noun.endswith(("s", "x", "z", "ch", "sh", "o")):
        found.add(f"{noun}es")
    elif noun.endswith(("f", "fe")):
        found.add(f"{noun.removesuffix('e')[:-1]}ves")
    elif noun.endswith("y"):
        found.add(f"{noun[:-1]}ies")
    return found


def answer_metrics(answers: Sequence[str], expected: Sequence[str]) -> dict[str, Estimate]:
    """Accuracy and macro F1 of exact matches."""
    return {
        "accuracy": accuracy(answers, expected),
        "always the same answer": always_the_same(expected),
        "macro F1": macro_f1(answers, expected),
    }


def metrics_for(expected: Sequence[str]) -> Callable[[Sequence[str], Sequence[str]], dict[str, Estimate]]:
    """The metrics for a set of right answers: all yes or no, all numbers, or anything else."""
    if {_first_word(text) for text in expected} <= {"yes", "no"}:
        return yes_no_metrics
    return count_metrics if all(map(is_number, expected)) else answer_metrics


def always_the_same(expected: Sequence[str]) -> Estimate:
    """The majority baseline: the accuracy of the most frequent answer."""
    right = [statement(text) for text in expected]
    frequent, _ = Counter(right).most_common(1)[0]
    return share([text == frequent for text in right])


def word_error_rate(heard: Sequence[str], spoken: Sequence[str]) -> Estimate:
    """Word error rate: substitutions, deletions and insertions per spoken word, after Whisper's English normalizer."""
    import jiwer
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    normalize = EnglishTextNormalizer({})
    measured = [jiwer.process_words(normalize(said), normalize(text)) for said, text in zip(spoken, heard, strict=True)]
    errors = np.array([one.substitutions + one.deletions + one.insertions for one in measured], dtype=float)
    total = np.array([one.substitutions + one.deletions + one.hits for one in measured], dtype=float)
    return bootstrap(len(measured), lambda sample: float(errors[sample].sum() / max(total[sample].sum(), 1)))
