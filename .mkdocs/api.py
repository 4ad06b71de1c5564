"""Write docs/api.md from the docstrings and signatures of the public names.

    python .mkdocs/api.py

Nothing is imported: griffe2md reads the source. Needs Python 3.11 and
`pip install -r .ci/requirements.txt`.
"""

import re
from pathlib import Path

from griffe import Alias, ExprCall, GriffeLoader, Object, Parser
from griffe2md import ConfigDict, render_object_docs

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/api.md"
HEAD = """\
# API reference

What each public class and function takes, returns and raises.
N is the number of pairs in the global batch, n the number of rows of one rank, and D the feature
size.
`make api` writes this page from the docstrings.
[`cyclip_loss.reference`](../cyclip_loss/reference.py) has the same losses as plain formulas with
N x N matrices, also for second derivatives; the tests compare everything with it.
"""
CONFIG = ConfigDict(
    docstring_section_style="list",
    line_length=100,
    inherited_members=False,
    members=["forward"],
    separate_signature=True,
    show_bases=False,
    show_object_full_path=False,
    show_root_full_path=False,
    show_root_members_full_path=False,
    show_signature_annotations=True,
    summary=False,
)


def public_objects() -> dict[str, list[Object | Alias]]:
    """The sections of the page: the objects in `__all__` but for the definition, `reference`."""
    loader = GriffeLoader(
        search_paths=[ROOT],
        docstring_parser=Parser("google"),
        # One entry of `Args` may describe several arguments.
        docstring_options={"warn_unknown_params": False, "warn_missing_types": False},
    )
    package = loader.load("cyclip_loss")
    loader.resolve_aliases(external=False)
    assert package.exports is not None
    public = []
    for name in map(str, package.exports):
        item = package[name]
        # `cached_backward` is a function, and the module that has it.
        if item.is_module and name in item.members:
            item = item[name]
        if name != "reference":
            public.append(item)
    return {
        "The classes": [item for item in public if item.is_class],
        "The functions": [item for item in public if item.is_function],
    }


def markdown(item: Object | Alias, heading_level: int) -> str:
    """The documentation of one object, in Markdown that GitHub and the site show alike."""
    for parameter in item.parameters:
        # A field of a module is `option(default, check)`.
        if isinstance(parameter.default, ExprCall) and str(parameter.default.function) == "option":
            parameter.default = parameter.default.arguments[0]
    text = render_object_docs(item, {**CONFIG, "heading_level": heading_level})
    # The types of arguments are in the signature. griffe2md links the types of errors to nowhere.
    text = re.sub(r" \(<code>.*?</code>\) –", " –", text)
    text = re.sub(r"<code>(.*?)</code>", lambda code: f"`{without_links(code[1])}`", text)
    # The lines of an example, up to the next empty line.
    text = re.sub(r"(?m)^>>> (?:.+\n)+", r"```pycon\n\g<0>```\n", text)
    return re.sub(r"docs/(\w+)\.md", r"[docs/\1.md](\1.md)", text)


def without_links(text: str) -> str:
    """The text with the words of each Markdown link in its place."""
    return re.sub(r"\[([^\]]+)\]\(#[^)]*\)", r"\1", text)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, items in public_objects().items():
        parts += [f"## {title}\n", *(markdown(item, heading_level=3) for item in items)]
    text = "\n".join(parts)
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
