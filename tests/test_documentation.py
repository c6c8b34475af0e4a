"""What users read before anything runs: help, which comes at once, examples, commands of pages; citation, wheel."""

import argparse
import doctest
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution, entry_points
from pathlib import Path

import pytest

from nnunetv2_semicml.command_line import PARSERS
from nnunetv2_semicml.ext_trainers import semicml_trainers

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(script.name for script in distribution("nnunetv2-semicml").entry_points)
# runs a console script and prints the packages that were imported for it
RUN = """
import importlib.metadata, sys
before, name = {*sys.modules}, sys.argv[1]
(script,) = importlib.metadata.distribution("nnunetv2-semicml").entry_points.select(name=name)
del sys.argv[0]
try:
    script.load()()
finally:
    print(*{module.partition(".")[0] for module in sys.modules.keys() - before}, file=sys.stderr)
"""
# arguments that are right for argparse and contradict each other
WRONG = [
    ("nnUNetv2_semicml_withhold_labels", "-d 400 --output_id 500 --num_labeled 5 --drop_modality T2"),
    ("nnUNetv2_semicml_plan_and_preprocess", "-d 500 600 --modality_ids 501 502"),
]


def run_lightly(script, *words):
    """Run a console script that need not import more than the standard library and this package."""
    done = subprocess.run([sys.executable, "-c", RUN, script, *words], capture_output=True, text=True)
    imported = {*done.stderr.splitlines()[-1].split()}
    assert imported - sys.stdlib_module_names == {"nnunetv2_semicml"}
    return done


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_does_not_wait_for_imports(script):
    done = run_lightly(script, "-h")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {script} ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_options_are_refused_without_imports(script):
    done = run_lightly(script, "--no_such_option")
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: {script} ")


@pytest.mark.parametrize(("script", "words"), WRONG)
def test_what_contradicts_itself_is_refused_without_imports(script, words):
    done = run_lightly(script, *words.split())
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")


@pytest.mark.parametrize("make_parser", PARSERS)
def test_examples_in_the_help_are_command_lines(make_parser, monkeypatch):
    """Written as shown, however narrow the terminal is."""
    monkeypatch.setenv("COLUMNS", "60")
    parser = make_parser()
    examples = re.split(r"^examples?:\n", parser.format_help(), flags=re.MULTILINE)[1]
    calls = re.findall(rf"{parser.prog}\b([^\n)]*)", examples.replace("\\\n", ""))  # to the end of the line or of $(…)
    assert calls
    for call in calls:
        parser.parse_args(shlex.split(call))


def commands_of_pages():
    """Every command of this package or nnU-Net in a block of a page, with its optional parts."""
    pages = [ROOT / "README.md", ROOT / "dataset_conversion" / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in sorted(pages):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for command in line.split("&&"):
                    text = re.sub(r" \| [^]]*\]", "]", command)  # of alternatives the first
                    words = shlex.split(re.sub(r"[][]", " ", text), comments=True)
                    if words and words[0].startswith("nnUNetv2_"):
                        yield pytest.param(page, words, id=f"{page.stem}: {' '.join(words)}")


class _ParsedError(Exception):
    """Ends a command line when its options are known to be right."""


@pytest.mark.parametrize(("page", "words"), [*commands_of_pages()])
def test_commands_of_pages_are_command_lines(page, words, monkeypatch):
    """Options are right, and trainers exist."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_end(parser, *arguments):
        options, unknown = parse(parser, *arguments)
        assert not unknown
        raise _ParsedError(options)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_end)
    monkeypatch.setattr(sys, "argv", words)
    (script,) = entry_points(group="console_scripts", name=words[0])
    with pytest.raises(_ParsedError) as parsed:
        script.load()()
    options = vars(parsed.value.args[0])
    for trainer in re.findall(r"nnUNetTrainer\w+", " ".join(map(str, options.values()))):
        assert trainer in semicml_trainers.__all__ or f"class {trainer.removesuffix('_50epochs')}(" in page.read_text()


def test_every_script_has_a_parser():
    assert sorted(make_parser().prog for make_parser in PARSERS) == SCRIPTS


def test_page_of_commands_is_current(monkeypatch):
    """Otherwise: make docs."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("PYTHON_COLORS", "1")
    page = runpy.run_path(str(ROOT / "docs" / "commands.py"))["page"]
    assert page() == (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", ["asc", "consistency", "contrastive", "soft_pseudo_label"])
def test_examples_in_docstrings_of_losses_are_right(module):
    done = doctest.testmod(importlib.import_module(f"nnunetv2_semicml.losses.{module}"))
    assert done.attempted
    assert not done.failed


def test_citation_names_the_version():
    (version,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert version == distribution("nnunetv2-semicml").version


def test_wheel_has_all_files_of_the_package(tmp_path):
    """The converters, too, which lie elsewhere in the repository."""
    package = ROOT / "nnunetv2_semicml"
    files = {
        *package.rglob("*.py"),
        *package.rglob("*.jinja"),
        *package.rglob("*.css"),
        *(ROOT / "dataset_conversion").glob("*.py"),
    }
    copy = tmp_path / "copy"
    for file in (*files, *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))):
        target = copy / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, copy], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        str(file.relative_to(ROOT)).replace("dataset_conversion", "nnunetv2_semicml/dataset_conversion")
        for file in files
    }
    assert held == expected
