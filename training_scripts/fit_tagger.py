#!/usr/bin/env python
"""Fit the tagger, which predicts words from a picture's features. The prompt shows its tags to the language model.

    python training_scripts/fit_tagger.py --features features/ --classes imagenet_classes.json \\
        --captions flickr8k=captions.json world=world/captions.json --labels world=world/labels.json --out runs/tagger

The name before "=" is the folder of the pictures, relative to the embedded folder. Pictures without features are
skipped. Never fit on evaluation pictures: embed the training pictures only, or name a split with --splits.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", required=True, help="the folder that embed_images.py wrote")
    parser.add_argument("--preset", default="smol", help="the preset whose image encoder made them (default: smol)")
    parser.add_argument("--classes", required=True, help='the encoder\'s classes in order: JSON list of {"names": […]}')
    parser.add_argument("--captions", nargs="+", default=[], metavar="FOLDER=FILE", help="files of captions")
    parser.add_argument("--labels", nargs="+", default=[], metavar="FOLDER=FILE", help="files of labels or questions")
    parser.add_argument("--splits", nargs="+", default=[], metavar="FOLDER=FILE", help="files of splits")
    parser.add_argument("--split", default="train", help="the split to fit on (default: train)")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    options = parser.parse_args()

    from mmchat.errors import MmchatError
    from mmchat.models.image_encoder import load_image_encoder
    from mmchat.presets import get_preset
    from mmchat.training.data.features import FeatureStore
    from mmchat.training.fit_tagger import Vocabulary, fit_tagger, read_classes

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        encoder = get_preset(options.preset).image_encoder
        features = FeatureStore(options.features)
        features.check(encoder)
        classes = read_classes(options.classes)
        vocabulary = Vocabulary(*read_sources(options))
        tagger = fit_tagger(
            encoder,
            load_image_encoder(encoder).classifier,
            classes,
            vocabulary,
            features,
            Path(options.out),
            options.seed,
        )
    except MmchatError as error:
        sys.exit(str(error))
    print(f"Wrote a tagger with {len(tagger.classes)} classes and {len(tagger.words)} words to {options.out}")


def read_sources(options):
    """Captions and labels, with the picture names of the features."""
    from mmchat.training.data import captions, labels

    splits = dict(pair(text) for text in options.splits)
    captioned, labeled = [], []
    for folder, file in map(pair, options.captions):
        found = captions.read_split(file, splits.get(folder), options.split if folder in splits else None)
        captioned += [{**picture, "image": f"{folder}/{picture['image']}"} for picture in found]
    for folder, file in map(pair, options.labels):
        found = labels.of_split(
            labels.read_labels(file), splits.get(folder), options.split if folder in splits else None
        )
        labeled += labels.in_folder(found, folder)
    return captioned, labeled


def pair(text):
    folder, _, file = text.partition("=")
    return (folder, file) if file else ("", folder)


if __name__ == "__main__":
    main()
