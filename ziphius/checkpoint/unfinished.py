"""What an interrupted conversion leaves, so that the next one need not begin anew.

Shards are written into ``.NAME.converting`` beside the target, which has a journal: what is being
converted, how, and size and SHA-256 of every finished shard. When all are there they get a second
name in the folder that takes the target's place in one step (``replace_directory``), and the first
ones are removed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ziphius.checkpoint.files import MANIFEST, flush, sha256_of
from ziphius.config.errors import BadInput, ZiphiusError

_JOURNAL = "conversion.json"
_FORMAT = 1
_LOCK = "lock"


class Unfinished:
    """The shards of a conversion that are finished, while the others are written.

    ``options`` and ``source``, both JSON, say which conversion it is; ``source`` has a ``folder``
    and whatever else says that it is as it was. What another source or other options made is never
    taken over: ``claimed`` raises BadInput. What a source made before it was changed is thrown
    away, and so is everything that is not ``resumable``. ``checked`` says that this very source was
    found sound before. ``complete`` is to be set when all shards are finished.
    """

    def __init__(
        self,
        target: Path,
        options: Mapping[str, Any],
        source: Mapping[str, Any],
        *,
        resumable: bool = True,
    ) -> None:
        self.target = Path(os.path.realpath(target))
        self.folder = unfinished_folder(self.target)
        self.shards: dict[str, dict[str, Any]] = {}
        self.checked = self.complete = False
        self._resumable = resumable
        self._this = {"options": dict(options), "source": dict(source)}

    def require_end_of(self, folder: Path) -> None:
        """Take it as the end of this conversion that ``folder`` holds its result.

        It does when the process was killed after the end, while it removed what it had left.
        Raises BadInput when the folder holds anything else.
        """
        found, files = _read_journal(self.folder), _manifest_files(folder)
        shards: dict[str, Any] = found.get("shards", {})
        ours = bool(shards) and all(found.get(key) == self._this[key] for key in self._this)
        if not ours or not all(files.get(name) == entry for name, entry in shards.items()):
            raise BadInput(f"{folder}: is not empty: remove it or name another target")
        shutil.rmtree(self.folder, ignore_errors=True)

    def require_room(self, size: int) -> None:
        """Raise BadInput when the disk has less room than ``size`` bytes more."""
        free = shutil.disk_usage(self.folder).free
        # Some file systems say nothing.
        if 0 < free < size:
            raise OSError(
                errno.ENOSPC, f"{size:,} bytes more are needed and {free:,} are free on the disk"
            )

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Begin, or go on, as the only process that converts to this target.

        When the block ends well what is here is removed. If the disk fails, or the process is
        stopped, finished shards stay. If the source cannot be converted nothing stays. Raises
        BadInput where another conversion was interrupted or is at work.
        """
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder, self.target):
                self._take_over()
                try:
                    yield
                except BaseException as error:
                    at_fault = isinstance(error, BadInput) and not self.complete
                    if at_fault or not self._resumable:
                        self.shards.clear()
                    self._clear_up()
                    if isinstance(error, BadInput) and self.shards:
                        raise BadInput(f"{error}; {self._kept()}") from error
                    raise
                self.shards.clear()
                self._clear_up()
        except OSError as error:
            raise self._told(error) from error

    def source_is_sound(self) -> None:
        """Enter that the source's files have the checksums they should have."""
        self.checked = True
        self._write_journal()

    def keep(self, file: str) -> None:
        """Enter a shard that is finished: from now on it outlives this process."""
        path = self.folder / file
        flush(path)
        self.shards[file] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        self._write_journal()

    def verify(self, file: str) -> bool:
        """Say whether a shard is here that is as it was when it was finished."""
        if file not in self.shards:
            return False
        path, entry = self.folder / file, self.shards[file]
        with suppress(FileNotFoundError):
            if path.stat().st_size == entry["bytes"] and sha256_of(path) == entry["sha256"]:
                return True
        del self.shards[file]
        return False

    def hand_over(self, folder: Path) -> None:
        """Give the shards their place in a new folder; they stay here too where links exist."""
        for file in self.shards:
            try:
                os.link(self.folder / file, folder / file)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                    raise
                os.rename(self.folder / file, folder / file)

    def _take_over(self) -> None:
        found = _read_journal(self.folder)
        if found:
            self._require_same(found)
        if found and found["source"] == self._this["source"]:
            self.checked = found["checked"]
            self.shards = found["shards"] if self._resumable else {}
        for path in self.folder.iterdir():
            if path.name not in (_JOURNAL, _LOCK) and path.name not in self.shards:
                path.unlink()
        self._write_journal()

    def _require_same(self, found: Mapping[str, Any]) -> None:
        """Check that what was interrupted is this conversion. Its source may have been changed."""
        ours, theirs = self._this, found
        other = sorted(
            key
            for key in ours["options"].keys() | theirs["options"].keys()
            if ours["options"].get(key) != theirs["options"].get(key)
        )
        place = theirs["source"]["folder"]
        if ours["source"]["folder"] != place:
            other.insert(0, "SOURCE")
        if not other:
            return
        told = [f"{key} {theirs['options'].get(key)}" for key in other if key != "SOURCE"]
        described = f" ({', '.join(told)})" if told else ""
        raise BadInput(
            f"{self.target}: another conversion to it was interrupted, of {place}{described}, "
            f"with {len(theirs['shards'])} finished shards: start that one again, or "
            f"remove {self.folder}, or name another target"
        )

    def _write_journal(self) -> None:
        state = {"checked": self.checked, "shards": self.shards}
        text = json.dumps({"format": _FORMAT, **self._this, **state}, indent=1)
        new = self.folder / f"{_JOURNAL}.new"
        with open(new, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.folder / _JOURNAL)

    def _clear_up(self) -> None:
        """Remove what nobody could use: everything, if no shard is finished."""
        if not self.shards:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for path in self.folder.iterdir():
            if path.name not in (_JOURNAL, _LOCK) and path.name not in self.shards:
                with suppress(OSError):
                    path.unlink()

    def _kept(self) -> str:
        if not self.shards:
            return "nothing is kept"
        return (
            f"{len(self.shards)} finished shards are kept in {self.folder}: start again the same "
            "way to go on, or remove that folder"
        )

    def _told(self, error: OSError) -> ZiphiusError:
        reason = f"{self.target}: not finished: {error.strerror or error}: {error.filename or ''}"
        advice = {
            errno.ENOSPC: "free more space",
            errno.EDQUOT: "free more space",
            errno.EFBIG: "free more space",
            errno.EACCES: "choose a folder in which you may write",
            errno.EPERM: "choose a folder in which you may write",
            errno.EROFS: "choose a folder in which you may write",
        }.get(error.errno or 0)
        text = "; ".join(part for part in (reason.rstrip(": "), advice, self._kept()) if part)
        return BadInput(text) if advice else ZiphiusError(text)


def unfinished_folder(target: Path) -> Path:
    """Return where the finished shards of a conversion to ``target`` lie until its end."""
    target = Path(os.path.realpath(target))
    return target.parent / f".{target.name}.converting"


def finished_shards(target: Path) -> int:
    """Return how many shards an interrupted conversion to ``target`` has left."""
    return len(_read_journal(unfinished_folder(target)).get("shards", {}))


def _manifest_files(folder: Path) -> dict[str, Any]:
    """Return the entries of a folder's manifest, none where there is no usable one."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return files if isinstance(files, dict) else {}


def _read_journal(folder: Path) -> dict[str, Any]:
    """Return the journal of a folder, empty where there is none that this version understands."""
    try:
        journal = json.loads((folder / _JOURNAL).read_text("utf-8"))
        entries = journal["shards"].values()
        usable = journal["format"] == _FORMAT and isinstance(journal["options"], dict)
        usable = usable and isinstance(journal["source"]["folder"], str)
        usable = usable and isinstance(journal["checked"], bool)
        usable = usable and all(isinstance(e["bytes"] + 0, int) and e["sha256"] for e in entries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return dict(journal) if usable else {}


@contextmanager
def _locked(folder: Path, target: Path) -> Iterator[None]:
    """Make the folder, and hold it as the only process; the lock goes when the process does."""
    with _open_lock(folder, target):
        yield


def _open_lock(folder: Path, target: Path) -> IO[str]:
    while True:
        folder.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            file = open(folder / _LOCK, "a", encoding="utf-8")  # noqa: SIM115  # is the caller's
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise BadInput(
                    f"{target}: is being written by another conversion now: wait for its end, or "
                    "name another target"
                ) from None
            # The one before may have removed the folder while this one waited for its lock.
            if _is_same(file, folder / _LOCK):
                return file
            file.close()


def _is_same(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
