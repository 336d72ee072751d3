#!/usr/bin/env python
"""Export weights as a standard LLaVA folder for transformers, vLLM and other engines.

    python training_scripts/export_llava.py runs/mine --out exported/
    vllm serve exported/ --tensor-parallel-size 2          # then: MMCHAT_SERVER=http://localhost:8000/v1 python app.py

The weights must be trained on CLIP or SigLIP patches with a projector of the kind "llava", or on a LLaVA model. The
adapter is merged into a full-precision copy of the base model.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="a folder that training wrote, or a LLaVA model")
    parser.add_argument("--out", required=True, help="the folder to write; it must be empty")
    parser.add_argument("--preset", default="auto", help="the preset of the weights (default: as they were trained)")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        default="bfloat16",
        help="the data type of the exported weights (default: bfloat16)",
    )
    options = parser.parse_args()

    import torch

    from mmchat.checkpoints.llava_export import export_llava
    from mmchat.checkpoints.weights_folder import preset_named
    from mmchat.errors import MmchatError

    try:
        preset = preset_named(options.preset, options.weights)
        export_llava(options.weights, options.out, preset, getattr(torch, options.dtype))
    except MmchatError as error:
        sys.exit(str(error))
    print(f"Written to {options.out}; serve it with: vllm serve {options.out}")


if __name__ == "__main__":
    main()
