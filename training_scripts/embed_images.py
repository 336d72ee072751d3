#!/usr/bin/env python
"""Compute the features of a folder of pictures once, so that training need not encode them.

    python training_scripts/embed_images.py --images photos/ --out features/

Run it again after adding pictures: finished features are kept. If interrupted, it resumes where it stopped. Unreadable
files are listed and skipped.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="a folder of pictures, with any subfolders")
    parser.add_argument("--out", required=True, help="the folder to write the features to")
    parser.add_argument("--preset", default="smol", help="use this preset's image encoder (default: smol)")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures per batch on a GPU (default: 16)")
    parser.add_argument(
        "--mirror", action="store_true", help='also embed every picture mirrored, under "mirrored/" and its name'
    )
    parser.add_argument(
        "--image-encoder",
        help="instead of the preset's: a CLIP or SigLIP vision model (Hub name or folder), a folder that "
        "tune_image_encoder.py wrote, efficientnet-lite0 or efficientnet-lite2, as trained on ImageNet",
    )
    parser.add_argument(
        "--image-features", choices=("patches", "pooled"), default="patches", help="which features to use (patches)"
    )
    parser.add_argument("--image-layer", type=int, default=-2, help="the layer of the patches (default: -2)")
    parser.add_argument("--class-token", action="store_true", help="put the class token before the patches")
    options = parser.parse_args()

    from tqdm import tqdm

    from mmchat.device import choose_device
    from mmchat.errors import MmchatError
    from mmchat.models.image_encoder import find_image_encoder, load_image_encoder
    from mmchat.presets import HubRepository, get_preset
    from mmchat.training.data.features import embed_folder

    try:
        preset = get_preset(options.preset).image_encoder
        if options.image_encoder:
            repository = HubRepository(options.image_encoder)
            preset = find_image_encoder(repository, options.image_features, options.image_layer, options.class_token)
        report = embed_folder(
            options.images,
            options.out,
            preset,
            load_image_encoder(preset).to(choose_device().type),
            batch_size=options.batch_size,
            mirror=options.mirror,
            progress=lambda pictures, total: tqdm(pictures, total=total, unit="picture"),
        )
    except MmchatError as error:
        sys.exit(str(error))
    for name, reason in report.unreadable.items():
        print(f"{name} skipped: {reason}")
    print(f"{report.embedded} pictures embedded, {report.kept} up to date, {len(report.unreadable)} unreadable")


if __name__ == "__main__":
    main()
