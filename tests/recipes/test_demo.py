"""The demo's folder, and its processes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from converters.errors import OutputError
from recipes.demo import CELLS, SINGLE_IMAGES, _make_room, side_by_side
from recipes.refusals import MANIFEST
from tests.mixmix_cli.command import start


def test_only_what_a_demo_wrote_is_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "results.json").write_text("{}")
    (folder / "src").mkdir()
    (folder / "src" / "main.py").write_text("mine")
    with pytest.raises(OutputError, match="was not written by the demo"):
        _make_room(folder, overwrite=True)
    with pytest.raises(OutputError, match="not empty"):
        _make_room(folder, overwrite=False)
    (folder / SINGLE_IMAGES).mkdir()
    (folder / SINGLE_IMAGES / MANIFEST).write_text(json.dumps({"format": 2, "identity": {}}))
    for name in (CELLS[0].file_name, f"{CELLS[1].file_name}.quantize-1.partial", f"{CELLS[0].file_name}.notes.txt"):
        (folder / name).touch()
    for name in ("images/00003/00000-00001.png", "images/00003/mine.png", "shards/00000.json"):
        (folder / SINGLE_IMAGES / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / SINGLE_IMAGES / name).touch()
    (folder / ".mixmix-left").mkdir()
    link = tmp_path / "link"
    link.symlink_to(folder)
    _make_room(link, overwrite=True)
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    mine = {"src/main.py", f"{CELLS[0].file_name}.notes.txt", f"{SINGLE_IMAGES}/images/00003/mine.png"}
    assert left == mine | {f"{SINGLE_IMAGES}/{MANIFEST}"}  # by which the folder is known, as it cannot be removed
    _make_room(link, overwrite=True)
    assert (folder / "src" / "main.py").read_text() == "mine"


def test_each_job_is_done_once() -> None:
    assert sorted(side_by_side(divmod, [(7, 2), (8, 3), (9, 4)], 2)) == [0, 1, 2]


def test_what_fails_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(divmod, [(7, 0)], 1))


def test_an_interrupt_ends_all_processes() -> None:
    """A terminal sends it to every process of the group, while they start or work."""
    code = (
        "import time; from recipes.demo import side_by_side\n"
        "if __name__ == '__main__':\n"
        "    jobs = side_by_side(time.sleep, [(0,), (600,), (600,)], 2)\n"
        "    try: print(next(jobs), flush=True); next(jobs)\n"
        "    except KeyboardInterrupt: print('ended')\n"
        "    finally: jobs.close()"  # as a loop does that is left: the interrupt may come within it
    )
    process = start("-c", code, alone=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "0\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (out, err) == ("ended\n", "")
