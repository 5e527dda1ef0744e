"""Writing an image set shard by shard, so that nothing finished is lost and a stopped run can go on.

A shard's images are written first, each under its final name only when whole; then `metadata.jsonl` lists them and
`manifest.json` records the shard. What the metadata does not list does not belong to the set.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from converters.errors import OutputError
from converters.writeback import write_atomically
from recipes.images import MANIFEST, METADATA, PREVIEW, contact_sheet, encode_image, to_bytes

PREVIEW_IMAGES = 64


class ImageStore:
    """One image set under construction in `directory`.

    `identity` is everything that decides the images (models, settings, seed): a run resumes only what has the same.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.directory, self.identity = directory, identity
        self.shards: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            self._take_over(resume=resume, overwrite=overwrite)
        try:
            (directory / "images").mkdir(parents=True, exist_ok=True)
            self._write_records(finished=False)
        except (OSError, OutputError) as error:
            reason = getattr(error, "strerror", None) or "not writable"
            raise OutputError(f"{directory} cannot be written to ({reason}): choose another output") from error

    def _take_over(self, *, resume: bool, overwrite: bool) -> None:
        """Go on with what is there, or replace it, if the user said so; with both, replace what is not the same."""
        if resume:
            try:
                self._go_on()
                return
            except OutputError:
                if not overwrite:
                    raise
        if not overwrite:
            raise OutputError(f"{self.directory} is not empty: pass --resume to go on, or --force to replace it")
        if not (self.directory / MANIFEST).is_file():
            raise OutputError(
                f"{self.directory} was not written by synth, so --force will not clear it: remove it first"
            )
        try:
            if (self.directory / "images").exists():
                shutil.rmtree(self.directory / "images")
            for name in (METADATA, PREVIEW, MANIFEST):  # the manifest last: by it a set is known
                (self.directory / name).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.directory} cannot be cleared ({error.strerror}): choose another output"
            ) from error

    def _go_on(self) -> None:
        """Find the finished shards of the same set. Raises OutputError where there is none."""
        try:
            manifest = json.loads((self.directory / MANIFEST).read_text())
            rows = [json.loads(line) for line in (self.directory / METADATA).read_text().splitlines()]
            identity, shards = manifest["identity"], {shard["index"]: shard for shard in manifest["shards"]}
            listed = [row for row in rows if row["shard"] in shards]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{self.directory} has no usable {MANIFEST}, so that nothing can be resumed: choose another output"
            ) from error
        if identity != json.loads(json.dumps(self.identity)):
            raise OutputError(
                f"{self.directory} holds images made of other models or with other settings: move it, repeat those, or"
                " replace it with --force"
            )
        # A stop may have come between the two records: only what both of them have is finished.
        counts = Counter(row["shard"] for row in listed)
        self.shards = [shard for index, shard in sorted(shards.items()) if counts[index] == shard["images"]]
        finished = self.finished_shards
        self.rows = [row for row in listed if row["shard"] in finished]

    @property
    def finished_shards(self) -> set[int]:
        return {shard["index"] for shard in self.shards}

    def add(self, index: int, seed: int, pixels: Tensor, labels: Tensor, facts: dict[str, Any]) -> None:
        """Write one shard: `pixels` [N, C, H, W] in [0, 1] become 8 bits; `facts` (losses, seconds) are recorded."""
        files: dict[str, str] = {}
        for position, (image, label) in enumerate(zip(to_bytes(pixels), labels.tolist(), strict=True)):
            suffix, content = encode_image(image)
            name = f"images/{label:05d}/{index:05d}-{position:05d}{suffix}"
            path = self.directory / name
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, content)
            files[name] = hashlib.sha256(content).hexdigest()
            self.rows.append({"file_name": name, "label": label, "shard": index, "seed": seed})
        digest = hashlib.sha256("".join(f"{name} {files[name]}\n" for name in sorted(files)).encode()).hexdigest()
        self.shards.append({"index": index, "seed": seed, "images": len(files), "sha256": digest, **facts})
        self.shards.sort(key=lambda shard: shard["index"])
        self._write_records(finished=False)

    def finish(self, preview: Tensor, facts: dict[str, Any]) -> None:
        """Write the contact sheet and the closing manifest."""
        write_atomically(self.directory / PREVIEW, contact_sheet(to_bytes(preview[:PREVIEW_IMAGES])))
        self._write_records(finished=True, **facts)

    def _write_records(self, *, finished: bool, **facts: Any) -> None:
        self.rows.sort(key=lambda row: row["file_name"].rsplit("/", 1)[1])
        lines = "".join(json.dumps(row) + "\n" for row in self.rows)
        write_atomically(self.directory / METADATA, lines.encode())
        manifest = {"format": 1, "finished": finished, "identity": self.identity, "shards": self.shards, **facts}
        write_atomically(self.directory / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
