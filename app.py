#!/usr/bin/env python
"""Entry point of a Hugging Face Space. `python app.py` is `mmchat serve` with the same flags."""

import sys

from mmchat.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
