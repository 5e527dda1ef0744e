"""What is finished of an image set that `synth` writes: a record a shard, which everything else is drawn up from.

A record (`shards/NNNNN.json`) names the files of its shard and is written when they are whole, so that records tell
what there is at any moment, however a run was stopped. `metadata.jsonl` says the same in the end.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.refusals import RECORDS

IMAGES = "images"
_NAME = re.compile(r"\d{5,}-\d{5,}\.(png|npy)")


def image_name(label: int, shard: int, position: int, suffix: str) -> str:
    """Where an image lies in the set: its folder is the class that it was made for."""
    return f"{IMAGES}/{label:05d}/{shard:05d}-{position:05d}{suffix}"


def image_files(directory: Path) -> Iterator[Path]:
    """The images of a set, finished shards and others: files that are named as `image_name` does."""
    for folder in (directory / IMAGES).glob("*/"):
        if folder.name.isdecimal() and not folder.is_symlink():
            yield from (file for file in folder.iterdir() if _NAME.fullmatch(file.name))


def record_file(directory: Path, shard: int) -> Path:
    return directory / RECORDS / f"{shard:05d}.json"


def record_files(directory: Path) -> Iterator[Path]:
    return (file for file in (directory / RECORDS).glob("*.json") if file.stem.isdecimal())


def read_records(directory: Path) -> list[dict[str, Any]]:
    """The records of the finished shards, in order: those that can be read and whose files are all there."""
    found = []
    for path in record_files(directory):
        try:
            record = json.loads(path.read_text())
            whole = all((directory / name).stat().st_size for name in record["files"])
            if whole and record["index"] == int(path.stem) and record.keys() >= {"seed", "images", "sha256"}:
                found.append(record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # as good as not there: the shard is made again
    return sorted(found, key=lambda record: int(record["index"]))


def metadata_rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `metadata.jsonl`: an image each."""
    return [
        {"file_name": name, "label": int(Path(name).parent.name), "shard": record["index"], "seed": record["seed"]}
        for record in records
        for name in record["files"]
    ]


def digest_of(files: Mapping[str, bytes]) -> str:
    """SHA-256 of a shard, from its files' contents by name."""
    each = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return hashlib.sha256("".join(f"{name} {each[name]}\n" for name in sorted(each)).encode()).hexdigest()


def is_intact(directory: Path, record: Mapping[str, Any]) -> bool:
    """Whether a shard's files are those that its record was written for."""
    try:
        found = digest_of({name: (directory / name).read_bytes() for name in record["files"]})
    except OSError:
        return False
    return found == record["sha256"]
