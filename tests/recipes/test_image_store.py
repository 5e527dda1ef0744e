"""The image store: what it refuses, what it writes, and that a stopped run loses nothing finished."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from converters.errors import OutputError
from recipes.image_store import ImageStore, clear_set, differences
from recipes.images import from_bytes, load_images, to_bytes
from recipes.refusals import check_set_folder

IDENTITY = {"models": ["a"], "seed": 0, "size": (6, 5)}


def images(seed: int, count: int = 3, channels: int = 1) -> Tensor:
    return torch.rand(count, channels, 6, 5, generator=torch.Generator().manual_seed(seed))


def begin(directory: Path, *, resume: bool = False, overwrite: bool = False, **identity: Any) -> ImageStore:
    store = ImageStore(directory, IDENTITY | identity)
    store.begin(resume=resume, overwrite=overwrite)
    return store


def finished(store: ImageStore) -> set[int]:
    return {record["index"] for record in store.records()}


def add(store: ImageStore, index: int, channels: int = 1) -> None:
    store.add(index, 100 + index, images(index, channels=channels), torch.tensor([4, 0, 4]), {"losses": {"a": 1.5}})
    store.close()


def read(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rows = [json.loads(line) for line in (directory / "metadata.jsonl").read_text().splitlines()]
    return json.loads((directory / "manifest.json").read_text()), rows


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def test_shards_become_files_rows_and_records(tmp_path: Path) -> None:
    store = begin(tmp_path / "set")
    add(store, 0)
    manifest, rows = read(tmp_path / "set")
    assert not manifest["finished"]
    assert manifest["identity"] == IDENTITY | {"size": [6, 5]}
    assert [row["label"] for row in rows] == [4, 0, 4]
    assert all((row["shard"], row["seed"]) == (0, 100) for row in rows)
    assert [Path(row["file_name"]).parent.name for row in rows] == ["00004", "00000", "00004"]
    assert {f"images/{f.parent.name}/{f.name}" for f in tmp_path.rglob("*.png")} == {row["file_name"] for row in rows}
    (shard,) = manifest["shards"]
    assert (shard["index"], shard["seed"], shard["images"], shard["losses"]) == (0, 100, 3, {"a": 1.5})
    read_back = load_images(tmp_path / "set")
    assert torch.equal(read_back.pixels, from_bytes(to_bytes(images(0))))
    assert read_back.label_kind == "targets"


def test_resume_and_overwrite_together_replace_only_what_is_not_the_same(tmp_path: Path) -> None:
    add(begin(tmp_path), 0)
    before = snapshot(tmp_path)
    assert finished(begin(tmp_path, resume=True, overwrite=True)) == {0}
    assert snapshot(tmp_path) == before
    assert finished(begin(tmp_path, resume=True, overwrite=True, seed=1)) == set()
    assert not list(tmp_path.rglob("*.png"))


def test_the_checksum_is_that_of_the_files_on_disk(tmp_path: Path) -> None:
    store = begin(tmp_path)
    add(store, 0)
    add(store, 1)
    manifest, rows = read(tmp_path)
    for shard in manifest["shards"]:
        names = sorted(row["file_name"] for row in rows if row["shard"] == shard["index"])
        lines = "".join(f"{n} {hashlib.sha256((tmp_path / n).read_bytes()).hexdigest()}\n" for n in names)
        assert shard["sha256"] == hashlib.sha256(lines.encode()).hexdigest()


def test_records_are_sorted_whatever_the_order_of_the_shards(tmp_path: Path) -> None:
    for name, order in (("up", [0, 1, 2]), ("down", [2, 0, 1])):
        store = begin(tmp_path / name)
        for index in order:
            add(store, index)
        store.finish(images(0), {})
    assert snapshot(tmp_path / "up") == snapshot(tmp_path / "down")
    manifest, rows = read(tmp_path / "up")
    assert [shard["index"] for shard in manifest["shards"]] == [0, 1, 2]
    assert [row["shard"] for row in rows] == [0] * 3 + [1] * 3 + [2] * 3


def test_finish_closes_the_manifest_and_draws_a_preview(tmp_path: Path) -> None:
    store = begin(tmp_path)
    add(store, 0)
    store.finish(images(0), {"losses": {"a": 1.5}})
    manifest, _ = read(tmp_path)
    assert manifest["finished"]
    assert manifest["losses"] == {"a": 1.5}
    assert (tmp_path / "preview.png").read_bytes().startswith(b"\x89PNG")


def test_four_channels_are_stored_as_arrays(tmp_path: Path) -> None:
    store = begin(tmp_path)
    add(store, 0, channels=4)
    store.finish(images(0, channels=4), {})
    _, rows = read(tmp_path)
    assert all(row["file_name"].endswith(".npy") for row in rows)
    assert torch.equal(load_images(tmp_path).pixels, from_bytes(to_bytes(images(0, channels=4))))


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=str(tmp_path)):
            begin(tmp_path, overwrite=overwrite)  # force clears only what synth wrote
    with pytest.raises(OutputError, match=str(tmp_path)):
        begin(tmp_path, resume=True)
    assert snapshot(tmp_path) == {"letter.txt": b"dear"}


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_file_in_the_way_is_refused_and_left_alone(how: dict[str, bool], tmp_path: Path) -> None:
    (tmp_path / "set").write_text("dear")
    with pytest.raises(OutputError, match="set"):
        begin(tmp_path / "set", **how)
    assert (tmp_path / "set").read_text() == "dear"


def test_an_earlier_set_is_replaced_only_when_forced(tmp_path: Path) -> None:
    add(begin(tmp_path), 5)
    (tmp_path / "letter.txt").write_text("dear")
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="--force"):
        begin(tmp_path)
    assert snapshot(tmp_path) == before
    add(begin(tmp_path, overwrite=True, seed=1), 0)
    manifest, rows = read(tmp_path)
    assert manifest["identity"]["seed"] == 1
    assert [shard["index"] for shard in manifest["shards"]] == [0]
    assert {path for path in snapshot(tmp_path) if path.startswith("images")} == {row["file_name"] for row in rows}
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_resume_goes_on_with_the_finished_shards(tmp_path: Path) -> None:
    store = begin(tmp_path / "whole")
    add(store, 0)
    add(store, 1)
    add(begin(tmp_path / "halves"), 0)
    resumed = begin(tmp_path / "halves", resume=True)
    assert finished(resumed) == {0}
    add(resumed, 1)
    assert snapshot(tmp_path / "halves") == snapshot(tmp_path / "whole")


def test_resume_of_nothing_begins(tmp_path: Path) -> None:
    assert finished(begin(tmp_path / "new", resume=True)) == set()
    (tmp_path / "empty").mkdir()
    assert finished(begin(tmp_path / "empty", resume=True)) == set()


@pytest.mark.parametrize(
    ("held", "asked", "said"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1, "b": {"c": "x"}}, {"a": 2, "b": {"c": "y"}}, ["a is 1 and not 2", 'b.c is "x" and not "y"']),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["a[1] is 2 and not 3"]),
        ({"a": [1]}, {"a": [1, 3]}, ["a is [1] and not [1, 3]"]),
        ({"a": 1}, {}, ["a is no more"]),
        ({}, {"a": None}, ["a is new"]),
        ({"a": "x" * 64}, {"a": "y" * 64}, ["a is another"]),
        ([1], {"a": 1}, ['it is [1] and not {"a": 1}']),
    ],
)
def test_what_differs_is_said(held: object, asked: object, said: list[str]) -> None:
    assert list(differences(held, asked)) == said


def test_resume_of_another_run_is_refused_and_loses_nothing(tmp_path: Path) -> None:
    add(begin(tmp_path), 0)
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match=rf"{tmp_path} .*\(seed is 0 and not 1\)"):
        begin(tmp_path, resume=True, seed=1)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("damage", ["cut", "list", "no identity", "binary"])
def test_resume_from_a_damaged_manifest_is_refused(damage: str, tmp_path: Path) -> None:
    add(begin(tmp_path), 0)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    content = {
        "cut": path.read_bytes()[:40],
        "list": b"[]",
        "no identity": json.dumps({"shards": manifest["shards"]}).encode(),
        "binary": b"\xff\xfe\x00",
    }[damage]
    path.write_bytes(content)
    with pytest.raises(OutputError, match=str(tmp_path)):
        begin(tmp_path, resume=True)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff", b'{"index": 1, "files": []}'])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_damaged_record_costs_its_own_shard_alone(content: bytes, overwrite: bool, tmp_path: Path) -> None:
    store = begin(tmp_path)
    add(store, 0)
    add(store, 1)
    (tmp_path / "shards" / "00000.json").write_bytes(content)
    assert finished(begin(tmp_path, resume=True, overwrite=overwrite)) == {1}


def test_a_stop_at_the_very_beginning_can_be_resumed(tmp_path: Path) -> None:
    begin(tmp_path / "set")
    for name in ("images", "shards"):
        (tmp_path / "set" / name).rmdir()
    assert finished(begin(tmp_path / "set", resume=True)) == set()
    add(begin(tmp_path / "set", overwrite=True), 0)


def test_a_shard_is_finished_when_its_record_and_all_its_files_are_there(tmp_path: Path) -> None:
    store = begin(tmp_path)
    add(store, 0)
    add(store, 1)
    (tmp_path / "shards" / "00001.json").unlink()  # a stop before the record
    assert finished(begin(tmp_path, resume=True)) == {0}
    rows = read(tmp_path)[1]
    assert {row["shard"] for row in rows} == {0}
    (tmp_path / rows[0]["file_name"]).write_bytes(b"")  # a disk was full
    assert finished(begin(tmp_path, resume=True)) == set()


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    add(begin(tmp_path), 0)
    before = snapshot(tmp_path)
    for folder in ("", "images/00004", "shards"):
        (tmp_path / folder / ".mixmix-x7f").write_bytes(b"half")
    begin(tmp_path, resume=True)
    assert snapshot(tmp_path) == before


def test_shards_of_several_processes_meet_in_one_manifest(tmp_path: Path) -> None:
    leader = begin(tmp_path / "two")
    ImageStore(tmp_path / "two", IDENTITY).add(
        1, 101, images(1), torch.tensor([4, 0, 4]), {"losses": {"a": 1.5}}
    )  # a process that only adds
    add(leader, 0)
    alone = begin(tmp_path / "one")
    add(alone, 0)
    add(alone, 1)
    assert snapshot(tmp_path / "two") == snapshot(tmp_path / "one")


def test_what_was_damaged_may_be_replaced(tmp_path: Path) -> None:
    """But no folder of another program, which may have a manifest too."""
    ours, other = tmp_path / "ours", tmp_path / "other"
    for folder, name in ((ours, "shards"), (other, "images")):
        (folder / name).mkdir(parents=True)
        (folder / "manifest.json").write_text('{"cut off')
    check_set_folder(ours, resume=False, overwrite=True)
    for folder, manifest in ((other, '{"cut off'), (ours, '{"name": "of another program"}')):
        (folder / "manifest.json").write_text(manifest)
        with pytest.raises(OutputError, match="not a set that synth wrote"):
            check_set_folder(folder, resume=False, overwrite=True)


def test_force_removes_what_the_store_wrote_and_nothing_else(tmp_path: Path) -> None:
    add(begin(tmp_path), 0)
    own = [tmp_path / "images/mine.txt", tmp_path / "images/00004/mine.png", tmp_path / "shards/notes.json"]
    for file in own:
        file.write_text("mine")
    begin(tmp_path, overwrite=True, seed=1)
    kept = {path for path in snapshot(tmp_path) if not path.startswith(("manifest", "metadata"))}
    assert kept == {str(file.relative_to(tmp_path)) for file in own}
    assert not (tmp_path / "images/00000").exists()


def test_what_a_stop_left_of_another_set_does_not_stay_beside_the_new_one(tmp_path: Path) -> None:
    add(begin(tmp_path), 0)
    (tmp_path / "shards" / "00000.json").unlink()  # killed before the first record
    begin(tmp_path, resume=True, seed=1)
    assert not list(tmp_path.rglob("*.png"))


def test_an_image_that_was_replaced_costs_its_shard(tmp_path: Path) -> None:
    store = begin(tmp_path)
    add(store, 0)
    add(store, 1)
    shards = {row["shard"]: tmp_path / row["file_name"] for row in read(tmp_path)[1]}
    shards[1].write_bytes(shards[0].read_bytes())
    assert finished(begin(tmp_path, resume=True)) == {0}


def test_resuming_touches_nothing_that_another_process_is_writing(tmp_path: Path) -> None:
    """Two commands may make the same set: one has the images of a shard, and is about to record it."""
    store = begin(tmp_path)
    add(store, 0)
    record = tmp_path / "shards" / "00000.json"
    content = record.read_bytes()
    record.unlink()
    begin(tmp_path, resume=True)
    record.write_bytes(content)
    assert finished(store) == {0}


def test_a_set_is_cleared_but_for_what_is_not_its_own(tmp_path: Path) -> None:
    store = begin(tmp_path / "set")
    add(store, 0)
    (tmp_path / "set" / "images" / "00004" / ".mixmix-x7f").write_bytes(b"half")
    mine = tmp_path / "set" / "mine.txt"
    mine.write_text("mine")
    clear_set(tmp_path / "set")
    assert set(snapshot(tmp_path / "set")) == {"manifest.json", "mine.txt"}
    begin(tmp_path / "set", overwrite=True)  # it is known yet
    mine.unlink()
    clear_set(tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_set_that_lost_its_records_is_what_its_metadata_say(tmp_path: Path) -> None:
    store = begin(tmp_path)
    add(store, 0)
    (tmp_path / "shards" / "00000.json").unlink()
    (tmp_path / "shards").rmdir()
    assert len(load_images(tmp_path)) == 3


def test_what_is_finished_can_be_read_though_nobody_drew_it_up(tmp_path: Path) -> None:
    """Killed by a signal that nobody hears: metadata are as they were in the beginning."""
    store = begin(tmp_path)
    store.add(0, 100, images(0), torch.tensor([4, 0, 4]), {"losses": {}})
    assert read(tmp_path)[1] == []
    found = load_images(tmp_path)
    assert torch.equal(found.pixels, from_bytes(to_bytes(images(0))))
    assert found.labels is not None
    assert found.labels.tolist() == [4, 0, 4]
    assert "unfinished" in found.source
