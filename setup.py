"""Adds to the wheel what a checkout has beside the package: weights, examples, and what a Space needs.

Everything else is in pyproject.toml. mmchat/bundle.py finds the files in a checkout and in a wheel.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SCREENSHOTS = ("docs/page.png", "docs/page-dark.png", "docs/page-phone.png")
BUNDLED = ("weights", "examples", "app.py", "README.md", "LICENSE", "requirements.txt", *SCREENSHOTS)


class BuildWithBundle(build_py):
    """Copies the package, and the bundled files into its folder `bundled`."""

    def run(self):
        if self.editable_mode:  # an editable install uses the checkout's own files
            return super().run()
        package = Path(self.build_lib) / "mmchat"
        shutil.rmtree(package, ignore_errors=True)  # modules of an earlier build that have been moved since
        super().run()
        for name in BUNDLED:
            target = package / "bundled" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if Path(name).is_dir() else shutil.copy
            copy(name, target)


setup(cmdclass={"build_py": BuildWithBundle})
