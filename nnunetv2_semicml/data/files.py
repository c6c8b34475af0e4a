"""JSON files and links to files, as all parts of the package read and make them. Imports nothing of the package."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

Json = dict[str, Any]  # the object of a JSON file such as dataset.json or plans


def read_json(file: Path) -> Any:
    """Content of a JSON file, which is UTF-8 whatever the encoding of the system.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON or not UTF-8.
    """
    return json.loads(file.read_text(encoding="utf-8"))


def write_json(file: Path, content: Json | list[Any]) -> None:
    """Write a JSON file, in folders that are made if they are missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=4), encoding="utf-8")


def link_file(source: str | Path, target: Path) -> None:
    """Make a file appear in another place: by a hard link, or as a copy where there can be none.

    A hard link takes no space and, unlike a symbolic link, needs no privileges on Windows and survives when the source
    is moved or deleted.
    """
    try:
        os.link(Path(source).resolve(), target)
    except OSError:  # another drive, or a file system without hard links
        shutil.copy2(source, target)
