"""Writing an image set shard by shard, so that nothing finished is lost and a stopped run can go on.

A shard's images are written first, each under its final name only when whole; then `shards/NNNNN.json` says that it is
finished. Several processes may add shards to one folder. `metadata.jsonl` and `manifest.json` are drawn up from these
records when a run begins and when it ends; one that was killed has only the records.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from converters.errors import OutputError
from converters.outputs import TEMPORARY, write_atomically
from recipes.images import METADATA, PREVIEW, contact_sheet, encode_image, to_bytes
from recipes.refusals import MANIFEST, RECORDS, check_set_folder
from recipes.shards import (
    IMAGES,
    digest_of,
    image_files,
    image_name,
    is_intact,
    metadata_rows,
    read_records,
    record_file,
    record_files,
)

PREVIEW_IMAGES = 64

SHOWN = 24
"""Characters up to which a value is said."""


class OtherSetError(OutputError):
    """A folder that holds another set than the one to go on with."""

    def __init__(self, message: str, differences: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.differences = list(differences)
        """What is there and what was asked for instead, in words."""


def differences(held: object, asked: object, name: str = "it") -> Iterator[str]:
    """Where two JSON values differ, in words: `seed is 0 and not 1`."""
    if isinstance(held, dict) and isinstance(asked, dict):
        for key in [*held, *(key for key in asked if key not in held)]:
            path = f"{name}.{key}" if name != "it" else str(key)
            if key in held and key in asked:
                yield from differences(held[key], asked[key], path)
            else:
                yield f"{path} is new" if key in asked else f"{path} is no more"
    elif isinstance(held, list) and isinstance(asked, list) and len(held) == len(asked):
        for index, pair in enumerate(zip(held, asked, strict=True)):
            yield from differences(*pair, f"{name}[{index}]")
    elif held != asked:
        values = [json.dumps(value) for value in (held, asked)]
        short = all(len(value) <= SHOWN for value in values)
        yield f"{name} is {values[0]} and not {values[1]}" if short else f"{name} is another"


def in_short(found: Sequence[str]) -> str:
    """The first two differences, and how many more there are."""
    more = f", and {len(found) - 2} more" if len(found) > 2 else ""
    return ", ".join(found[:2]) + more


class ImageStore:
    """One image set under construction in `directory`, opened by `begin` and written to by any number of processes.

    `identity` is everything that decides the images (models, settings, seed): a run resumes only what has the same.
    """

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        self.directory, self.identity = directory, identity

    def begin(self, *, resume: bool, overwrite: bool) -> list[dict[str, Any]]:
        """Make the folder ready, in one process; the records of the shards that are finished already.

        Raises OutputError where the folder holds something else, or cannot be written to.
        """
        directory, finished = self.directory, []
        check_set_folder(directory, resume=resume, overwrite=overwrite)
        if directory.exists() and any(directory.iterdir()):
            finished = self._take_over(resume=resume, overwrite=overwrite)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self.close()  # the manifest first: by it a set is known
            for name in (IMAGES, RECORDS):
                (directory / name).mkdir(exist_ok=True)
        except (OSError, OutputError) as error:
            reason = getattr(error, "strerror", None) or "not writable"
            raise OutputError(f"{directory} cannot be written to ({reason}): choose another output") from error
        return finished

    def _take_over(self, *, resume: bool, overwrite: bool) -> list[dict[str, Any]]:
        """Go on with what is there, or replace it, if the user said so; with both, replace what is not the same."""
        if resume:
            try:
                return self._go_on()
            except OtherSetError:
                if not overwrite:
                    raise
        _remove(self.directory, _own_files(self.directory))  # the manifest is replaced
        return []

    def _go_on(self) -> list[dict[str, Any]]:
        """The finished shards of the same set. Raises OutputError where there is none."""
        try:
            identity = json.loads((self.directory / MANIFEST).read_text())["identity"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OtherSetError(
                f"{self.directory} has no usable {MANIFEST}, so that nothing can be resumed: choose another output"
            ) from error
        asked, records = json.loads(json.dumps(self.identity)), self.records()
        if identity != asked and records:
            found = list(differences(identity, asked))
            raise OtherSetError(
                f"{self.directory} holds images made of other models or with other settings ({in_short(found)}): move"
                " it, repeat those, or replace it with --force",
                found,
            )
        finished = [record for record in records if is_intact(self.directory, record)]
        left = list(_half_written(self.directory))
        if identity != asked:  # another set was stopped before its first record; its images must not stay
            left += image_files(self.directory)
        for record in records:  # images of shards that are made again are replaced: nobody else's are touched
            if record not in finished:
                left.append(record_file(self.directory, record["index"]))
        _remove(self.directory, left)
        return finished

    def add(self, index: int, seed: int, pixels: Tensor, labels: Tensor, facts: dict[str, Any]) -> None:
        """Write one shard: `pixels` [N, C, H, W] in [0, 1] become 8 bits; `facts` (losses, seconds) are recorded."""
        files: dict[str, bytes] = {}
        for position, (image, label) in enumerate(zip(to_bytes(pixels), labels.tolist(), strict=True)):
            suffix, content = encode_image(image)
            name = image_name(label, index, position, suffix)
            path = self.directory / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(
                    f"{path.parent} cannot be made ({error.strerror}): see to {self.directory}"
                ) from error
            write_atomically(path, content)
            files[name] = content
        facts = {"sha256": digest_of(files), "files": list(files), **facts}
        record = {"index": index, "seed": seed, "images": len(files), **facts}
        write_atomically(record_file(self.directory, index), json.dumps(record).encode())

    def records(self) -> list[dict[str, Any]]:
        """The records of the finished shards, in order."""
        return read_records(self.directory)

    def close(self) -> None:
        """Draw up the metadata and the manifest of a set that is not finished."""
        self._write_summary(finished=False)

    def finish(self, preview: Tensor, facts: dict[str, Any]) -> None:
        """Write the contact sheet and the closing manifest."""
        write_atomically(self.directory / PREVIEW, contact_sheet(to_bytes(preview[:PREVIEW_IMAGES])))
        self._write_summary(finished=True, **facts)

    def _write_summary(self, *, finished: bool, **facts: Any) -> None:
        shards = self.records()
        rows = "".join(json.dumps(row) + "\n" for row in metadata_rows(shards))
        write_atomically(self.directory / METADATA, rows.encode())
        told = [{key: value for key, value in shard.items() if key != "files"} for shard in shards]
        manifest = {"format": 2, "finished": finished, "identity": self.identity, "shards": told, **facts}
        write_atomically(self.directory / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def clear_set(directory: Path) -> None:
    """Remove a set that synth wrote, and the folders that this leaves empty, but nothing else that lies there.

    Where something does, the manifest stays, by which the folder is known. Raises OutputError where a file cannot be
    removed.
    """
    _remove(directory, _own_files(directory))
    for folder in (directory / IMAGES, directory / RECORDS):
        with suppress(OSError):  # the user's own files lie there too
            folder.rmdir()
    if [path.name for path in directory.iterdir()] == [MANIFEST]:
        _remove(directory, [directory / MANIFEST])
        directory.rmdir()


def _own_files(directory: Path) -> list[Path]:
    """All that the store writes but the manifest."""
    own = [*record_files(directory), *image_files(directory), *_half_written(directory)]
    return [*own, directory / METADATA, directory / PREVIEW]


def _half_written(directory: Path) -> Iterator[Path]:
    """What killed processes have left under temporary names."""
    return (file for file in directory.rglob(f"{TEMPORARY}*") if file.is_file())


def _remove(directory: Path, files: Iterable[Path]) -> None:
    """Remove files of a set, and the folders of classes that this leaves empty. Raises OutputError."""
    removed = list(files)
    try:
        for file in removed:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{error.filename} cannot be removed ({error.strerror}): remove it") from error
    for folder in {file.parent for file in removed if file.parent.parent == directory / IMAGES}:
        with suppress(OSError):  # the user's own files lie there too
            folder.rmdir()
