#!/usr/bin/env python
"""The entry of a Hugging Face Space, and of a checkout: `python app.py` is `mmchat serve`, with the same flags."""

import sys

from mmchat.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
