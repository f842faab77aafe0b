"""What a conversion has written before it is complete: to be gone on with, or thrown away."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from ..untrusted import check_file, parse_json, read_json
from .writer import part_of, sync, write_text

MANIFEST = "conversion.json"
_FINGERPRINT, _NOTES, _RESULT = "fingerprint", "notes", "result"


class Unfinished:
    """`DST.unfinished`, from which the result is moved to `DST` when it is complete.

    There is a fingerprint as long as there is anything else: the folder is given it first and loses it last, so that
    a folder with a fingerprint is a conversion's, and what was written is never mixed with another conversion's.

    Args:
        destination: `DST`.
        fingerprint: what all conversions that end with the same bytes have in common, 64 hexadecimal digits.
    """

    def __init__(self, destination: Path, fingerprint: str) -> None:
        self.destination = destination
        self.fingerprint = fingerprint
        self.folder = destination.with_name(f"{destination.name}.unfinished")
        self.result = self.folder / _RESULT
        self._notes = self.folder / _NOTES
        self._state = self.folder / _FINGERPRINT
        self._lock: int | None = None

    def is_finished(self, verified: bool) -> bool:
        """Whether `DST` is, whole, what an equal conversion has written, and `verified` if that is asked for."""
        try:
            manifest = read_json(self.destination / MANIFEST)
            files = {product["file"] for entry in manifest["tensors"] for product in entry["products"]}
            enough = manifest["verified"] or not verified
            equal = manifest["fingerprint"] == self.fingerprint
            return bool(equal and enough and all((self.destination / file).is_file() for file in files))
        except (OSError, ValueError, KeyError, TypeError):  # damaged, or another's
            return False

    def begin(self, resume: bool) -> None:
        """Make the folder, or keep the whole shards that an equal conversion has left in it. No other conversion may
        have it until `release`.

        Raises:
            ValueError: something else is there, or what another conversion has left and `resume` asks to go on with,
                or what another writes at this moment.
            OSError: the folder cannot be made.
        """
        self._refuse_foreign()
        if self._is_folder():
            self._take()
        begun = self._read_fingerprint()
        if resume and begun not in (None, self.fingerprint):
            raise ValueError(
                f"{self.folder} was begun from another source or with other arguments: remove it, or convert as then."
            )
        if begun is None or not resume:
            self._remove()
            self._make()
        self._notes.mkdir(exist_ok=True)
        self.result.mkdir(exist_ok=True)
        for path in self.result.iterdir():
            if not self._notes_of(path.name).is_file():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _refuse_foreign(self) -> None:
        if self._is_folder():
            ours = {_FINGERPRINT, _NOTES, _RESULT} if self._read_fingerprint() else set()
            foreign = {path.name for path in self.folder.iterdir()} - ours - {part_of(self._state).name}
            if foreign:
                raise ValueError(
                    f"{self.folder} holds `{min(foreign)}`, which no interrupted conversion has left there: move the "
                    "folder, or choose another destination."
                )
        elif os.path.lexists(self.folder):
            raise ValueError(f"{self.folder} is there already and no folder: move it, or choose another destination.")

    def _is_folder(self) -> bool:
        return self.folder.is_dir() and not self.folder.is_symlink()

    def _read_fingerprint(self) -> str | None:
        if not self._state.is_file():
            return None
        text = self._state.read_text(encoding="utf-8", errors="replace")
        return text if re.fullmatch("[0-9a-f]{64}", text) else None

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True)
            self._take()
            write_text(self._state, self.fingerprint)
        except FileExistsError as error:
            raise self._in_use() from error
        except OSError as error:
            raise OSError(
                f"{self.folder} cannot be made ({error.strerror}): choose a destination in a folder that can be "
                "written to."
            ) from error

    def _take(self) -> None:
        """Lock the folder; the lock ends with the process."""
        self.release()
        if fcntl is None:
            return
        try:
            self._lock = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._lock), os.stat(self.folder)):
                raise FileExistsError("Another has made it anew since it was opened.")
        except (BlockingIOError, FileExistsError, FileNotFoundError) as error:
            self.release()
            raise self._in_use() from error
        except OSError:  # a file system without locks
            pass

    def release(self) -> None:
        """Let another conversion have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _in_use(self) -> ValueError:
        return ValueError(f"{self.folder} is there already, and another conversion writes it at this moment.")

    def write_notes(self, shard: str, notes: Any) -> None:
        """Keep what is to be known of a shard, which is not begun anew once both are there."""
        write_text(self._notes_of(shard), json.dumps(notes))

    def read_notes(self, shard: str) -> Any:
        """The notes of a whole shard, or None where it is still to be written."""
        if not (self.result / shard).is_file():
            return None
        try:
            return parse_json(check_file(self._notes_of(shard)).read_bytes())
        except ValueError:  # not there, or damaged
            return None

    def drop(self, shard: str) -> None:
        """Have a shard written again."""
        self._notes_of(shard).unlink(missing_ok=True)
        (self.result / shard).unlink(missing_ok=True)

    def remove_if_nothing_is_written(self) -> None:
        """Leave no folder behind that holds no shard."""
        if not any(self._notes.iterdir()):
            self._remove()

    def _notes_of(self, shard: str) -> Path:
        return self._notes / f"{shard}.json"

    def finish(self) -> None:
        """Give the result its name, once every file of it is on the disk."""
        for path in self.result.rglob("*"):
            sync(path)
        sync(self.result)
        self.result.rename(self.destination)
        sync(self.destination.parent)
        self.clean_up()

    def clean_up(self) -> None:
        """Remove what is left beside a result that has its name."""
        if self._read_fingerprint() == self.fingerprint:
            self._remove()
        self._remove_if_empty()

    def _remove(self) -> None:
        if not self._is_folder():
            return
        for folder in (self.result, self._notes):
            if folder.is_dir():
                shutil.rmtree(folder)
        for file in (part_of(self._state), self._state):
            file.unlink(missing_ok=True)
        self._remove_if_empty()

    def _remove_if_empty(self) -> None:
        if self._is_folder() and not any(self.folder.iterdir()):
            self.folder.rmdir()
