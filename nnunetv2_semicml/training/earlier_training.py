"""An earlier training of the same fold: set aside as a whole while a new one runs, and brought back as a whole.

Several folders hold the checkpoints of one training, that of the joint state and those of the modalities' models. A new
training replaces them one after the other, so that one that is killed would leave new models beside old ones.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

EARLIER = "earlier_training"
"""Folder in the folders of a fold for what was there before a new training began, until that is finished."""
_ALL_ASIDE = "all_set_aside"  # file in the first of these folders


class EarlierTraining:
    """What stood in the folders of a fold before the present training.

    Every method can be killed at any moment and called again, after `restore_interrupted`.

    Args:
        folders: where a training writes checkpoints; first that of the joint ones.
    """

    def __init__(self, folders: Sequence[Path]):
        self.folders = folders
        self._mark = folders[0] / EARLIER / _ALL_ASIDE

    def restore_interrupted(self) -> None:
        """Undo a `set_aside` that was killed, in which no other training can have begun."""
        if not self._mark.is_file():
            self._move_back()

    def set_aside(self) -> bool:
        """Make room for a new training; say whether there was anything to set aside.

        What an unfinished training left, which came after the one that stands aside already, is removed.
        """
        if self._mark.is_file():
            if not _is_finished(self.folders[0]):
                self._remove_present()
                return True
            self.forget()  # the last training was killed when it was about to
        if not any(_of_training(folder) for folder in self.folders):
            return False
        for folder in self.folders:
            (folder / EARLIER).mkdir(parents=True, exist_ok=True)
            for path in _of_training(folder):
                path.replace(folder / EARLIER / path.name)
        self._mark.touch()
        return True

    def bring_back(self) -> bool:
        """Have the earlier training again, if the later one has left no joint checkpoint; say whether that was so."""
        if not self._mark.is_file() or any(_checkpoints(self.folders[0])):
            return False
        self._remove_present()
        self._mark.unlink()
        self._move_back()
        return True

    def forget(self) -> None:
        """Remove the earlier training, when the new one is complete."""
        # the mark goes last: without it, what is left would be moved back
        for folder in (*self.folders[1:], self.folders[0]):
            for path in (folder / EARLIER).glob("*"):
                if path != self._mark:
                    _remove(path)
        self._mark.unlink(missing_ok=True)
        self._remove_empty()

    def _remove_present(self) -> None:
        for folder in self.folders:
            for path in _of_training(folder):
                _remove(path)

    def _move_back(self) -> None:
        for folder in self.folders:
            for path in (folder / EARLIER).glob("*"):
                path.replace(folder / path.name)
        self._remove_empty()

    def _remove_empty(self) -> None:
        for folder in self.folders:
            if (folder / EARLIER).is_dir():
                (folder / EARLIER).rmdir()


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint_*.pth"))


def _is_finished(folder: Path) -> bool:
    return (folder / "checkpoint_final.pth").is_file()


def _of_training(folder: Path) -> list[Path]:
    """What a training writes and a later one would mix with its own; logs and pictures go on."""
    return [*_checkpoints(folder), *folder.glob("validation")]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
