"""Checkpoints that are either whole or not there: written under another name, sealed by a manifest, then renamed."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from chatglm_ptuning.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
PARTIAL_DIRECTORY = ".partial"  # inside the output directory
EARLIER_DIRECTORY = "earlier"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint directories of a run, newest step first."""
    steps = {path: _NAME.fullmatch(path.name) for path in output_dir.glob("checkpoint-*")}
    found = {path: int(match[1]) for path, match in steps.items() if match is not None}
    return sorted(found, key=lambda path: -found[path])


def seal(directory: Path) -> None:
    """Write the manifest, size and SHA-256 of every file, and force all to the disk."""
    manifest = {}
    for file in files_in(directory):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        manifest[file.relative_to(directory).as_posix()] = [file.stat().st_size, digest]
    with (directory / MANIFEST_FILE).open("w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    fsync_directory(directory)


def publish(partial: Path, final: Path) -> None:
    """Give a sealed checkpoint its name, in place of a damaged one that has it."""
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    fsync_directory(final.parent)


def fsync_directory(directory: Path) -> None:
    """Force the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files_in(directory: Path) -> Iterator[Path]:
    """All files of a checkpoint but its manifest, in order."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != MANIFEST_FILE:
            yield path


def damage(directory: Path) -> str | None:
    """What keeps a checkpoint from being resumed from; None if it is whole."""
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
    except OSError:
        return f"it has no {MANIFEST_FILE}"
    except ValueError:
        return f"its {MANIFEST_FILE} is damaged"
    for name, (size, digest) in manifest.items():
        file = directory / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} bytes, not {size:,}"
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                return f"{name} is damaged"
    return None


def find_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint; one line for every newer one that is skipped."""
    for directory in checkpoints(output_dir):
        problem = damage(directory)
        if problem is None:
            return directory
        logger.warning("skipping %s: %s", directory, problem)
    return None


def require_whole(directory: Path) -> Path:
    """A checkpoint that was named.

    Raises:
        UserError: It is not there or not whole.
    """
    if not directory.is_dir():
        raise UserError(
            f"training.resume_from_checkpoint must be true or a checkpoint directory, got {str(directory)!r}"
        )
    problem = damage(directory)
    if problem is not None:
        raise UserError(
            f"the checkpoint must be whole, got {directory}: {problem}; set training.resume_from_checkpoint=true "
            "to go on from the newest whole one"
        )
    return directory


def set_aside(output_dir: Path, resumed: Path | None) -> Path | None:
    """Move checkpoints out of a run's way that are not of its past, in place of those moved before.

    Left there, they would count as newer than the run's own: kept in their place, and resumed from.

    Args:
        output_dir: The run's.
        resumed: The checkpoint that the run goes on from; None if it starts anew.

    Returns:
        Where they are now; None if there were none.
    """
    found = checkpoints(output_dir)
    if resumed is not None:
        found = list(takewhile(lambda path: not path.samefile(resumed), found))
    if not found:
        return None
    target = output_dir / EARLIER_DIRECTORY
    if target.exists():
        shutil.rmtree(target)
    target.mkdir()
    for directory in found:
        os.replace(directory, target / directory.name)
    return target
