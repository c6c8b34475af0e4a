"""Writes the tables of hyper-parameters in docs/methods/, which the docstrings of the trainers say: `make docs`.

A page has a place for the table of a trainer, between two comments that are not shown.
"""

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from docstring_parser import parse

from nnunetv2_semicml.ext_trainers import semicml_trainers
from nnunetv2_semicml.training.nnUNetTrainerSemiSupervised import nnUNetTrainerSemiSupervised

PAGES = Path(__file__).parent / "methods"
BASE = nnUNetTrainerSemiSupervised
PLACE = re.compile(r"(?P<begin><!-- hyper-parameters: (?P<trainer>\w+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
# how a method is computed, and not how it can be tuned
DECLARATIONS = {
    "compares_modalities",
    "makes_pseudo_labels",
    "min_modalities",
    "min_unlabeled",
    "mixes_labeled",
    "needs_positions",
    "networks_per_modality",
    "own_image",
    "pairs_labeled",
    "term_weights",
}
STATE = {"better_modality"}


def documented(trainer: type) -> dict[str, str]:
    """Attribute -> what the most derived docstring says of it."""
    found: dict[str, str] = {}
    for of_class in trainer.__mro__:
        for attribute in parse(of_class.__doc__ or "").params:
            found.setdefault(attribute.arg_name, " ".join((attribute.description or "").split()))
    return found


def own_attributes(trainer: type, about: Mapping[str, str]) -> Iterator[str]:
    """What a method has beyond the base of all, or with a value of its own; of the base everything."""
    missing = object()
    added = [of_class for of_class in trainer.__mro__ if of_class not in BASE.__mro__]
    for name in dict.fromkeys([*about, *(name for of_class in added for name in vars(of_class))]):
        value = getattr(trainer, name, missing)
        if name.startswith("_") or name in DECLARATIONS | STATE or not is_setting(value):
            continue
        if trainer is BASE or getattr(BASE, name, missing) != value:
            yield name


def is_setting(value: Any) -> bool:
    """Whether it is data, or a trainer."""
    if isinstance(value, type):
        return issubclass(value, BASE)
    return value is None or isinstance(value, bool | int | float | str | tuple)


def shown(value: Any) -> str:
    """The value as one writes it."""
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, float) and len(repr(value)) > 8:
        return str(Fraction(value).limit_denominator(100))
    return f'"{value}"' if isinstance(value, str) else repr(value)


def table(trainer: type) -> str:
    """A row for each attribute of a trainer."""
    about = documented(trainer)
    rows = ["| attribute | default | meaning, and where the default is from |", "|---|---|---|"]
    for name in own_attributes(trainer, about):
        text = about[name].replace("|", "\\|")
        rows.append(f"| `{name}` | {shown(getattr(trainer, name))} | {text[0].upper()}{text[1:]} |")
    return "\n".join(rows) + "\n"


def filled(page: str) -> str:
    """A page with its tables."""

    def fill(place: re.Match[str]) -> str:
        name = place["trainer"]
        trainer = BASE if name == BASE.__name__ else getattr(semicml_trainers, name)
        return place["begin"] + table(trainer) + place["end"]

    return PLACE.sub(fill, page)


if __name__ == "__main__":
    for file in PAGES.glob("*.md"):
        file.write_text(filled(file.read_text(encoding="utf-8")), encoding="utf-8")
