"""Every recipe is shown as a file that loads as it does, with every key and what it is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from recipes.catalogue import KINDS, Recipe, read_recipe
from recipes.settings import Effort, SettingsError, load_recipe

SHIPPED = [(command, name) for command, kind in KINDS.items() for name in kind.names]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "own.toml"


def assert_loads_alike(command: str, recipe: str, shown: Recipe, file: Path) -> None:
    file.write_text(shown.text())
    kind = KINDS[command]
    for effort in get_args(Effort):
        again = load_recipe(kind.settings, kind.package, str(file), effort)
        assert again == load_recipe(kind.settings, kind.package, recipe, effort)


@pytest.mark.parametrize(("command", "name"), SHIPPED)
def test_what_is_shown_loads_as_the_recipe_does(command: str, name: str, file: Path) -> None:
    shown = read_recipe(KINDS[command], name)
    assert_loads_alike(command, name, shown, file)
    unset = {key.name for key in shown.keys if key.value is None}
    assert tomllib.loads(shown.text()).keys() - {"effort"} == KINDS[command].settings.model_fields.keys() - unset


@pytest.mark.parametrize(("command", "name"), SHIPPED)
def test_every_recipe_and_every_key_says_what_it_is(command: str, name: str) -> None:
    shown = read_recipe(KINDS[command], name)
    for about in (shown.about, *(key.about for key in shown.keys)):
        assert len(about.split()) > 1
        assert about[0].isupper() or about[0] == "`"
        assert not about.startswith(("The same", "Of it"))


def test_a_file_of_the_user_is_completed(file: Path) -> None:
    """With what only an effort sets, numbers that JSON does not have, and no word of what the file is."""
    own = file.with_name("mine.toml")
    text = 'stages = [{ scale = 1.0, steps = 5 }]\nrate = 1e300\nmodels = ["\U0001f600:b:\\u007f"]\n# One.\n# Two.\n'
    own.write_text(f"{text}[effort.fast]\nmodels_per_step = 2\n")
    shown = read_recipe(KINDS["synth"], str(own))
    assert shown.about == ""
    assert shown.efforts == {"fast": {"models_per_step": 2}}
    assert shown.asides == {"fast": "One. Two."}
    assert "# One. Two.\n[effort.fast]\n# With --effort fast alone" in shown.text()
    assert '# One of "noise", "leaves".\nstart = "noise"\n' in shown.text()
    assert_loads_alike("synth", str(own), shown, file)


@pytest.mark.parametrize("effort", get_args(Effort))
def test_what_is_wrong_is_refused_at_whatever_effort(effort: Effort, file: Path) -> None:
    file.write_text(f'unit = "block"\n[effort.{effort}]\nsteps = -1\n')
    said = "" if effort == "default" else f"at --effort {effort}, .*"
    with pytest.raises(SettingsError, match=f"{said}steps cannot be -1"):
        read_recipe(KINDS["quantize"], str(file))


def test_what_is_wrong_at_every_effort_is_said_of_none(file: Path) -> None:
    file.write_text('unit = "block"\nsteps = -1\n')
    with pytest.raises(SettingsError, match=f"^{re.escape(str(file))}: steps cannot be -1"):
        read_recipe(KINDS["quantize"], str(file))
