"""What mkdocs does with links that leave `docs/`: they are checked, and lead to the repository."""

from __future__ import annotations

import re
from logging import getLogger
from pathlib import Path
from posixpath import normpath
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((\.\./[^)#\s]*)(#[^)\s]*)?\)")

logger = getLogger("mkdocs.hooks.links")


def on_page_markdown(markdown: str, page: Any, config: Any, **kwargs: Any) -> str:
    """On GitHub `../examples` is a link; here it becomes one to the repository, or its text if none is configured.

    Args:
        markdown: of the page.
        page: as mkdocs hands it over.
        config: the settings; `repo_url` says where the repository is.
    """

    def replaced(found: re.Match[str]) -> str:
        text, target, anchor = found.group(1), found.group(2), found.group(3) or ""
        path = normpath(f"docs/{Path(page.file.src_uri).parent}/{target}")
        if path.startswith("docs/"):
            return found.group(0)
        if not (ROOT / path).exists():
            logger.warning(f"{page.file.src_uri} links to {path}, which is not in the repository.")
        if not config.repo_url:
            return text
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"[{text}]({config.repo_url.rstrip('/')}/{kind}/main/{path}{anchor})"

    return LINK.sub(replaced, markdown)
