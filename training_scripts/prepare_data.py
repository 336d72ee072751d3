#!/usr/bin/env python
"""Turn captions, labels or easy-VQA into training conversations or evaluation questions.

    python training_scripts/prepare_data.py captions --captions captions.json --splits splits.json --split train \\
        --out train.json
    python training_scripts/prepare_data.py captions --captions captions.json --splits splits.json --split dev \\
        --make descriptions --out dev-captions.json
    python training_scripts/prepare_data.py easy-vqa --split train --images pictures/easy-vqa --out easy.json
    python training_scripts/prepare_data.py split llava_instruct_150k.json --share 0.02 --out train.json --rest dev.json

The output is LLaVA-Instruct JSON. Splits are by picture: all questions about a picture are on the same side.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def at_least_1(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="captions | labels | easy-vqa | split")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", required=True, help="the file to write")
    common.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    common.add_argument("--clean-answers", action="store_true", help="remove punctuation and stop words from answers")

    captions = commands.add_parser("captions", parents=[common], help="captioned pictures")
    captions.add_argument("--captions", required=True, help="COCO or Karpathy JSON, a JSON list, or Flickr8k's list")
    captions.add_argument("--splits", help="JSON: split name → file names (default: the splits in the captions)")
    captions.add_argument("--split", help="convert this split only (default: all pictures)")
    captions.add_argument("--limit", type=at_least_1, help="only the first N pictures")
    captions.add_argument("--folder", default="", help="the pictures' folder, relative to the embedded folder")
    captions.add_argument(
        "--agreement",
        type=at_least_1,
        default=2,
        help="captions that must name the same color or count; 1 gives three times as many questions, slightly less "
        "accurate (default: 2)",
    )
    captions.add_argument("--per-image", type=at_least_1, help="at most N random questions about a picture")
    captions.add_argument(
        "--per-number",
        type=at_least_1,
        help='at most N "how many" questions with the same answer: most captions count two',
    )
    captions.add_argument("--kinds", help='with --make questions: only these kinds, such as "presence,color"')
    captions.add_argument("--apart", action="store_true", help="put every question into its own conversation")
    captions.add_argument(
        "--make",
        choices=("conversations", "captions", "descriptions", "details", "questions"),
        default="conversations",
        help="conversations: captions and questions for training; captions: no questions; descriptions, details or "
        "questions: evaluation entries, one question each (default: conversations)",
    )
    captions.add_argument("--details", action="store_true", help="add descriptions of several sentences")
    captions.add_argument("--only-details", action="store_true", help="write descriptions of several sentences only")

    labels = commands.add_parser("labels", parents=[common], help="labeled pictures: class folders, COCO, VOC, JSON")
    labels.add_argument("--labels", required=True, help="a folder of class folders or of VOC XML, or a JSON file")
    labels.add_argument(
        "--format",
        choices=("list", "folders", "coco", "voc", "daquar"),
        help="list: JSON of images with objects, a label or a scene; daquar: JSON of images with questions and answers "
        "(default: detected)",
    )
    labels.add_argument("--splits", help="JSON: split name → file names")
    labels.add_argument("--split", help="convert this split only (default: all pictures)")
    labels.add_argument("--limit", type=at_least_1, help="only the first N pictures")
    labels.add_argument("--folder", default="", help="the pictures' folder, relative to the embedded folder")
    labels.add_argument(
        "--wordnet",
        metavar="FOLDER",
        help="the folder of WordNet 3.0's data.noun and index.noun, for the kinds that things belong to and for "
        "synonyms (default: labels only)",
    )
    labels.add_argument("--per-image", type=at_least_1, help="at most N random questions about a picture")
    labels.add_argument("--kinds", help='only these kinds of questions, such as "name,room,how many"')
    labels.add_argument(
        "--make",
        choices=("conversations", "questions", "names"),
        default="conversations",
        help="as for captions; names: what a description should mention, for self-critical training",
    )

    easy = commands.add_parser("easy-vqa", parents=[common], help="easy-VQA, from the Python package index")
    easy.add_argument("--split", choices=("train", "test"), default="train", help="(default: train)")
    easy.add_argument("--images", help="also write the pictures to this folder")
    easy.add_argument("--limit", type=at_least_1, help="only the first N pictures")
    easy.add_argument("--folder", default="", help="the pictures' folder, relative to the embedded folder")
    easy.add_argument("--turns", type=at_least_1, default=3, help="questions in a conversation (default: 3)")
    easy.add_argument("--per-image", type=at_least_1, help="at most N random questions about a picture")
    easy.add_argument("--make", choices=("conversations", "questions"), default="conversations", help="as for captions")

    split = commands.add_parser("split", parents=[common], help="split a file of conversations by picture")
    split.add_argument("conversations", help="LLaVA-Instruct JSON")
    split.add_argument("--share", type=float, required=True, help="fraction of the pictures for --rest, 0 to 1")
    split.add_argument("--rest", required=True, help="the second file to write")
    return parser.parse_args()


def main():
    options = parse()

    from mmchat.errors import MmchatError
    from mmchat.training.data.llava_json import write_conversations

    try:
        if options.command == "split":
            from mmchat.training.data.llava_json import split_by_image

            train, rest = split_by_image(options.conversations, options.share, random.Random(options.seed))
            print(f"{write_conversations(options.rest, rest)} conversations in {options.rest}")
            entries = train
        else:
            entries = SOURCES[options.command](options)
        if options.clean_answers:
            from mmchat.training.data.cleaning import clean_answers

            entries = map(clean_answers, entries)
        print(f"{write_conversations(options.out, entries)} conversations in {options.out}")
    except MmchatError as error:
        sys.exit(str(error))


def from_captions(options):
    from mmchat.training.data import captions

    pictures = captions.read_split(options.captions, options.splits, options.split)
    pictures = [in_folder(options.folder, picture) for picture in pictures[: options.limit]]
    random_numbers = random.Random(options.seed)
    if options.make == "descriptions":
        return captions.descriptions(pictures)
    if options.make == "details":
        return captions.details_only(pictures)
    if options.make == "questions":
        return captions.questions_only(pictures, random_numbers, kinds=kinds_of(options))
    if options.only_details:
        return captions.details_to_train_on(pictures, random_numbers)
    return captions.conversations(
        pictures,
        random_numbers,
        with_questions=options.make == "conversations",
        agreement=options.agreement,
        per_image=options.per_image,
        per_number=options.per_number,
        apart=options.apart,
        details=options.details,
    )


def from_easy_vqa(options):
    from mmchat.training.data import easy_vqa

    if options.images:
        count = easy_vqa.extract_pictures(options.images, options.split, options.limit)
        print(f"{count} pictures in {options.images}")
    if options.make == "questions":
        entries = easy_vqa.questions_only(options.split, limit=options.limit)
    else:
        entries = easy_vqa.conversations(
            options.split,
            random.Random(options.seed),
            limit=options.limit,
            turns=options.turns,
            per_image=options.per_image,
        )
    return (in_folder(options.folder, entry) for entry in entries)


def from_labels(options):
    from mmchat.training.data import label_questions, labels
    from mmchat.training.data.naming import Dictionary

    pictures = labels.of_split(labels.read_labels(options.labels, options.format), options.splits, options.split)
    pictures = labels.in_folder(pictures[: options.limit], options.folder)
    random_numbers = random.Random(options.seed)
    dictionary = Dictionary.read(options.wordnet)
    kinds = kinds_of(options)
    if options.make == "conversations":
        return label_questions.conversations(
            pictures, random_numbers, dictionary=dictionary, per_image=options.per_image, kinds=kinds
        )
    if options.make == "names":
        return label_questions.names(pictures, dictionary=dictionary)
    return label_questions.questions_only(pictures, random_numbers, dictionary=dictionary, kinds=kinds)


def kinds_of(options):
    return options.kinds.split(",") if options.kinds else None


def in_folder(folder, entry):
    return {**entry, "image": f"{folder.strip('/')}/{entry['image']}"} if folder else entry


SOURCES = {"captions": from_captions, "labels": from_labels, "easy-vqa": from_easy_vqa}

if __name__ == "__main__":
    main()
