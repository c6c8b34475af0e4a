"""JSON is UTF-8 on every system, files are linked where there are no links, and all is whole or absent."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_semicml.data.files import (
    copy_file,
    explains_failed_writes,
    folder_written_whole,
    is_sound_name,
    link_file,
    read_json,
    remove_unfinished,
    require_sound_names,
    write_json,
    written_whole,
)
from nnunetv2_semicml.data.image_file import write_image
from nnunetv2_semicml.errors import UserError

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


def test_nothing_is_written_through_links(tmp_path: Path):
    """Symbolic or hard: what they lead to stays as it is."""
    (tmp_path / "new").write_text("new")
    for make in ("symlink_to", "hardlink_to"):
        raw, place = tmp_path / "raw", tmp_path / f"place_{make}"
        raw.write_text("raw")
        getattr(place, make)(raw)
        with pytest.raises(FileExistsError):
            link_file(tmp_path / "new", place)
        copy_file(tmp_path / "new", place)
        assert (raw.read_text(), place.read_text()) == ("raw", "new")
        assert not place.is_symlink()
        place.unlink()
        getattr(place, make)(raw)
        write_json(place, [])
        assert (raw.read_text(), place.read_text()) == ("raw", "[]")
        raw.unlink()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    file = tmp_path / "plans.json"
    write_json(file, {"old": 1})
    with pytest.raises(TypeError):
        write_json(file, {"new": object()})
    with pytest.raises(UnicodeEncodeError), written_whole(file) as unfinished:
        print("half", file=unfinished.open("w", 1, encoding="ascii"), end="ö")
    assert read_json(file) == {"old": 1}
    assert [*tmp_path.iterdir()] == [file]


def on_full_disk(code: str, folder: Path, room: int = 1000) -> subprocess.CompletedProcess:
    """Run code where no file may be larger; it finds `folder` and `explains_failed_writes`."""
    program = (
        "import resource, sys; from pathlib import Path\nfolder = Path(sys.argv[1])\n"
        "from nnunetv2_semicml.data.files import *; from nnunetv2_semicml.errors import reports_user_errors\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
        "@reports_user_errors\ndef main():\n    with explains_failed_writes(folder, 'Make room.'):\n        "
        f"{code}\nmain()"
    )
    return subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True)


TOO_LARGE = (
    "that it cannot be written (File too large); expected enough space and the right to write there. Make room.\n"
)


@pytest.mark.parametrize(
    ("code", "file"),
    [
        ("write_json(folder / 'a.json', ['x' * 2000])", "a.json"),
        ("copy_file(folder / 'source', folder / 'target')", "target"),
        ("os.link = lambda *_: os.stat('/nowhere'); link_file(folder / 'source', folder / 'target')", "target"),
    ],
)
def test_a_full_disk_is_a_sentence_that_names_the_file(tmp_path: Path, code: str, file: str):
    (tmp_path / "source").write_bytes(bytes(2000))
    (tmp_path / "a.json").write_text("[]")
    done = on_full_disk(code, tmp_path)
    assert done.stderr == f"Error: {tmp_path / file}: found {TOO_LARGE}"
    assert done.returncode == 1
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.json", "source"]
    assert (tmp_path / "a.json").read_text() == "[]"


def test_blosc2_does_not_say_why_it_fails(tmp_path: Path):
    code = (
        "import numpy; import blosc2; blosc2.asarray(numpy.random.rand(999), urlpath=str(folder / 'a.b2nd'), mode='w')"
    )
    done = on_full_disk(code, tmp_path)
    assert done.stderr.startswith(f"Error: {tmp_path}: found that it cannot be written (blosc2 does not say why; ")
    assert blosc2.asarray(np.zeros(3))[:].tolist() == [0, 0, 0]


def test_other_errors_are_not_explained():
    for error in (OSError(errno.EIO, "broken"), RuntimeError("CUDA out of memory"), ValueError()):
        with pytest.raises(type(error)) as found, explains_failed_writes("here", "Do that."):
            raise error
        assert found.value is error


def test_itk_writes_a_part_of_an_image_and_says_nothing_but_we_do(tmp_path: Path):
    """The reference is ITK itself: the day that it raises an error, `write_image` need not look."""
    noise = np.random.default_rng(0).normal(size=(8, 9, 10))
    image = sitk.GetImageFromArray(noise)
    write_image(image, tmp_path / "whole.nii.gz")
    assert (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "whole.nii.gz"))) == noise).all()
    setup = "import SimpleITK as sitk, numpy; image = sitk.GetImageFromArray(numpy.random.rand(8, 9, 10)); "
    setup += "from nnunetv2_semicml.data.image_file import write_image; "
    done = on_full_disk(f"{setup}sitk.WriteImage(image, str(folder / 'itk.nii.gz'))", tmp_path)
    assert done.returncode == 0
    for room in (0, 1, 100, 1000):
        done = on_full_disk(f"{setup}write_image(image, folder / 'own.nii.gz')", tmp_path, room)
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"Error: {tmp_path / 'own.nii.gz'}: found that it cannot be written (No space left"), (
            room
        )
        assert "Traceback" not in done.stderr
    with pytest.raises(OSError, match="nowhere"):
        write_image(image, tmp_path / "nowhere" / "a.nii.gz")


def test_a_process_killed_in_the_middle_of_a_write(tmp_path: Path):
    file = tmp_path / "a.json"
    write_json(file, ["old"])
    code = (
        "import sys, time; from pathlib import Path; from nnunetv2_semicml.data.files import *\n"
        "with written_whole(sys.argv[1]) as unfinished:\n"
        "    unfinished.write_text('[\"ne'); print('half', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        os.kill(process.pid, signal.SIGKILL)
    assert read_json(file) == ["old"]
    assert len([*tmp_path.iterdir()]) == 2
    remove_unfinished(tmp_path)
    assert [*tmp_path.iterdir()] == [file]


def test_a_new_folder_is_there_at_once_or_not_at_all(tmp_path: Path):
    folder = tmp_path / "Dataset500_A"
    code = (
        "import sys, time; from pathlib import Path; from nnunetv2_semicml.data.files import *\n"
        "with folder_written_whole(Path(sys.argv[1])) as new:\n"
        "    (new / 'half').touch(); print('half', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        with pytest.raises(UserError, match="another process at work"), folder_written_whole(folder):
            pass
        assert not folder.exists()
        os.kill(process.pid, signal.SIGKILL)
    with folder_written_whole(folder) as new:
        assert not [*new.iterdir()]
        (new / "file").touch()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["Dataset500_A", "file"]
    with pytest.raises(UserError, match="found files; expected a new or empty folder"), folder_written_whole(folder):
        pass
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["Dataset500_A", "file"]


SOUND = ["P01", "CASE 1", "Ödem_µ", "a.b-c+d", "-x", "患者", "x" * 200]
UNSOUND = ["", ".", "..", ".hidden", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\nb", "\x1b[2J", "\udce4"]
UNSOUND += ["x" * 201, "ö" * 101, None, 1, ["a"]]


def test_sound_names():
    assert [name for name in SOUND + UNSOUND if is_sound_name(name)] == SOUND
    require_sound_names(SOUND, "here")
    for name in UNSOUND:
        with pytest.raises(UserError, match="here: found the names ") as error:
            require_sound_names([*SOUND, name], "here")
        assert str(error.value).isprintable()


@pytest.mark.parametrize("name", SOUND)
def test_files_can_be_called_by_sound_names(tmp_path: Path, name: str):
    write_json(tmp_path / f"{name}_0000.nii.gz", [])
    assert [f.name for f in tmp_path.iterdir()] == [f"{name}_0000.nii.gz"]
