"""`mixmix recipe`: what there is, and every key of it as a file that --recipe takes."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from mixmix_cli.cli import cli
from recipes.catalogue import KINDS
from tests.mixmix_cli.command import run


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "recipe", "list", "--json")
    assert status == 0
    rows = json.loads(out)
    assert [(row["command"], row["recipe"]) for row in rows] == [
        (c, n) for c, kind in KINDS.items() for n in kind.names
    ]
    out = run(capsys, "recipe", "list")[1]
    assert all(row["recipe"] in out for row in rows)
    assert all(line == line.rstrip() for line in out.splitlines())
    starred = [line.split()[:2] for line in out.splitlines()[:-1] if " * " in line]
    assert starred == [[row["command"], row["recipe"]] for row in rows if row["default"]]


@pytest.mark.parametrize("command", [name for name in KINDS if name != "synth"])  # which asks the models
def test_the_default_is_that_of_the_command(command: str) -> None:
    """Options hold names as words, as reading settings takes longer than --help may."""
    called = cli.get_command(click.Context(cli), command)
    assert called is not None
    defaults = {param.name: param.default for param in called.params}
    assert KINDS[command].default in (defaults.get("method"), defaults["recipe"])


def test_show_writes_a_file_that_a_command_takes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, _ = run(capsys, "recipe", "show", "synth", "small")
    assert status == 0
    own = out.replace("# models is not set", 'models = ["a:b:c"]')  # which is no emoji
    (tmp_path / "mine.toml").write_text(own)
    assert run(capsys, "recipe", "show", "synth", tmp_path / "mine.toml")[1] == own
    document = json.loads(run(capsys, "recipe", "show", "quantize", "qdrop", "--json")[1])
    assert document["keys"]["steps"] == {"value": 200, "about": "Training steps a unit.", "words": []}
    assert document["keys"]["unit"]["words"] == ["none", "layer", "block"]
    assert document["effort"]["fast"] == {"steps": 100, "logit_share": 0.0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("synt", "small"), "synt has no recipes (the nearest is 'synth'): choose one of"),
        (("quantize", "small"), "there is no recipe 'small'"),
        (("quantize", "none.toml"), "none.toml does not exist"),
    ],
)
def test_what_is_not_there(words: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "recipe", "show", *words)
    assert (status, out) == (2, "")
    assert said in err
