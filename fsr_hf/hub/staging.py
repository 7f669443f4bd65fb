"""The output folder of an export: made beside its place, moved there when it is complete."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.utils import logging

from .manifest import MANIFEST, Fingerprint, folder_files, read_manifest


__all__ = ["beside", "staging_folder"]

logger = logging.get_logger(__name__)

# A hidden file in a folder that an export is filling or has moved away: after a kill, the next export may clean it up.
_MARK = ".fsr-hf-export"


def beside(output_dir: Path, state: str) -> Path:
    """The name beside `output_dir` of what is `incomplete` or `replaced`, and of the lock."""
    return output_dir.with_name(f"{output_dir.name}.{state}")


@contextmanager
def staging_folder(output_dir: Path, force: bool) -> Iterator[Path]:
    """
    A new folder `OUTPUT_DIR.incomplete` that becomes `output_dir` at the end, or is gone if anything fails before.

    What was in `output_dir` is moved to `OUTPUT_DIR.replaced` just before and sorted there: what its manifest lists,
    unchanged, is deleted, and the rest stays. A kill leaves the old or the new folder whole; if it came between the
    two renames, the next export first moves the old one back.

    Raises:
        `FileExistsError`: if another export is at work, or something is in the way.
        `ValueError`: if the manifest in `output_dir` cannot be read.
    """
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with _locked(output_dir):
        staging, old = beside(output_dir, "incomplete"), beside(output_dir, "replaced")
        _clean_up(output_dir, old)
        _check(output_dir, staging, old, force)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        (staging / _MARK).touch()
        try:
            yield staging
            if _holds_files(output_dir):
                (output_dir / _MARK).touch()
                output_dir.rename(old)
            staging.replace(output_dir)
            (output_dir / _MARK).unlink()
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            if not output_dir.exists() and (old / _MARK).exists():
                old.rename(output_dir)
            raise
        _clean_up(output_dir, old)
        if old.exists():
            logger.warning(f"{output_dir} held what no export made, or what was edited: it is in {old} now.")


@contextmanager
def _locked(output_dir: Path) -> Iterator[None]:
    file = beside(output_dir, "lock")
    try:
        lock = FileLock(file, timeout=0).acquire()
    except Timeout:
        raise FileExistsError(
            f"`output_dir` {output_dir} is being made by another export: wait for it, or choose another."
        ) from None
    with lock:
        try:
            yield
        finally:
            with suppress(OSError):  # Windows deletes no open file
                file.unlink()


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _check(output_dir: Path, staging: Path, old: Path, force: bool) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(f"`output_dir` {output_dir} is a file: choose another.")
    if _holds_files(staging) and not (staging / _MARK).exists():
        raise FileExistsError(f"{staging} is in the way, and no export left it there: move it away.")
    if not _holds_files(output_dir):
        return
    if not force:
        raise FileExistsError(f"`output_dir` {output_dir} is not empty: choose another, or replace it with `force`.")
    if old.exists():
        raise FileExistsError(f"{old} is in the way of what is in `output_dir` now: move it away.")
    if (output_dir / MANIFEST).exists():
        try:
            read_manifest(output_dir)
        except ValueError as error:
            raise ValueError(
                f"{output_dir} was not replaced: {error}. Remove {MANIFEST} there to keep all else in {old}."
            ) from error


def _clean_up(output_dir: Path, old: Path) -> None:
    """Sorts a replaced folder, or moves it back if a kill came before the new one was in its place."""
    if not (old / _MARK).exists():
        return
    if not output_dir.exists():
        old.rename(output_dir)
        return
    if (old / MANIFEST).exists():
        listed = read_manifest(old).files
        for name in {*folder_files(old)} & listed.keys():
            file = old / name
            if file.is_file() and Fingerprint.of(file) == listed[name]:
                file.unlink()
        (old / MANIFEST).unlink()
    folders = sorted((path for path in old.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True)
    for folder in (folder for folder in folders if not any(folder.iterdir())):
        folder.rmdir()
    (old / _MARK).unlink()
    if not _holds_files(old):
        old.rmdir()
