"""Checkpoint folders that are there whole or not at all, and proof that their bytes are unchanged.

A folder is written beside its target under a hidden name, flushed to the disk, and then takes the
target's place in one step. ``manifest.json`` is written last; it has every file's size and SHA-256.

Hidden names say who made them: ``.NAME.writing-TAG`` is unfinished or garbage,
``.NAME.previous-TAG`` is the old folder on its way out, and the tag is ``pid-machine-random``.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ziphius.config.errors import BadInput, ZiphiusError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
CHUNK_BYTES = 8 * 2**20
SHOWN_PROBLEMS = 8
# Between the two renames of a swap a folder is absent for microseconds; longer means a crash.
SWAP_SECONDS = 2.0
_WEIGHT_FILE = re.compile(r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
_TAG = r"\d+-[0-9a-f]{8}-[0-9a-f]{8}"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


def is_weight_file(name: str) -> bool:
    """Say whether a file at the top of a checkpoint holds weights or indexes them."""
    return _WEIGHT_FILE.fullmatch(name) is not None


# Replacing a folder


@contextmanager
def replace_directory(
    target: Path,
    *,
    keep_unknown: bool = True,
    checksums: Mapping[str, str] | None = None,
    before_each: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``target`` when the block ends well.

    A reader sees the complete old folder or the complete new one, also after a crash or a power
    failure: see ``recover_directory``. If the block or the saving fails (Ctrl-C too), ``target``
    is as it was. With ``keep_unknown`` every file of the old folder that the new one lacks is
    kept, except weights, their index and the manifest; the files themselves are shared, not
    copied, where the file system can. Links and folders inside are kept as they are. ``checksums``
    are SHA-256 of new files at the top that were taken already, at the latest when the block ends.
    ``before_each`` is called before the manifest is written and before a file is brought to the
    disk, and may raise to give up.

    Raises BadInput, one line, if ``target`` is a file, a mount point or a folder with something
    other than a checkpoint in it; if the disk is full, read-only or forbidden to this user.
    """
    target = Path(os.path.realpath(target))
    tag = _new_tag()
    new = _sibling(target, "writing", tag)
    try:
        with _told_in_one_line(target, new):
            recover_directory(target)
            _require_replaceable(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            new.mkdir()
            if target.exists():
                shutil.copymode(target, new)
            yield new
            if keep_unknown and target.exists():
                _carry_over(target, new)
            before_each()
            write_manifest(new, checksums)
            _flush_tree(new, before_each)
            _swap(new, target, _sibling(target, "previous", tag))
        flush(target.parent)
    finally:
        _settle(target, tag)


def recover_directory(target: Path, *, alone: bool = False) -> None:
    """Undo what a writer of ``target`` that died has left behind. Call it before reading.

    Unfinished folders are removed if their writer is dead, which only its own machine can tell;
    ``alone`` says that nobody else writes here now, so that every one of them is a dead one's.
    If ``target`` is missing because the writer died between the two renames of a swap, the old
    folder is put back. Nothing is raised where the user may not write.
    """
    target = Path(os.path.realpath(target))
    _sweep(target, alone)
    deadline = time.monotonic() + SWAP_SECONDS
    while not target.exists() and (tags := _tags(target, "previous")):
        if time.monotonic() < deadline:
            time.sleep(0.02)
            continue
        with suppress(OSError):
            os.rename(_sibling(target, "previous", max(tags)), target)
        return


def unfinished_targets(folder: Path) -> list[Path]:
    """List what is being written into a folder, or was when its writer died, sorted."""
    pattern = re.compile(rf"\.(.+)\.(?:writing|previous)-{_TAG}")
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return sorted({folder / match[1] for name in names if (match := pattern.fullmatch(name))})


def remove_directory(target: Path) -> None:
    """Remove a folder: it is there whole or not at all, also after a crash.

    What a crash leaves is ``recover_directory``'s. Raises OSError, and removes nothing, where the
    user may not write.
    """
    leaving = _sibling(target, "writing", _new_tag())
    os.rename(target, leaving)
    _remove(leaving)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that holds either its old content or all of ``data``, whatever happens.

    Raises BadInput for a full, read-only or forbidden disk.
    """
    path = Path(os.path.realpath(path))
    tag = _new_tag()
    temporary = _sibling(path, "writing", tag)
    try:
        with _told_in_one_line(path, temporary):
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, temporary)
            os.replace(temporary, path)
        flush(path.parent)
    finally:
        _remove(temporary)
        _sweep(path)


def _require_replaceable(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise BadInput(f"{target}: is a file, so no checkpoint can be saved there: give a folder")
    if os.path.ismount(target):
        raise BadInput(f"{target}: is a mount point and cannot be replaced: give a folder inside")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise BadInput(
            f"{target}: holds files but no config.json, so it is no checkpoint and is not replaced:"
            " give a new or empty folder"
        )


def _carry_over(old: Path, new: Path) -> None:
    """Give ``new`` what only ``old`` has. A name that ``new`` has already is left alone."""
    for folder, names, files in os.walk(old, onerror=_raise):
        here = new / Path(folder).relative_to(old)
        top = here == new
        for name in [*names, *files]:
            source, goal = Path(folder, name), here / name
            if top and (name == MANIFEST or is_weight_file(name)):
                continue
            if os.path.lexists(goal):
                if name in names and not goal.is_dir():
                    names.remove(name)
            elif source.is_symlink():
                goal.symlink_to(os.readlink(source))
            elif source.is_dir():
                goal.mkdir()
            else:
                _link(source, goal)


def _link(source: Path, goal: Path) -> None:
    try:
        os.link(source, goal)
    except OSError:  # a file system without hard links
        shutil.copy2(source, goal)


def _swap(new: Path, target: Path, previous: Path) -> None:
    """Put ``new`` at ``target``. What was there is afterwards at ``new`` or at ``previous``."""
    if not target.exists():
        os.rename(new, target)
    elif not _exchange(new, target):
        os.rename(target, previous)
        os.rename(new, target)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step (Linux). False where the system or the disk cannot."""
    at_working_directory, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    names = (os.fsencode(a), os.fsencode(b))
    code: int = renameat2(
        at_working_directory, names[0], at_working_directory, names[1], rename_exchange
    )
    return code == 0


def _settle(target: Path, tag: str) -> None:
    """Remove what the writer ``tag`` left, after putting back the old folder if none is there."""
    new, previous = _sibling(target, "writing", tag), _sibling(target, "previous", tag)
    if not os.path.lexists(target):
        with suppress(OSError):
            os.rename(previous, target)
    _remove(new)
    # A half removed folder must not be called "previous": it would be put back.
    with suppress(OSError):
        os.rename(previous, new)
    _remove(new)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


# Hidden names


def _sibling(target: Path, kind: str, tag: str) -> Path:
    return target.parent / f".{target.name}.{kind}-{tag}"


def _new_tag() -> str:
    return f"{os.getpid()}-{_machine()}-{secrets.token_hex(4)}"


def _machine() -> str:
    """Eight digits for the space in which a process number means something."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def _tags(target: Path, kind: str) -> set[str]:
    pattern = re.compile(re.escape(f".{target.name}.{kind}-") + f"({_TAG})")
    try:
        names = os.listdir(target.parent)
    except OSError:
        return set()
    return {match[1] for name in names if (match := pattern.fullmatch(name))}


def _sweep(target: Path, alone: bool = False) -> None:
    for tag in _tags(target, "writing") | _tags(target, "previous"):
        process, machine, _ = tag.split("-")
        if alone or (machine == _machine() and not _is_alive(int(process))):
            _settle(target, tag)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


# The manifest


def write_manifest(folder: Path, checksums: Mapping[str, str] | None = None) -> None:
    """Write ``manifest.json``: size and SHA-256 of every regular file in ``folder``, recursively.

    Symbolic links are not listed: what they point to is not the folder's own. Files in
    ``checksums``, by name, are not read.
    """
    known, files = checksums or {}, {}
    for path in _regular_files(folder):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST:
            digest = known[name] if name in known else sha256_of(path)
            files[name] = {"bytes": path.stat().st_size, "sha256": digest}
    text = json.dumps({"format": MANIFEST_FORMAT, "files": files}, indent=1, sort_keys=True)
    write_atomic(folder / MANIFEST, text.encode() + b"\n")


def check_manifest(
    folder: Path, *, checksums: bool = True, only: Iterable[str] | None = None
) -> None:
    """Compare the files of ``folder`` with its manifest; a folder without one passes.

    Sizes are always compared, contents (SHA-256) with ``checksums``. ``only`` restricts the check
    to the listed files among these names, relative to ``folder``. Files that the manifest does not
    list are not looked at. Raises BadInput that names the files which are missing or differ.
    """
    entries = _read_manifest(folder / MANIFEST)
    names = sorted(entries if only is None else entries.keys() & set(only))
    problems = [text for name in names if (text := _damage(folder, name, entries[name], checksums))]
    if not problems:
        return
    shown = "; ".join(problems[:SHOWN_PROBLEMS])
    more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    raise BadInput(
        f"{folder}: files differ from {MANIFEST}: {shown}{more}: copy the checkpoint again, or "
        f"delete {MANIFEST} if you changed them on purpose"
    )


def manifest_sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of every file that a folder's manifest lists. Raises BadInput."""
    return {name: entry["bytes"] for name, entry in _read_manifest(folder / MANIFEST).items()}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
        entries: dict[str, Any] = manifest["files"]
        known = manifest["format"] == MANIFEST_FORMAT
        usable = all(
            isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)
            for entry in entries.values()
        )
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        known = usable = False
    if not known or not usable:
        raise BadInput(
            f"{path}: is damaged or of a newer version: copy the checkpoint again, or delete this"
            " file to load without checks"
        )
    return entries


def _damage(folder: Path, name: str, entry: dict[str, Any], checksums: bool) -> str | None:
    """Say how the file differs from its manifest entry; None if it does not."""
    path = folder / name
    try:
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size} bytes instead of {entry['bytes']}"
        if checksums and (found := sha256_of(path)) != entry["sha256"]:
            return f"{name} has sha256 {found[:16]}... instead of {entry['sha256'][:16]}..."
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


# The disk


def _regular_files(folder: Path) -> list[Path]:
    walk = os.walk(folder, onerror=_raise)
    paths = [Path(parent, name) for parent, _, names in walk for name in names]
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


def _raise(error: OSError) -> None:
    """Stop at a folder that cannot be listed; ``os.walk`` would pass over it."""
    raise error


def _flush_tree(folder: Path, before_each: Callable[[], None]) -> None:
    for path in (*_regular_files(folder), *(Path(p) for p, _, _ in os.walk(folder, topdown=False))):
        before_each()
        flush(path)


def flush(path: Path) -> None:
    """Return when the file's content, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse this for folders, whose names they write through.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _told_in_one_line(target: Path, new: Path) -> Iterator[None]:
    """Turn the failures of a disk into one line that says what the user can do."""
    try:
        yield
    except ZiphiusError as error:
        if str(new) not in str(error):
            raise
        raise type(error)(str(error).replace(str(new), str(target))) from error
    except OSError as error:
        place = str(error.filename or target).replace(str(new), str(target))
        reason = f"{target}: not saved, nothing there was changed: {error.strerror}: {place}"
        if error.errno in _NO_ROOM:
            files = _regular_files(new) if new.is_dir() else [new]
            size = sum(path.stat().st_size for path in files if path.exists())
            raise BadInput(
                f"{reason}: {size:,} bytes were written before it: free more space, or save"
                " elsewhere"
            ) from error
        if error.errno in _NOT_ALLOWED:
            raise BadInput(f"{reason}: choose a folder in which you may write") from error
        if error.errno == errno.EIO:
            raise ZiphiusError(f"{reason}: the disk fails: save elsewhere") from error
        raise
