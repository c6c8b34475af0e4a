"""JSON is UTF-8 on every system, and files can be linked where there are no links."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_semicml.data.files import link_file, read_json, write_json

CONTENT = {"channel_names": {"0": "T1 µ", "1": "Ödem"}}


def test_json_is_utf8_whatever_the_system_prefers(tmp_path: Path):
    file = tmp_path / "dataset.json"
    file.write_bytes('{"channel_names": {"0": "T1 µ", "1": "Ödem"}}'.encode())
    program = (
        "import sys; from pathlib import Path; from nnunetv2_semicml.data.files import read_json; "
        f"assert read_json(Path({str(file)!r})) == {CONTENT!r}"
    ).encode("ascii", "backslashreplace")
    environment = os.environ | {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", program.decode()], check=True, env=environment)


def test_json_is_read_as_written_in_a_new_folder(tmp_path: Path):
    write_json(tmp_path / "new" / "dataset.json", CONTENT)
    assert read_json(tmp_path / "new" / "dataset.json") == CONTENT


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "Expecting"), (b'{"a": "\xb5"}', "utf-8"), (b'\xef\xbb\xbf{"a": 1}', "BOM")]
)
def test_what_is_no_utf8_json_is_a_value_error(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json")


def test_link_shares_the_content_and_is_no_symbolic_link(tmp_path: Path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("voxels")
    (tmp_path / "alias").symlink_to(source)
    link_file(tmp_path / "alias", target)
    assert not target.is_symlink()
    assert target.samefile(source)


def test_file_is_copied_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: str | Path) -> None:
        raise OSError("no hard links")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("voxels")
    link_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "voxels"
    assert not (tmp_path / "b").samefile(tmp_path / "a")
