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

    from mmchat.errors import BadInput
    from mmchat.image_encoder import load_image_encoder, open_image
    from mmchat.presets import get_preset
    from mmchat.training.data import FeatureStore

    def readable(path):
        try:
            open_image(path)
        except BadInput as error:
            print(f"{path.name} skipped: {error}")
            return False
        return True

    preset = get_preset(options.preset).image_encoder
    encoder = load_image_encoder(preset)
    paths = [path for path in sorted(Path(options.images).iterdir()) if readable(path)]

    def batches():
        for start in tqdm(range(0, len(paths), options.batch_size), unit="batch"):
            chosen = paths[start : start + options.batch_size]
            yield encoder.encode([open_image(path) for path in chosen]).half().numpy()

    FeatureStore.write(options.out, preset.name, [path.name for path in paths], batches())


if __name__ == "__main__":
    main()
