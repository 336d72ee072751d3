#!/usr/bin/env python
"""Compute the features of a folder of pictures once, so that training never encodes a picture.

python training_scripts/embed_images.py --images photos/ --out features/
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="a folder of pictures")
    parser.add_argument("--out", required=True, help="the folder to write the features to")
    parser.add_argument("--preset", default="smol", help="whose image encoder to use (default: smol)")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures encoded at a time (default: 16)")
    options = parser.parse_args()

    from tqdm import tqdm

    from mmchat.image_encoder import load_image_encoder, open_image
    from mmchat.presets import get_preset
    from mmchat.training.data import FeatureStore

    preset = get_preset(options.preset).image_encoder
    encoder = load_image_encoder(preset)
    names = sorted(path.name for path in Path(options.images).iterdir() if path.is_file())

    def batches():
        for start in tqdm(range(0, len(names), options.batch_size), unit="batch"):
            chosen = names[start : start + options.batch_size]
            images = [open_image(Path(options.images) / name) for name in chosen]
            yield encoder.encode(images).half().numpy()

    FeatureStore.write(options.out, preset.name, names, batches())


if __name__ == "__main__":
    main()
