"""Runs the code on the pages of the documentation."""

import re
from functools import lru_cache

from processes import ROOT

BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


@lru_cache
def blocks(place, language="python"):
    """The blocks of code on a page, such as "README.md", or under a heading of any page."""
    paths = [ROOT / place] if place.endswith(".md") else sorted((ROOT / "docs").glob("*.md"))
    found = []
    for text in (path.read_text() for path in paths):
        for block in BLOCK.finditer(text):
            heading = text[: block.start()].rpartition("\n## ")[2].partition("\n")[0]
            indent, written_in, code = block.groups()
            if written_in == language and (place.endswith(".md") or heading == place):
                found.append(re.sub(f"^{indent}", "", code, flags=re.MULTILINE))
    return found


def run(place, index=0, **names):
    """Run a block with these variables, and return all of its variables."""
    exec(compile(blocks(place)[index], f"block {index} of {place}", "exec"), names)
    return names
