"""What an icon shows, in words: its name, whether the name is held out, and its caption."""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

VALIDATION_SHARE = 0.02  # of the names
SEED = 0
# Words that say how an icon is drawn or which of several it is, not what it shows. They are taken
# off a name only in a set that uses them again and again (`style_words`).
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

    key: str  # the names of set and icon in the package, with "__" between them
    set: str
    name: str  # what it shows, in words
    style: str  # how it is drawn, in words
    group: str  # its category in the set, or ""
    svg: str


def style_words(names: Sequence[str]) -> set[str]:
    """The words of `STYLES` that end or begin at least 2% of a set's names."""
    last_words = Counter(name.rsplit("-", 1)[-1] for name in names if "-" in name)
    first_words = Counter(name.split("-", 1)[0] for name in names if "-" in name)
    least = 0.02 * len(names)
    return {word for word in STYLES.split() if last_words[word] + first_words[word] >= least}


def split_name(icon: str, styles: set[str]) -> tuple[str, list[str]]:
    """An icon's name -> what it shows ("alarm clock"), and the words of style at either end.

    Numbers at the end are taken off, too: they are sizes, or count variants.
    """
    words = [word for word in re.split(r"[-_]+", icon.lower()) if word]
    style = []
    while len(words) > 1 and (words[-1] in styles or re.fullmatch(r"\d+(px)?", words[-1])):
        style.append(words.pop())
    while len(words) > 1 and words[0] in styles:
        style.append(words.pop(0))
    return " ".join(words), [word for word in style if not word[0].isdigit()]


def is_held_out(name: str) -> bool:
    """Whether icons of this name are validation data. It depends on the name alone."""
    digest = hashlib.sha256(f"{SEED}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < VALIDATION_SHARE


def caption(icon: Icon, set_title: str, rng: random.Random) -> str:
    """A caption from the name and, in some templates, the style, the set's title or the group.

    A template that needs a style or a group that the icon lacks is replaced by the name.
    """
    template = rng.choice(TEMPLATES)
    if ("{style}" in template and not icon.style) or ("{group}" in template and not icon.group):
        template = "{name}"
    return template.format(name=icon.name, style=icon.style, set=set_title, group=icon.group)
