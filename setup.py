"""Everything about the package is in pyproject.toml; this only stops a build that would leave half of it out."""

from pathlib import Path

from setuptools import setup

for name in ("kernels", "cli", "eval"):
    if not (Path(__file__).parent / "quantkit" / name).is_dir():
        raise SystemExit(
            f"quantkit/{name} is not a folder: it is committed as a link to ../{name}, and this copy lost the link. "
            "Clone with git and symbolic links switched on (git config core.symlinks true), not from a .zip archive."
        )

setup()
