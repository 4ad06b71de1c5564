"""Names of icons: what an icon shows, whether its name is held out, and its caption."""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

VALIDATION_SHARE = 0.02  # of the names
SEED = 0
# Words that say how an icon is drawn, or which variant it is, but not what it shows. They are
# removed from the names of a set only if the set uses them often (`style_words`).
STYLES = """
outline outlined outlines filled fill solid line linear lines bold thin light regular duotone duo
twotone sharp round rounded broken bulk stroke flat remix color colored colour alt glyph variant
freehand micro mini baseline sm lg xl medium small large
"""
TEMPLATES = (
    "{name}",
    "{name}",
    "{name}",
    "a drawing of {name}",
    "a picture of {name}",
    "an icon of {name}",
    "a small drawing of {name}",
    "{name}, {style}",
    "{name} icon, {set}",
    "{name}, {group}",
)


class Icon(NamedTuple):
    """One icon before it is drawn."""

    key: str  # SET__ICON, by their names in the package
    set: str
    name: str  # what it shows, in words
    style: str  # how it is drawn, in words
    group: str  # its category in the set, or ""
    svg: str


def style_words(names: Sequence[str]) -> set[str]:
    """The words of `STYLES` that at least 2% of a set's names begin or end with."""
    last_words = Counter(name.rsplit("-", 1)[-1] for name in names if "-" in name)
    first_words = Counter(name.split("-", 1)[0] for name in names if "-" in name)
    min_count = 0.02 * len(names)
    return {word for word in STYLES.split() if last_words[word] + first_words[word] >= min_count}


def split_name(icon: str, styles: set[str]) -> tuple[str, list[str]]:
    """Splits an icon's name into what it shows ("alarm clock") and the style words at its ends.

    Numbers at the end are removed. They are sizes, or number the variants of an icon.
    """
    words = [word for word in re.split(r"[-_]+", icon.lower()) if word]
    style = []
    while len(words) > 1 and (words[-1] in styles or re.fullmatch(r"\d+(px)?", words[-1])):
        style.append(words.pop())
    while len(words) > 1 and words[0] in styles:
        style.append(words.pop(0))
    return " ".join(words), [word for word in style if not word[0].isdigit()]


def is_held_out(name: str) -> bool:
    """Whether icons of this name are validation data. It depends on the name only."""
    digest = hashlib.sha256(f"{SEED}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < VALIDATION_SHARE


def caption(icon: Icon, set_title: str, rng: random.Random) -> str:
    """A random caption from the name and, in some templates, the style, the set or the group.

    If the template needs a style or a group and the icon has none, the caption is the name.
    """
    template = rng.choice(TEMPLATES)
    if ("{style}" in template and not icon.style) or ("{group}" in template and not icon.group):
        template = "{name}"
    return template.format(name=icon.name, style=icon.style, set=set_title, group=icon.group)
