"""Recipes load at every effort, and whatever is misspelt or does not fit is named with the way out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from recipes.distill import settings as distill
from recipes.prune import settings as prune
from recipes.quantize import settings as quantize
from recipes.settings import Effort, Settings, SettingsError, load_recipe, recipe_names
from recipes.synth import settings as synth

KINDS: list[tuple[type[Settings], str]] = [
    (synth.SynthSettings, synth.PACKAGE),
    (quantize.QuantizeSettings, quantize.PACKAGE),
    (prune.PruneSettings, prune.PACKAGE),
    (distill.DistillSettings, distill.PACKAGE),
]
SHIPPED = [(kind, package, name) for kind, package in KINDS for name in recipe_names(package)]
STAGES = "stages = [{ scale = 1.0, steps = 5 }]\n"


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def load_synth(recipe: str, *overrides: str, effort: Effort = "default") -> synth.SynthSettings:
    return load_recipe(synth.SynthSettings, synth.PACKAGE, recipe, effort, overrides)


def test_the_methods_of_the_command_line_are_shipped() -> None:
    assert {"nearest", "adaround", "brecq", "qdrop"} <= set(recipe_names(quantize.PACKAGE))
    assert set(recipe_names(prune.PACKAGE)) == {"obs", "one-shot", "one-stage", "two-stage"}
    assert {"default", "paper"} <= set(recipe_names(synth.PACKAGE))


@pytest.mark.parametrize("effort", ["fast", "default", "paper"])
@pytest.mark.parametrize(("kind", "package", "name"), SHIPPED)
def test_every_shipped_recipe_loads_at_every_effort(
    kind: type[Settings], package: str, name: str, effort: Effort
) -> None:
    settings = load_recipe(kind, package, name, effort)
    assert isinstance(settings, kind)
    with pytest.raises(ValidationError):
        settings.__setattr__(next(iter(kind.model_fields)), None)  # frozen


@pytest.mark.parametrize(("kind", "package", "name"), SHIPPED)
def test_more_effort_never_means_fewer_steps(kind: type[Settings], package: str, name: str) -> None:
    # every kind has `steps`, which their base class has not
    fast, default, paper = (load_recipe(kind, package, name, effort).steps for effort in ("fast", "default", "paper"))  # type: ignore[attr-defined]
    assert fast <= default <= paper


def test_the_paper_recipe_is_the_papers() -> None:
    """Seed, B.2 and B.3: 2500 steps at half, 2500 at full size, batch 8, Adam (0.5, 0.5) at 0.25, box 0.1 to 0.4."""
    paper = load_synth("paper", effort="paper")
    assert [(stage.scale, stage.steps) for stage in paper.stages] == [(0.5, 2500), (1.0, 2500)]
    assert (paper.batch, paper.rate, paper.betas, paper.box) == (8, 0.25, (0.5, 0.5), (0.1, 0.4))
    assert paper.weight_rate > 0
    assert paper.mixing == "all"


def test_file_then_effort_then_override(tmp_path: Path) -> None:
    path = write(
        tmp_path / "own.toml", f"rate = 0.1\nbatch = 3\nimages = 5\n{STAGES}[effort.fast]\nbatch = 7\nimages = 9\n"
    )
    assert (load_synth(path).rate, load_synth(path).batch, load_synth(path).images) == (0.1, 3, 5)
    fast = load_synth(path, "images=11", effort="fast")
    assert (fast.rate, fast.batch, fast.images) == (0.1, 7, 11)
    assert load_synth(path, "batch=1", "batch=2").batch == 2


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("rate=0.5", "rate", 0.5),
        ("flip=false", "flip", False),
        ("mixing=label", "mixing", "label"),
        ('mixing="label"', "mixing", "label"),
        ("models_per_step=null", "models_per_step", None),
        ("box=[0.2, 0.3]", "box", (0.2, 0.3)),
        ('stages=[{"scale": 1, "steps": 9}]', "stages", (synth.Stage(scale=1, steps=9),)),
    ],
)
def test_overrides_are_read_as_json_or_text(override: str, key: str, value: object) -> None:
    assert getattr(load_synth("default", override), key) == value


def sentence(caught: pytest.ExceptionInfo[SettingsError], *parts: str) -> None:
    """One line that holds the parts, and says what to do after a colon."""
    message = str(caught.value)
    assert "\n" not in message
    assert re.search(r": [a-z]", message)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("wrong", "right"), [("ratee", "rate"), ("batchsize", "batch"), ("weigth_rate", "weight_rate")]
)
def test_a_misspelt_key_names_the_nearest_known_one(wrong: str, right: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load_synth("default", f"{wrong}=1")
    sentence(caught, repr(wrong), repr(right), "--set")
    for text in (f"{wrong} = 1\n{STAGES}", f"{STAGES}[effort.fast]\n{wrong} = 1\n"):
        path = write(tmp_path / "own.toml", text)
        with pytest.raises(SettingsError) as caught:
            load_synth(path)  # also where the misspelt key is of an effort that was not asked for
        sentence(caught, repr(wrong), repr(right), path)


def test_a_recipe_of_another_command_is_refused_by_its_first_key(tmp_path: Path) -> None:
    path = write(tmp_path / "own.toml", 'unit = "block"\nsteps = 9\n[effort.fast]\nlogit_share = 0.0\n')
    with pytest.raises(SettingsError) as caught:
        load_synth(path)
    sentence(caught, f"{path}: 2 unknown keys, such as 'unit'", "give a recipe of this command")


def test_a_misspelt_key_of_a_stage_names_the_nearest_known_one(tmp_path: Path) -> None:
    path = write(tmp_path / "own.toml", "stages = [{ scale = 1.0, steps = 5, stepz = 6 }]\n")
    with pytest.raises(SettingsError) as caught:
        load_synth(path)
    sentence(caught, "stepz", "'steps'", path)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("rate=fast", "rate"),
        ("rate=0", "rate"),
        ("rate=NaN", "rate"),
        ("batch=0", "batch"),
        ("batch=2.5", "batch"),
        ("batch=9223372036854775808", "batch"),
        ('stages=[{"scale": 1, "steps": 1e20}]', "stages.0.steps"),
        ("mixing=some", "mixing"),
        ("box=[0.1]", "box"),
        ("jitter=0.1", "jitter"),
        ("stages=[]", "stages"),
        ('stages=[{"scale": 2, "steps": 5}]', "stages.0.scale"),
        ("betas=[0.5, 1.5]", "betas"),
    ],
)
def test_a_value_that_does_not_fit_is_named(override: str, key: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_synth("default", override)
    sentence(caught, key)


def test_steps_that_train_nothing_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"steps cannot be 50 \(nothing is trained where unit is none: steps=0"):
        load_recipe(quantize.QuantizeSettings, quantize.PACKAGE, "nearest", overrides=["steps=50"])


@pytest.mark.parametrize("override", ["rate", "", "=3"])
def test_an_override_is_written_key_equals_value(override: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_synth("default", override)
    sentence(caught, "--set")


def test_a_required_key_that_is_missing_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "own.toml", "steps = 5\n")
    with pytest.raises(SettingsError) as caught:
        load_recipe(quantize.QuantizeSettings, quantize.PACKAGE, path)
    sentence(caught, "unit", path)
    assert "{" not in str(caught.value)  # not a dump of all that was given


@pytest.mark.parametrize("recipe", ["papr", "Default", "no/such", ""])
def test_an_unknown_recipe_lists_the_known_ones(recipe: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_synth(recipe)
    sentence(caught, repr(recipe), "default", "paper")


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path / "folder.toml"):
        (tmp_path / "folder.toml").mkdir(exist_ok=True)
        with pytest.raises(SettingsError) as caught:
            load_synth(str(path))
        sentence(caught, str(path))


@pytest.mark.parametrize(
    "content",
    [b"rate = ", b"\xff\xfe", b'effort = "fast"\n', b"[effort]\nfast = 3\n", b"[effort.slow]\nrate = 1.0\n"],
    ids=["not toml", "not text", "effort a string", "effort a number", "no such effort"],
)
def test_a_file_that_is_damaged_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        load_synth(str(path))
    sentence(caught, str(path))


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert load_synth(write(tmp_path / "own.toml", f"\ufeffrate = 0.125\n{STAGES}")).rate == 0.125


@pytest.mark.parametrize("value", ["Infinity", "NaN", "1e999"])
def test_numbers_are_finite(value: str) -> None:
    with pytest.raises(SettingsError, match="temperature cannot be"):
        load_recipe(distill.DistillSettings, distill.PACKAGE, "default", overrides=[f"temperature={value}"])


@pytest.mark.parametrize("size", [-1, 1, 15])
def test_groups_whose_scales_take_more_than_they_save_are_refused(size: int) -> None:
    with pytest.raises(SettingsError, match=r"group_size cannot be .* scales take more room"):
        load_recipe(quantize.QuantizeSettings, quantize.PACKAGE, "qdrop", overrides=[f"group_size={size}"])


def test_a_file_needs_no_suffix(tmp_path: Path) -> None:
    assert load_synth(write(tmp_path / "own", f"rate = 0.125\n{STAGES}")).rate == 0.125


@pytest.mark.parametrize("steps", [2, 3, 5, 8, 99, 1000])
def test_a_number_of_steps_is_shared_out_over_the_stages(steps: int) -> None:
    stages = (synth.Stage(scale=0.5, steps=30), synth.Stage(scale=1.0, steps=30))
    shared = synth.SynthSettings(stages=stages).with_steps(steps)
    assert shared.steps == steps
    assert [stage.scale for stage in shared.stages] == [0.5, 1.0]
    assert abs(shared.stages[0].steps - shared.stages[1].steps) <= 1


def test_options_of_the_user_win_over_overrides() -> None:
    changes = {"images": 7, "batch": None}
    settings = synth.load_synth_recipe("default", "fast", ["images=3", "rate=0.5"], 10, changes)
    assert (settings.images, settings.rate, settings.steps) == (7, 0.5, 10)
    assert settings.batch == synth.load_synth_recipe("default", "fast", [], None, {}).batch


def test_a_file_does_not_take_the_place_of_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nearest").touch()
    assert load_recipe(quantize.QuantizeSettings, quantize.PACKAGE, "nearest").unit == "none"


def test_the_override_is_blamed_and_not_the_recipe() -> None:
    with pytest.raises(SettingsError, match=r"^--set: steps cannot be 'x'"):
        load_recipe(quantize.QuantizeSettings, quantize.PACKAGE, "nearest", overrides=["steps=x"])
