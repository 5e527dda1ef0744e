"""`mixmix synth` as processes: killed and resumed, and dealt out by torchrun, always the same bytes."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from mixmix_cli.__main__ import main
from recipes import zoo
from tests.mixmix_cli.command import Forked, finish, start, together, torchrun

COUNT = 24
HOW = (
    "-n",
    str(COUNT),
    "--batch",
    "2",
    "--seed",
    "3",
    "--set",
    'stages=[{"scale":0.5,"steps":4},{"scale":1.0,"steps":6}]',
)
SYNTH = ("synth", *(str(zoo.model_path(name)) for name in ("inverted", "plain")), *HOW)
PROCESSES = (*torchrun(2), "-m", "mixmix_cli", *SYNTH)


def content(directory: Path) -> dict[str, bytes]:
    """All files; of the manifest and the records everything but the times."""
    found = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if path.suffix == ".json":
            document = json.loads(data)
            for record in (document, *document.get("shards", [])):
                record.pop("seconds", None)
            data = json.dumps(document).encode()
        found[str(path.relative_to(directory))] = data
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set that one uninterrupted call makes."""
    directory = tmp_path_factory.mktemp("whole") / "set"
    synth(directory)
    return directory


def synth(directory: Path, *more: str) -> None:
    """The same in this process."""
    assert main([*SYNTH, "-o", str(directory), *more]) == 0


def stop_after(process: Forked, directory: Path, shards: int, how: signal.Signals) -> tuple[int | None, str]:
    """Send the signal as soon as so many shards are recorded; exit status and stderr."""
    deadline = time.monotonic() + 120
    while len(list(directory.glob("shards/*.json"))) < shards:
        assert process.status is None, process.printed()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send(how)
    process.wait(60)
    return process.status, process.printed()[1]


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    """Killed outright after the first shard, resumed, interrupted after the third, resumed: as if nothing had been."""
    directory = tmp_path / "set"
    assert stop_after(Forked(*SYNTH, "-o", directory), directory, 1, signal.SIGKILL)[0] == -signal.SIGKILL
    assert not json.loads((directory / "manifest.json").read_text())["finished"]
    resumed = Forked(*SYNTH, "-o", directory, "--resume")
    status, err = stop_after(resumed, directory, 3, signal.SIGINT)
    assert status == 130
    listed = (directory / "metadata.jsonl").read_text().splitlines()  # what was finished can be used as it is
    assert 6 <= len(listed) < COUNT
    assert f"{len(listed)} of {COUNT} images are in {directory}" in err
    assert "--resume" in err
    synth(directory, "--resume")
    assert content(directory) == content(whole)


def test_two_processes_make_what_one_makes(whole: Path, tmp_path: Path) -> None:
    """Of a set that one began: it has the first and the fourth batch of twelve."""
    directory = shutil.copytree(whole, tmp_path / "set")
    for index in set(range(12)) - {0, 3}:
        (directory / "shards" / f"{index:05}.json").unlink()
    out, _ = finish(start(*PROCESSES, "-o", directory, "--resume", "--json"))
    assert json.loads(out)["images"] == COUNT  # one document: only the first process speaks
    assert content(directory) == content(whole)


def test_a_folder_in_use_stops_all_processes(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    _, err = together(2, *SYNTH, "-o", tmp_path, status=2)
    assert err.count("is not empty") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
