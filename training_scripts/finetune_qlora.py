#!/usr/bin/env python
"""Train a LoRA adapter and the projector on conversations about pictures (stage 2).

    python training_scripts/finetune_qlora.py --recipe training_scripts/recipes/smol/1-whole.yaml
    python training_scripts/finetune_qlora.py --train train.json --eval dev.json --features features/ --out runs/mine
    python training_scripts/finetune_qlora.py --recipe runs/mine/recipe.yaml --resume

Chat with the output folder, or with any checkpoint in it: python app.py --weights runs/mine
Ctrl-C finishes the step, saves a checkpoint and stops; --resume continues with bit-identical results.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main():
    from mmchat.training.recipe import parse_recipe

    recipe = parse_recipe(__doc__)

    from mmchat.training.run import run_from_terminal

    run_from_terminal(recipe)


if __name__ == "__main__":
    main()
