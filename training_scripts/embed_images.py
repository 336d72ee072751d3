#!/usr/bin/env python
"""Compute the features of a folder of pictures once, so that training never encodes a picture.

    python training_scripts/embed_images.py --images photos/ --out features/

Run it again after adding pictures, or after it was stopped: what is done is kept. Files that are no readable pictures
are listed and left out.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="a folder of pictures; folders in it are searched too")
    parser.add_argument("--out", required=True, help="the folder to write the features to")
    parser.add_argument("--preset", default="smol", help="whose image encoder to use (default: smol)")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures encoded at a time (default: 16)")
    parser.add_argument(
        "--mirror", action="store_true", help='embed every picture mirrored, too, as "mirrored/" and its name'
    )
    parser.add_argument(
        "--image-encoder",
        help="in its place: a CLIP or SigLIP model, by its name on the Hub or "
        "folder; a folder with an encoder of tune_image_encoder.py; or efficientnet-lite0, as ImageNet made it",
    )
    parser.add_argument(
        "--image-features", choices=("patches", "pooled"), default="patches", help="what is taken of it (patches)"
    )
    parser.add_argument("--image-layer", type=int, default=-2, help="whose patches are taken (default: -2)")
    parser.add_argument("--class-token", action="store_true", help="its class token is taken with the patches")
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
        print(f"{name} left out: {reason}")
    print(f"{report.embedded} pictures embedded, {report.kept} kept from before, {len(report.unreadable)} unreadable")


if __name__ == "__main__":
    main()
