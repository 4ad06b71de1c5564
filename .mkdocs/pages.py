"""The site has the repository's tree, so that a relative link is right in both.

What is a page, a picture or a script here is on the site. A link to any other file of the
repository leads to the repository's page of it, or is plain text if the address of the repository
is not known.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ON_SITE = (
    "*.md",
    "docs/*.md",
    "docs/*.py",
    "docs/*.png",
    "docs/*.svg",
    "benchmarks/**/*.md",
    "benchmarks/**/*.png",
    "reference_train/**/*.md",
)
# Its text, its file and the rest of its address, of a link that is not to another site.
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)([^)]*)\)")


def on_files(files: Files, config: Any) -> Files:
    """The files of the site, by their paths in the repository."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for pattern in ON_SITE:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File(uri, str(ROOT), config.site_dir, config.use_directory_urls))
    files.append(File("site.css", str(Path(__file__).parent), config.site_dir, False))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page with its links to files that are not on the site leading to the repository."""

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = (ROOT / page.file.src_uri).parent.joinpath(target).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            return match[0]  # mkdocs warns
        uri = path.relative_to(ROOT).as_posix()
        if files.get_file_from_path(uri):
            return match[0]
        if not config.repo_url:  # built on a developer's machine
            return text
        kind = "tree" if path.is_dir() else "blob"
        return f"[{text}]({config.repo_url.rstrip('/')}/{kind}/main/{uri}{anchor})"

    return LINK.sub(link, markdown)
