#!/usr/bin/env python
"""Export weights as GGUF files for llama.cpp, Ollama and LM Studio.

    python training_scripts/export_gguf.py runs/mine --out gguf/ --type q8_0
    llama-server -m gguf/model.gguf --lora gguf/adapter.gguf --mmproj gguf/mmproj.gguf

mmproj.gguf needs weights trained on CLIP or SigLIP patches with a projector of the kind "llava", or on a LLaVA model;
for other weights, such as smol's, only the text model and the adapter are written.
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
        "--type",
        choices=("f16", "q8_0", "q4_k_m", "f32"),
        default="f16",
        help="the text model's number format (default: f16); q4_k_m needs llama.cpp's llama-quantize on the PATH",
    )
    parser.add_argument("--merge", action="store_true", help="add the adapter to the text model")
    options = parser.parse_args()

    from mmchat.checkpoints.gguf_export import export_gguf
    from mmchat.checkpoints.weights_folder import preset_named
    from mmchat.errors import MmchatError

    try:
        preset = preset_named(options.preset, options.weights)
        exported = export_gguf(options.weights, options.out, preset, options.type, options.merge)
    except MmchatError as error:
        sys.exit(str(error))
    files = (("-m", exported.model), ("--lora", exported.adapter), ("--mmproj", exported.mmproj))
    print(*exported.notes, "Serve it with: llama-server " + " ".join(f"{flag} {file}" for flag, file in files if file))


if __name__ == "__main__":
    main()
