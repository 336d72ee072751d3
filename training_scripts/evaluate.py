#!/usr/bin/env python
"""Evaluate weights on questions, with 95% intervals, and compare with their scores when they see no picture.

    python training_scripts/evaluate.py --weights weights/smol --questions dev-captions.json --features features/
    python training_scripts/evaluate.py --weights runs/a runs/b --questions dev.json --images photos/ --beams 3
    python training_scripts/evaluate.py --speech recordings.json

Questions are LLaVA-Instruct JSON, such as prepare_data.py writes with --make descriptions or questions. The last answer
of each conversation is the right one. Entries may have more fields: "kind" groups the results; "accepted" lists all
right names; "references" lists all human texts, which the kinds "caption" and "detail" are scored against. The
condition "shuffled" shows another picture with every question, "blank" a gray one. Recordings are a JSON list of
{"audio": path, "text": transcript}.
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
    data.add_argument("--questions", nargs="+", default=[], help="files of questions with right answers")
    data.add_argument("--features", help="the folder that embed_images.py wrote")
    data.add_argument("--images", help="instead of --features: the folder of the pictures")
    data.add_argument("--speech", help="recordings with transcripts, for the word error rate")
    data.add_argument("--limit", type=int, help="only the first N questions of each file")
    data.add_argument("--preset", help="use this preset's models (default: that of the weights; without any, smol)")
    answers = parser.add_argument_group("answers")
    answers.add_argument("--beams", type=int, default=1, help="1: greedy; more: beam search (default: 1)")
    answers.add_argument(
        "--max-new-tokens",
        type=int,
        help="maximum tokens of an answer (default: 96 for the kind detail, 32 for others)",
    )
    answers.add_argument(
        "--no-repeat-ngram-size", type=int, help="let no n tokens in a row repeat; 0: let them (default: the preset's)"
    )
    answers.add_argument("--batch-size", type=int, default=32, help="questions per batch (default: 32)")
    answers.add_argument(
        "--conditions",
        nargs="+",
        choices=("real", "shuffled", "blank"),
        default=["real", "shuffled", "blank"],
        help="which pictures to show (default: all three)",
    )
    answers.add_argument("--no-perplexity", action="store_true", help="skip the perplexity")
    answers.add_argument("--out", help="also write all results and answers to this JSON file")
    answers.add_argument("--table", metavar="FILE.md", help="also write the results as a Markdown table")
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
    from mmchat.folders import check_writable
    from mmchat.training.evaluation.evaluator import read_items
    from mmchat.training.evaluation.recordings import read_recordings

    results = []
    try:  # the files are read, and those to write are opened, before any model loads
        for path in filter(None, (options.table, options.out)):
            check_writable(path)
        recordings = read_recordings(options.speech) if options.speech else []
        files = {path: read_items(path, options.limit) for path in options.questions}
        if recordings:
            results += evaluate_speech(options, recordings)
        if files:
            results += evaluate_questions(options, files)
    except MmchatError as error:
        sys.exit(str(error))
    print_table(results)
    if options.out:
        Path(options.out).write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    if options.table:
        from mmchat.training.evaluation.evaluator import markdown

        Path(options.table).write_text(markdown(results), encoding="utf-8")


def evaluate_questions(options, files):
    from functools import cache

    from tqdm import tqdm

    from mmchat.checkpoints.weights_folder import default_weights, load_model, preset_for_weights, preset_named
    from mmchat.conversation import SamplingOptions
    from mmchat.device import choose_device
    from mmchat.errors import BadInput, counted
    from mmchat.models.chat_formats import chat_format_of
    from mmchat.models.image_encoder import load_image_encoder
    from mmchat.presets import AUTO, get_preset
    from mmchat.training.data.features import FeatureStore, PictureFolder
    from mmchat.training.evaluation.evaluator import (
        DEFAULT_MAX_NEW_TOKENS,
        MAX_NEW_TOKENS,
        Evaluator,
        condition_features,
        flatten,
        measure,
    )

    device = choose_device()
    if options.weights:
        preset, all_weights = preset_named(options.preset or AUTO, options.weights[0]), options.weights
    else:
        preset = get_preset(options.preset or "smol")
        all_weights = [default_weights(preset)]
    preset = preset_for_weights(preset, all_weights[0])  # all weights must share the first one's image encoder
    encoder = cache(lambda: load_image_encoder(preset.image_encoder).to(device.type))
    if options.features:
        features = FeatureStore(options.features)
        features.check(preset.image_encoder)
    else:
        features = PictureFolder(options.images, encoder())
    names = {name for items in files.values() for item in items for name in item.conversation.images}
    missing = sorted(name for name in names if name not in features)
    if missing:
        raise BadInput(
            f"--features or --images lacks {counted(len(missing), 'picture')} of the questions, such as {missing[0]}."
        )
    limit, limits_by_kind = options.max_new_tokens, {}
    if limit is None:
        limit, limits_by_kind = DEFAULT_MAX_NEW_TOKENS, MAX_NEW_TOKENS
    ngram_size = options.no_repeat_ngram_size
    sampling = SamplingOptions(  # the engine's defaults for questions about images, but for the temperature
        temperature=0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=preset.language_model.no_repeat_ngram_size if ngram_size is None else ngram_size,
        beams=options.beams,
        max_new_tokens=limit,
    )
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
                answers = evaluator.answers(items, shown, sampling, limits_by_kind)
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


def evaluate_speech(options, recordings):
    from mmchat.models.speech_recognition import SpeechRecognizer
    from mmchat.presets import get_preset
    from mmchat.training.evaluation.metrics import word_error_rate

    preset = get_preset(options.preset or "smol")
    recognizer = SpeechRecognizer(preset.speech)
    heard = [recognizer.transcribe(recording.path).text for recording in recordings]
    rate = word_error_rate(heard, [recording.text for recording in recordings])
    return [
        {
            "weights": preset.name,
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
    """Prints a row per metric and a column per weights and condition."""
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
