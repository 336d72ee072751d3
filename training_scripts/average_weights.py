#!/usr/bin/env python
"""Average the weights of a run and of a run that started from it.

    python training_scripts/average_weights.py runs/first runs/second --share 0.6 --out runs/average

A run that starts from another may gain on some questions and lose on others. An average of the two is often better
than both. Measure a few shares with evaluate.py on pictures that neither run has seen.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="the weights folder or checkpoint that the second started from")
    parser.add_argument("second", help="the weights folder or checkpoint of the later run")
    parser.add_argument(
        "--share",
        type=float,
        default=0.5,
        help="interpolation coefficient: 0 gives the first, 1 the second (default: 0.5)",
    )
    parser.add_argument("--out", required=True, help="the folder to write, empty or new")
    options = parser.parse_args()

    from mmchat.errors import MmchatError
    from mmchat.training.averaging import average_weights

    try:
        average_weights(options.first, options.second, options.share, options.out)
    except MmchatError as error:
        sys.exit(str(error))
    print(f"Chat with the weights: python app.py --weights {options.out}")


if __name__ == "__main__":
    main()
