"""The description that the package index shows: README.md with absolute links. Everything else is in pyproject.toml.

README's links and pictures are relative, so that they work in a clone, on any host and on any branch. The index has
none of these files, so the links are rewritten when the package is built.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
HOME = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Homepage"]
FILES, IMAGES = f"{HOME}/blob/main/", f"{HOME}/raw/main/"
RELATIVE = r"(?!https?:|mailto:|#|/)"


def absolute(text: str) -> str:
    """Markdown with absolute links: pictures point to the files themselves, other links to their pages."""
    text = re.sub(rf"(!\[[^]]*\]\(){RELATIVE}", rf"\g<1>{IMAGES}", text)
    text = re.sub(rf'(\b(?:src|srcset)="){RELATIVE}', rf"\g<1>{IMAGES}", text)
    return re.sub(rf"(\]\(){RELATIVE}", rf"\g<1>{FILES}", text)


setup(
    long_description=absolute((ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
