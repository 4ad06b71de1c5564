"""The site has the repository's tree, so that a relative link is right in both.

What is a page or a picture here is on the site. A link to any other file of the repository leads to
the repository's page of it.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ON_SITE = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "docs/*.png", "docs/*.svg"),
    *("benchmarks/README.md", "benchmarks/results/*.md", "benchmarks/results/*.png"),
    *("reference_train/README.md", "reference_train/emoji/README.md"),
    *("reference_train/results/**/*.md", "reference_train/results/**/*.png"),
)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


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
        path = (ROOT / page.file.src_uri).parent.joinpath(match[1]).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            return match[1]  # mkdocs warns
        uri = path.relative_to(ROOT).as_posix()
        if files.get_file_from_path(uri):
            return match[1]
        if not config.repo_url:  # built on a developer's machine
            return path.as_uri()
        return f"{config.repo_url.rstrip('/')}/{'tree' if path.is_dir() else 'blob'}/main/{uri}"

    return LINK.sub(link, markdown)
