#!/usr/bin/env python
"""Measure weights on questions, each figure with its 95% interval, beside what they reach without seeing the picture.

    python training_scripts/evaluate.py --weights weights/smol --questions dev-captions.json --features features/
    python training_scripts/evaluate.py --weights runs/a runs/b --questions dev.json --images photos/ --beams 3
    python training_scripts/evaluate.py --speech recordings.json

Questions are LLaVA-Instruct JSON, as prepare_data.py makes them with --make descriptions or questions; the last answer
of each conversation is the right one. Entries may say more: "kind", by which figures are grouped; "accepted", all names
that are right; "references", all that people wrote, against which the kinds "caption" and "detail" are scored.
"shuffled" shows every question with another picture, "blank" with a gray one.
Recordings are a JSON list of {"audio": path, "text": what is said}.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--weights", nargs="+", help="weights folders or checkpoints (default: the preset's own)")
    data.add_argument("--questions", nargs="+", default=[], help="files of questions with their right answers")
    data.add_argument("--features", help="the folder embed_images.py wrote")
    data.add_argument("--images", help="in place of --features: the folder of the pictures")
    data.add_argument("--speech", help="recordings with what is said in them, for the word error rate")
    data.add_argument("--limit", type=int, help="only the first so many questions of each file")
    data.add_argument("--preset", default="smol", help="whose models to use (default: smol)")
    answers = parser.add_argument_group("answers")
    answers.add_argument("--beams", type=int, default=1, help="1: greedy; more: beam search (default: 1)")
    answers.add_argument(
        "--max-new-tokens",
        type=int,
        help="the longest answer (default: 96 tokens to questions of the kind detail, 32 to others)",
    )
    answers.add_argument("--batch-size", type=int, default=32, help="questions answered at a time (default: 32)")
    answers.add_argument(
        "--conditions",
        nargs="+",
        choices=("real", "shuffled", "blank"),
        default=["real", "shuffled", "blank"],
        help="which pictures to show (default: all three in turn)",
    )
    answers.add_argument("--no-perplexity", action="store_true", help="leave the perplexity out")
    answers.add_argument("--out", help="write every figure and answer to this JSON file, too")
    answers.add_argument("--table", metavar="FILE.md", help="write every figure to a Markdown table, too")
    options = parser.parse_args()
    if not options.questions and not options.speech:
        parser.error("name --questions, --speech or both")
    if options.questions and bool(options.features) == bool(options.images):
        parser.error("name either --features or --images")
    return options


def main():
    options = parse()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    from mmchat.errors import MmchatError

    results = []
    try:
        if options.speech:
            results += evaluate_speech(options)
        if options.questions:
            results += evaluate_questions(options)
    except MmchatError as error:
        sys.exit(str(error))
    print_table(results)
    if options.table:
        from mmchat.training.evaluation.evaluator import markdown

        Path(options.table).write_text(markdown(results), encoding="utf-8")
    if options.out:
        Path(options.out).write_text(json.dumps(results, indent=1, ensure_ascii=False))


def evaluate_questions(options):
    from functools import cache

    from tqdm import tqdm

    from mmchat.checkpoints.weights_folder import default_weights, load_model, preset_for_weights
    from mmchat.conversation import SamplingOptions
    from mmchat.device import choose_device
    from mmchat.errors import BadInput
    from mmchat.models.image_encoder import load_image_encoder
    from mmchat.models.prompt import chat_format_of
    from mmchat.presets import get_preset
    from mmchat.training.data.features import FeatureStore, PictureFolder
    from mmchat.training.evaluation.evaluator import (
        DEFAULT_MAX_NEW_TOKENS,
        MAX_NEW_TOKENS,
        Evaluator,
        condition_features,
        flatten,
        measure,
        read_items,
    )

    preset, device = get_preset(options.preset), choose_device()
    all_weights = options.weights or [default_weights(preset)]
    preset = preset_for_weights(preset, all_weights[0])  # whose image encoder the others have to share
    encoder = cache(lambda: load_image_encoder(preset.image_encoder).to(device.type))
    if options.features:
        features = FeatureStore(options.features)
        features.check(preset.image_encoder)
    else:
        features = PictureFolder(options.images, encoder())
    files = {path: read_items(path, options.limit) for path in options.questions}
    names = {name for items in files.values() for item in items for name in item.conversation.images}
    missing = sorted(name for name in names if name not in features)
    if missing:
        raise BadInput(f"{len(missing)} pictures that are asked about are not there, {missing[0]} for one.")
    longest, longer = options.max_new_tokens, {}
    if longest is None:
        longest, longer = DEFAULT_MAX_NEW_TOKENS, MAX_NEW_TOKENS
    sampling = SamplingOptions(temperature=0, repetition_penalty=1.0, beams=options.beams, max_new_tokens=longest)
    results = []
    for weights in all_weights:
        model, tokenizer = load_model(preset, weights, device.dtype)
        evaluator = Evaluator(
            model.to(device.type),
            tokenizer,
            chat_format_of(preset_for_weights(preset, weights)),
            batch_size=options.batch_size,
            progress=lambda batches, doing: tqdm(batches, desc=doing, leave=False),
        )
        for path, items in files.items():
            for condition in options.conditions:
                shown = condition_features(condition, features, items, encoder)
                answers = evaluator.answers(items, shown, sampling, longer)
                metrics = measure(items, answers)
                if not options.no_perplexity:
                    metrics["all"] = {"perplexity": evaluator.perplexity(items, shown)}
                results.append(
                    {
                        "weights": str(weights),
                        "file": Path(path).name,
                        "condition": condition,
                        "beams": options.beams,
                        "metrics": [entry(*found) for found in flatten(metrics)],
                        "answers": [
                            {"id": item.conversation.id, "kind": item.kind, "answer": answer, "expected": item.answer}
                            for item, answer in zip(items, answers, strict=True)
                        ],
                    }
                )
    return results


def evaluate_speech(options):
    from mmchat.models.speech import SpeechRecognizer
    from mmchat.presets import get_preset
    from mmchat.training.evaluation.metrics import word_error_rate
    from mmchat.training.evaluation.recordings import read_recordings

    recordings = read_recordings(options.speech)
    recognizer = SpeechRecognizer(get_preset(options.preset).speech)
    heard = [recognizer.transcribe(recording.path).text for recording in recordings]
    rate = word_error_rate(heard, [recording.text for recording in recordings])
    return [
        {
            "weights": options.preset,
            "file": Path(options.speech).name,
            "condition": "real",
            "metrics": [entry("speech", "word error rate", rate)],
            "answers": [
                {"id": one.name, "answer": text, "expected": one.text}
                for one, text in zip(recordings, heard, strict=True)
            ],
        }
    ]


def entry(kind, metric, estimate):
    from dataclasses import asdict

    return {"kind": kind, "metric": metric, **asdict(estimate)}


def print_table(results):
    """A line for each metric, a column for each of the weights and conditions."""
    from rich.console import Console
    from rich.table import Table

    from mmchat.training.evaluation.evaluator import table as as_text

    columns, rows = as_text(results)
    table = Table(title="95% intervals by bootstrap in brackets")
    for heading in ("file", "kind", "metric", "n"):
        table.add_column(heading)
    for weights, condition in columns:
        table.add_column(f"{Path(weights).name}\n{condition}")
    for row in rows:
        table.add_row(*row)
    Console(width=max(100, 60 + 24 * len(columns))).print(table)


if __name__ == "__main__":
    main()
