"""What mkdocs.yml cannot say: which files the site is made of."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

LINK = re.compile(r"\]\(([^)#:\s]+)")  # to a file: neither an anchor nor another site


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Take pages from the whole repository, and whatever else they link to.

    All lie in the site as in the repository, so that links are right in both; mkdocs would take the folder docs/ alone.
    """
    root = Path(config.config_file_path).parent
    pages = {page for pattern in config.extra["pages"] for page in root.glob(pattern)}
    linked = {(page.parent / link).resolve() for page in pages for link in LINK.findall(page.read_text("utf-8"))}
    taken = sorted(pages | {file for file in linked if file.is_file()})
    of_theme = [file for file in files if file.src_dir != config.docs_dir]
    places = str(root), config.site_dir, config.use_directory_urls
    return Files([*of_theme, *(File(str(file.relative_to(root)), *places) for file in taken)])
