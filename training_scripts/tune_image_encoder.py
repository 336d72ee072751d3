#!/usr/bin/env python
"""Tune the image encoder on captions, before the features are computed: it learns to predict their words.

    python training_scripts/tune_image_encoder.py --captions captions.json --splits splits.json --split train \\
        --images photos/ --out runs/encoder
    python training_scripts/embed_images.py --images photos/ --image-encoder runs/encoder --out features/

This step is optional. It starts from EfficientNet-Lite0, trained on ImageNet's classes; captions also name colors and
actions. Train with the encoder that you embed with: a recipe names its folder as "image_encoder", and the trained
weights include it. Never tune on evaluation pictures.
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", required=True, help="COCO or Karpathy JSON, a JSON list, or Flickr8k's list")
    parser.add_argument("--splits", help="JSON: split name → file names (default: the splits in the captions)")
    parser.add_argument("--split", help="tune on this split only (default: all pictures)")
    parser.add_argument("--images", required=True, help="the folder of the pictures")
    parser.add_argument("--out", required=True, help="the folder to write image_encoder.safetensors to")
    parser.add_argument("--epochs", type=float, default=5, help="passes over the pictures (default: 5)")
    parser.add_argument("--lr", type=float, default=3e-4, help="peak learning rate (default: 3e-4)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    options = parser.parse_args()

    from mmchat.errors import MmchatError
    from mmchat.models.image_encoder import load_image_encoder
    from mmchat.presets import EFFICIENTNET_LITE0
    from mmchat.training.data.captions import read_split
    from mmchat.training.tune_image_encoder import tune_image_encoder

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        tune_image_encoder(
            load_image_encoder(EFFICIENTNET_LITE0),
            read_split(options.captions, options.splits, options.split),
            Path(options.images),
            Path(options.out),
            epochs=options.epochs,
            lr=options.lr,
            seed=options.seed,
        )
    except MmchatError as error:
        sys.exit(str(error))
    print(f"Embed pictures with it: python training_scripts/embed_images.py --image-encoder {options.out} …")


if __name__ == "__main__":
    main()
