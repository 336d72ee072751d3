#!/usr/bin/env python
"""Measure the descriptions that `python -m mmchat batch` wrote against what people wrote.

python training_scripts/evaluate.py --answers answers.jsonl --captions captions.json
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", required=True, help='lines with "id" (a picture\'s file name) and "answer"')
    parser.add_argument("--captions", required=True, help='a list of {"image": file name, "captions": [text, …]}')
    options = parser.parse_args()

    from mmchat.training.metrics import corpus_bleu4

    references = {entry["image"]: entry["captions"] for entry in json.loads(Path(options.captions).read_text())}
    answered = [json.loads(line) for line in Path(options.answers).read_text().splitlines()]
    answers = [line["answer"] or "" for line in answered]
    score = corpus_bleu4(answers, [references[line["id"]] for line in answered])
    print(f"BLEU-4 {score:.3f} on {len(answers)} pictures, {len(set(answers))} different answers")


if __name__ == "__main__":
    main()
