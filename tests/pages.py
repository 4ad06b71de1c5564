"""The code on the pages of the documentation."""

import re
from functools import lru_cache
from typing import Any

from processes import ROOT

BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


@lru_cache
def blocks(page: str, language: str = "python") -> list[tuple[str, str]]:
    """The blocks of a page, each with the heading above it."""
    text = (ROOT / page).read_text()
    found = []
    for block in BLOCK.finditer(text):
        indent, written_in, code = block.groups()
        if written_in == language:
            heading = text[: block.start()].rpartition("\n## ")[2].partition("\n")[0]
            found.append((heading, re.sub(f"^{indent}", "", code, flags=re.MULTILINE)))
    return found


def run(code: str, page: str, **names: Any) -> dict[str, Any]:
    """Run code from a page with these variables, and return all of its variables."""
    exec(compile(code, page, "exec"), names)
    return names
