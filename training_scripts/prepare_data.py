#!/usr/bin/env python
"""Turn captions into conversations to train on, or into questions to evaluate on.

    python training_scripts/prepare_data.py --captions captions.json --splits splits.json --split train --out train.json
    python training_scripts/prepare_data.py --captions captions.json --splits splits.json --split dev --limit 200 \\
        --questions --images photos/ --out questions.jsonl

captions.json is a list of {"image": file name, "captions": [text, …]}; splits.json maps a split to its file names.
Conversations are LLaVA-Instruct JSON; questions are lines for `python -m mmchat batch`.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", required=True, help="captions of each picture")
    parser.add_argument("--splits", required=True, help="which picture belongs to which split")
    parser.add_argument("--split", default="train", help="the split to convert (default: train)")
    parser.add_argument("--limit", type=int, help="only the first so many pictures of the split")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn by chance (default: 0)")
    parser.add_argument("--questions", action="store_true", help='write "Describe the image." for each picture')
    parser.add_argument("--images", default="", help="with --questions: the folder of the pictures")
    parser.add_argument(
        "--shuffle", action="store_true", help="with --questions: show another picture each time, as a baseline"
    )
    parser.add_argument("--out", required=True, help="the file to write")
    return parser.parse_args()


def main():
    options = parse()

    from mmchat.training.captions import conversations

    captions = {entry["image"]: entry for entry in json.loads(Path(options.captions).read_text())}
    splits = json.loads(Path(options.splits).read_text())
    if options.split not in splits:
        sys.exit(f"{options.splits} has no split '{options.split}', only {', '.join(splits)}.")
    names = splits[options.split][: options.limit]
    if options.questions:
        shown = names[1:] + names[:1] if options.shuffle else names  # splits are in no order, so the next is any other
        lines = [
            json.dumps({"id": name, "image": str(Path(options.images) / other), "question": "Describe the image."})
            for name, other in zip(names, shown, strict=True)
        ]
        Path(options.out).write_text("\n".join(lines) + "\n")
    else:
        lines = list(conversations([captions[name] for name in names], random.Random(options.seed)))
        Path(options.out).write_text(json.dumps(lines, indent=1))
    print(f"{len(lines)} {'questions' if options.questions else 'conversations'} on {len(names)} pictures")


if __name__ == "__main__":
    main()
