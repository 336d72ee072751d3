#!/usr/bin/env python
"""Train the projector alone, with the language model frozen (stage 1).

    python training_scripts/pretrain_projector.py --train train.json --features features/ --out runs/projector
    python training_scripts/finetune_qlora.py --start-from runs/projector --train train.json --features features/

Chat with the output folder, with modest answers: python app.py --weights runs/projector
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main():
    from mmchat.training.recipe import parse_recipe

    recipe = parse_recipe(__doc__, lr=0.0, projector_lr=2e-3, out="runs/projector")

    from mmchat.training.run import run_from_terminal

    run_from_terminal(recipe)


if __name__ == "__main__":
    main()
