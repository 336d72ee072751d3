#!/usr/bin/env python
"""Train a projector and a LoRA adapter on conversations about pictures.

    python training_scripts/finetune.py --train train.json --eval dev.json --features features/ --out runs/first

The output folder, and every checkpoint in it, chats: python app.py --weights runs/first
"""

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--train", required=True, help="conversations to learn from, LLaVA-Instruct JSON")
    data.add_argument("--eval", help="conversations to measure the loss on")
    data.add_argument("--features", required=True, help="the folder embed_images.py wrote")
    data.add_argument("--out", required=True, help="the folder for weights and checkpoints")
    model = parser.add_argument_group("model")
    model.add_argument("--preset", default="smol", help="which models to train (default: smol)")
    model.add_argument("--start-from", help="a weights folder to go on from (default: fresh weights)")
    model.add_argument("--rank", type=int, default=16, help="rank of a fresh LoRA adapter (default: 16)")
    model.add_argument("--alpha", type=int, default=32, help="LoRA alpha: the update is scaled by alpha/rank")
    model.add_argument("--dropout", type=float, default=0.0, help="LoRA dropout (default: 0)")
    schedule = parser.add_argument_group("schedule")
    schedule.add_argument("--epochs", type=float, default=1.0, help="passes over the data (default: 1)")
    schedule.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps (default: no limit)")
    schedule.add_argument("--batch-size", type=int, default=32, help="conversations in a step (default: 32)")
    schedule.add_argument("--lr", type=float, default=3e-4, help="of the adapter (default: 3e-4)")
    schedule.add_argument("--projector-lr", type=float, default=1e-3, help="of the projector (default: 1e-3)")
    schedule.add_argument("--warmup", type=float, default=30, help="steps until the full rate (default: 30)")
    schedule.add_argument("--save-steps", type=int, default=200, help="steps between checkpoints (default: 200)")
    schedule.add_argument("--log-steps", type=int, default=10, help="steps between lines of the log (default: 10)")
    schedule.add_argument("--seed", type=int, default=0, help="of weights and order (default: 0)")
    return parser.parse_args()


def main():
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    import torch
    from transformers import TrainingArguments, set_seed

    from mmchat.errors import MmchatError
    from mmchat.presets import get_preset
    from mmchat.training.trainer import finetune

    set_seed(options.seed)
    arguments = TrainingArguments(
        output_dir=options.out,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=options.warmup,
        logging_steps=options.log_steps,
        eval_strategy="steps" if options.eval else "no",
        eval_steps=options.save_steps,
        save_steps=options.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=options.seed,
    )
    try:
        finetune(
            get_preset(options.preset),
            arguments,
            train_file=options.train,
            eval_file=options.eval,
            features=options.features,
            projector_learning_rate=options.projector_lr,
            rank=options.rank,
            alpha=options.alpha,
            dropout=options.dropout,
            start_from=options.start_from,
        )
    except MmchatError as error:
        sys.exit(str(error))
    print(f"Chat with the weights: python app.py --weights {options.out}")


if __name__ == "__main__":
    main()
