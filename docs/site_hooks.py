"""Hooks of the site (mkdocs.yml): pages of the repository outside docs/, and links that work in both places.

The sources link to each other by their paths in the repository, so that they read well there: `../CHANGELOG.md`,
`../benchmarks/results/step-64.md`. The site has the same files in a tree without the folder docs/.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Files outside docs/ that the site shows.
OUTSIDE = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md", "SECURITY.md"),
    *("benchmarks/README.md", "benchmarks/results/*.md", "benchmarks/results/*.svg", "benchmarks/results/*.json"),
)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the repository that the pages link to."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links between the repository's files as links between the site's pages; to any other file, its name only."""
    here = page.file.src_uri
    source = here if (ROOT / here).exists() and _is_outside(here) else f"docs/{here}"

    def rewrite(match: re.Match[str]) -> str:
        image, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        uri = "README.md" if path in ("README.md", "docs") else path.removeprefix("docs/")
        uri = uri + "/README.md" if f"{uri}/README.md" in files.src_uris else uri
        if uri not in files.src_uris:
            return text if (ROOT / path).exists() else match[0]  # what does not exist is an error of the strict build
        return f"{image}[{text}]({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{anchor})"

    return _LINK.sub(rewrite, markdown)


def _is_outside(uri: str) -> bool:
    return any(Path(uri).match(pattern) for pattern in OUTSIDE)
