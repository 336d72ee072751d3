#!/usr/bin/env python
"""Import a checkpoint that another project published.

    python training_scripts/import_checkpoint.py published/ --preset phi-3.5 --out runs/imported
    python training_scripts/import_checkpoint.py adapter/ --projector projection.pth resblock.pth \\
        --end-of-image-token "<eoi>" --preset phi-2 --out runs/imported

It reads PEFT adapter folders and lora_weights.pt, with the projectors of seven projects, which --project names: one
linear layer, two layers, LayerNorm and two layers, or a linear layer followed by residual blocks. It uses every tensor;
one that does not fit is an error. It reads pickled files without running code from them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main():
    from mmchat.checkpoints.known_checkpoints import AUTO, NO_PROJECT, PROJECT_NAMES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="holds the adapter, and the projector unless --projector names its files")
    parser.add_argument("--out", required=True, help="the folder to write; it must be empty")
    parser.add_argument("--preset", default="phi-3.5", help="the preset it was trained for (default: phi-3.5)")
    parser.add_argument("--projector", nargs="+", default=[], help="the projector's files, if their names are unusual")
    parser.add_argument(
        "--end-of-image-token", "--marker", metavar="TOKEN", help="the checkpoint's end-of-image token, if it has one"
    )
    parser.add_argument(
        "--project",
        metavar="NAME",
        choices=PROJECT_NAMES,
        default=AUTO,
        help=f"whose prompt template they learned: {', '.join(PROJECT_NAMES)} (default: {AUTO}, recognized by the "
        f"tensors; {NO_PROJECT}: the chat format's own)",
    )
    parser.add_argument("--image-encoder", help="the CLIP or SigLIP model that the projector reads, on the Hub or here")
    parser.add_argument("--image-features", choices=("patches", "pooled"), help="which of its features")
    parser.add_argument("--image-layer", type=int, help="the layer of the patches")
    parser.add_argument("--class-token", action=argparse.BooleanOptionalAction, help="keep its class token")
    options = parser.parse_args()

    from mmchat.checkpoints.importing import import_checkpoint
    from mmchat.errors import MmchatError
    from mmchat.presets import get_preset

    try:
        report = import_checkpoint(
            options.folder,
            options.out,
            get_preset(options.preset),
            projector_files=options.projector,
            marker_token=options.end_of_image_token,
            project=options.project,
            image_encoder=options.image_encoder,
            image_features=options.image_features,
            image_layer=options.image_layer,
            class_token=options.class_token,
        )
    except MmchatError as error:
        sys.exit(str(error))
    print(report)
    print(f"Chat with the weights: python app.py --preset {options.preset} --weights {options.out}")


if __name__ == "__main__":
    main()
