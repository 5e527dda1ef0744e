"""Synthesis with tiny budgets: the documented files, repeatable to the byte, better than noise, and clear refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor

from converters.conversion import to_torch
from converters.errors import OutputError
from converters.input_spec import InputSpec
from converters.load import load_classifier
from converters.torch_module import TorchClassifier
from recipes.compare import compare
from recipes.images import from_bytes, gaussian_noise, load_images, to_bytes
from recipes.progress import Silent, Task
from recipes.ranks import Ranks
from recipes.synth.engine import Batch, DivergedError, Plateau, deal_labels, synthesize
from recipes.synth.settings import Stage, SynthSettings, load_synth_recipe
from recipes.synth.teachers import SynthesisError, Teacher, judge, make_teachers

Modules = Callable[[str], TorchClassifier]


def settings(**changes: Any) -> SynthSettings:
    stages = (Stage(scale=0.5, steps=4), Stage(scale=1.0, steps=6))
    return SynthSettings(**({"images": 8, "batch": 4, "stages": stages, "label": 0.5, "variation": 0.01} | changes))


@pytest.fixture(scope="module")
def zoo(module_of: Modules) -> list[TorchClassifier]:
    return [module_of("inverted"), module_of("plain")]


def files(directory: Path) -> dict[str, bytes]:
    """Everything but the manifest and the records, which tell times."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.suffix != ".json"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def timeless(directory: Path) -> dict[str, Any]:
    manifest = json.loads((directory / "manifest.json").read_text())
    for record in (manifest, *manifest["shards"]):
        record.pop("seconds", None)
    return manifest


@pytest.fixture(scope="module")
def made(zoo: list[TorchClassifier], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images in two shards, seed 0: the uninterrupted run."""
    directory = tmp_path_factory.mktemp("made") / "set"
    synthesize(zoo, directory, settings(), seed=0)
    return directory


def test_the_documented_files_are_written(made: Path, zoo: list[TorchClassifier]) -> None:
    rows = [json.loads(line) for line in (made / "metadata.jsonl").read_text().splitlines()]
    assert Counter(row["label"] for row in rows) == Counter((0, 1, 2, 3, 5, 6, 7, 8))  # eight of ten classes
    assert [row["shard"] for row in rows] == [0] * 4 + [1] * 4
    assert len({row["seed"] for row in rows}) == 2
    for row in rows:
        assert Path(row["file_name"]).parent == Path(f"images/{row['label']:05d}")
        with Image.open(made / row["file_name"]) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (28, 28))
    assert {name for name in files(made) if name.startswith("images/")} == {row["file_name"] for row in rows}
    with Image.open(made / "preview.png") as preview:
        assert min(preview.size) > 28
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["finished"]
    identity = manifest["identity"]
    assert [m["sha256"] for m in identity["models"]] == [
        hashlib.sha256(module.classifier.path.read_bytes()).hexdigest() for module in zoo
    ]
    assert [m["input"]["size"] for m in identity["models"]] == [[28, 28], [28, 28]]
    assert identity["settings"]["images"] == 8
    assert [shard["images"] for shard in manifest["shards"]] == [4, 4]
    assert set(manifest["losses"]) == {f"{kind}/{m.classifier.name}" for kind in ("batchnorm", "label") for m in zoo}
    assert set(manifest["shards"][0]["losses"]) == set(manifest["losses"])


def test_the_result_is_what_the_manifest_says(zoo: list[TorchClassifier], tmp_path: Path) -> None:
    result = synthesize(zoo, tmp_path / "set", settings(images=6), seed=0)
    manifest = json.loads((tmp_path / "set/manifest.json").read_text())
    assert (result.images, result.models, result.directory) == (6, ["inverted", "plain"], tmp_path / "set")
    assert result.losses == manifest["losses"]
    assert [shard["images"] for shard in manifest["shards"]] == [4, 2]  # the last shard holds the rest
    for name, value in result.losses.items():
        assert value == pytest.approx(sum(shard["losses"][name] for shard in manifest["shards"]) / 2)


def test_losses_are_measured_on_the_images_as_read_back(made: Path, zoo: list[TorchClassifier]) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    images = load_images(made)
    assert images.labels is not None
    teachers, classes = make_teachers(zoo, settings())
    assert classes == 10
    for shard in manifest["shards"]:
        part = slice(4 * shard["index"], 4 * shard["index"] + 4)
        assert judge(teachers, images.pixels[part], images.labels[part]) == pytest.approx(shard["losses"], rel=1e-5)


def test_the_seed_decides_every_byte(made: Path, zoo: list[TorchClassifier], tmp_path: Path) -> None:
    torch.manual_seed(77)  # the global generator has no say
    synthesize(zoo, tmp_path / "again", settings(), seed=0)
    assert files(tmp_path / "again") == files(made)
    assert timeless(tmp_path / "again") == timeless(made)
    synthesize(zoo, tmp_path / "other", settings(), seed=1)
    mine, other = load_images(made).pixels, load_images(tmp_path / "other").pixels
    assert all(not torch.equal(a, b) for a in mine for b in other)
    assert all(not torch.equal(mine[a], mine[b]) for a in range(8) for b in range(a))


class Stopping(Silent):
    """Interrupts the work after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        self.left -= steps
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("steps", [3, 10, 14])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    steps: int, made: Path, zoo: list[TorchClassifier], tmp_path: Path
) -> None:
    directory = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        synthesize(zoo, directory, settings(), seed=0, progress=Stopping(steps))
    assert not timeless(directory)["finished"]
    assert len(timeless(directory)["shards"]) == steps // 10
    synthesize(zoo, directory, settings(), seed=0, resume=True)
    assert files(directory) == files(made)
    assert timeless(directory) == timeless(made)


def test_a_shard_without_its_record_is_made_again(made: Path, zoo: list[TorchClassifier], tmp_path: Path) -> None:
    """The machine stopped between the last shard's images and its record."""
    directory = tmp_path / "set"
    synthesize(zoo, directory, settings(), seed=0)
    (directory / "shards" / "00001.json").unlink()
    synthesize(zoo, directory, settings(), seed=0, resume=True)
    assert files(directory) == files(made)
    assert timeless(directory) == timeless(made)


def test_resume_of_a_finished_set_leaves_the_images(zoo: list[TorchClassifier], tmp_path: Path, made: Path) -> None:
    directory = tmp_path / "set"
    synthesize(zoo, directory, settings(), seed=0)
    result = synthesize(zoo, directory, settings(), seed=0, resume=True, progress=Stopping(0))
    assert result.images == 8
    assert files(directory) == files(made)


@pytest.mark.parametrize("change", ["settings", "seed", "models", "nothing"])
def test_only_the_same_run_is_resumed(change: str, made: Path, zoo: list[TorchClassifier]) -> None:
    before = files(made)
    with pytest.raises(OutputError, match=str(made)):
        synthesize(
            zoo[::-1] if change == "models" else zoo,
            made,
            settings(rate=0.1) if change == "settings" else settings(),
            seed=1 if change == "seed" else 0,
            resume=change != "nothing",
        )
    assert files(made) == before


def test_statistics_come_far_closer_than_those_of_noise(zoo: list[TorchClassifier], tmp_path: Path) -> None:
    how = settings(batch=8, stages=(Stage(scale=0.5, steps=25), Stage(scale=1.0, steps=35)), label=0.0, mixing="none")
    result = synthesize(zoo, tmp_path / "set", how)
    teachers, _ = make_teachers(zoo, how)
    noise = judge(teachers, gaussian_noise(8, 1, (28, 28), 0).pixels, torch.arange(8))
    assert set(result.losses) == {"batchnorm/inverted", "batchnorm/plain"}
    assert all(loss < 0.5 * noise[name] for name, loss in result.losses.items())


def test_label_loss_makes_the_models_see_the_labels(zoo: list[TorchClassifier], tmp_path: Path) -> None:
    result = synthesize(zoo, tmp_path / "set", settings(stages=(Stage(scale=1.0, steps=25),), mixing="label"))
    assert all(loss < 1.0 for name, loss in result.losses.items() if name.startswith("label/"))  # chance: log 10 = 2.3


@pytest.mark.parametrize("mixing", ["none", "label", "all"])
@pytest.mark.parametrize("per_step", [1, None])
def test_every_way_of_mixing_works_with_some_or_all_models(
    mixing: str, per_step: int | None, module_of: Modules, tmp_path: Path
) -> None:
    modules = [module_of(name) for name in ("inverted", "plain", "residual")]
    stages = (Stage(scale=1.0, steps=6),)
    how = settings(batch=8, mixing=mixing, models_per_step=per_step, stages=stages, weight_rate=1e-2)
    teachers, _ = make_teachers(modules, how)
    batch = Batch(teachers, how, (28, 28), torch.arange(8), 0)
    pixels = batch.optimise(Silent())
    assert pixels.shape == (8, 1, 28, 28)
    assert float(pixels.min()) >= 0
    assert float(pixels.max()) <= 1
    assert pixels.std() > 0.05
    assert set(batch.weights.alpha) == {
        f"{kind}/{m.classifier.name}" for kind in ("batchnorm", "label") for m in modules
    }


def test_loss_weights_are_learned_only_when_asked(zoo: list[TorchClassifier]) -> None:
    for rate in (0.0, 0.01):
        how = settings(weight_rate=rate)
        batch = Batch(make_teachers(zoo, how)[0], how, (28, 28), torch.arange(4), 0)
        batch.optimise(Silent())
        assert len(batch.weights.alpha) == 4
        assert all((float(alpha.detach()) == 1) == (rate == 0) for alpha in batch.weights.alpha.values())


def test_images_may_have_another_size_than_the_models(zoo: list[TorchClassifier], tmp_path: Path) -> None:
    synthesize(zoo, tmp_path / "set", settings(images=2), size=(40, 32))
    assert load_images(tmp_path / "set").pixels.shape == (2, 1, 40, 32)


def test_a_last_stage_below_full_size_is_enlarged(zoo: list[TorchClassifier], tmp_path: Path) -> None:
    synthesize(zoo, tmp_path / "set", settings(images=2, stages=(Stage(scale=0.5, steps=2),)))
    assert load_images(tmp_path / "set").pixels.shape == (2, 1, 28, 28)


def test_models_without_statistics_need_another_loss(module_of: Modules, tmp_path: Path) -> None:
    folded = [module_of("inverted_folded")]
    with pytest.raises(SynthesisError, match="BatchNorm"):
        synthesize(folded, tmp_path / "set", settings(label=0.0))
    assert not (tmp_path / "set").exists()
    result = synthesize(folded, tmp_path / "set", settings())
    assert set(result.losses) == {"label/inverted_folded"}


def test_a_model_without_statistics_has_even_channels_to_ask_for(module_of: Modules, tmp_path: Path) -> None:
    """Labels or none; a model that has all its statistics is asked for those alone."""
    modules = [module_of("inverted_folded"), module_of("plain")]
    result = synthesize(modules, tmp_path / "both", settings(label=0.0, unevenness=1.0))
    assert set(result.losses) == {"unevenness/inverted_folded", "batchnorm/plain"}
    result = synthesize(modules[:1], tmp_path / "alone", settings(unevenness=1.0))
    assert set(result.losses) == {"unevenness/inverted_folded", "label/inverted_folded"}
    assert result.left_out == []


def test_even_channels_bring_images_closer_to_the_statistics_that_were_folded(
    module_of: Modules, tmp_path: Path
) -> None:
    """Which the twin of the folded model has kept."""
    folded, kept = module_of("inverted_folded"), module_of("inverted")
    distances = {}
    for name, unevenness in (("labels", 0.0), ("even", 1.0)):
        how = load_synth_recipe("small-labels", "fast", [f"unevenness={unevenness}"], None, {"images": 16})
        synthesize([folded], tmp_path / name, how)
        images = load_images(tmp_path / name)
        compared = compare(kept, images, images, permutations=1).to_stored
        assert compared is not None
        distances[name] = compared[0]
    assert distances["even"] < 0.6 * distances["labels"]


def test_a_folded_model_may_stand_in_the_zoo(module_of: Modules, tmp_path: Path) -> None:
    modules = [module_of("inverted_folded"), module_of("plain")]
    for name, per_step in (("all", None), ("one", 1)):
        result = synthesize(modules, tmp_path / name, settings(label=0.0, models_per_step=per_step))
        assert set(result.losses) == {"batchnorm/plain"}


def test_nothing_to_optimise_is_refused(zoo: list[TorchClassifier], tmp_path: Path) -> None:
    with pytest.raises(SynthesisError):
        synthesize(zoo, tmp_path / "set", settings(label=0.0, batchnorm=0.0))


def test_a_loss_that_diverges_is_refused_with_advice(zoo: list[TorchClassifier], tmp_path: Path) -> None:
    with pytest.raises(SynthesisError, match=r"3 seeds.*rate"):
        synthesize(zoo, tmp_path / "set", settings(variation=1e39))


def test_a_batch_that_diverges_is_made_again_from_another_seed(
    made: Path, zoo: list[TorchClassifier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second shard's first seed is made to fail: all else comes out as it would have, and the count shows."""
    whole = Batch.optimise
    failed: list[int] = []

    def fragile(batch: Batch, task: Task) -> Tensor:
        pixels = whole(batch, task)
        if int(batch.labels[0]) == 5 and not failed:
            failed.append(1)
            raise DivergedError("the loss became nan at step 9")
        return pixels

    monkeypatch.setattr(Batch, "optimise", fragile)
    watching = Watching()
    result = synthesize(zoo, tmp_path / "set", settings(), seed=0, progress=watching)
    assert (result.retried, result.images) == (1, 8)
    assert watching.done == watching.total == 20
    first, second = timeless(tmp_path / "set")["shards"]
    assert (first["attempts"], second["attempts"]) == (1, 2)
    assert first == timeless(made)["shards"][0]
    rows = [json.loads(line) for line in (tmp_path / "set" / "metadata.jsonl").read_text().splitlines()]
    assert rows[-1]["seed"] == second["seed"] != timeless(made)["shards"][1]["seed"]
    mine, other = load_images(tmp_path / "set").pixels, load_images(made).pixels
    assert torch.equal(mine[:4], other[:4])
    assert not torch.equal(mine[4:], other[4:])


def test_images_driven_to_the_limits_have_diverged(zoo: list[TorchClassifier]) -> None:
    how = settings(rate=1e6, stages=(Stage(scale=1.0, steps=1),))
    with pytest.raises(DivergedError, match="limits"):
        Batch(make_teachers(zoo, how)[0], how, (28, 28), torch.arange(4), 0).optimise(Silent())


class Watching(Silent):
    """Counts what is reported."""

    done, total, notes = 0.0, 0.0, 0

    @contextmanager
    def task(self, name: str, total: float) -> Iterator[Watching]:
        self.total += total
        yield self

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        self.done += steps
        self.notes += note is not None


def test_progress_comes_to_its_end_and_shows_the_loss(zoo: list[TorchClassifier], tmp_path: Path) -> None:
    watching = Watching()
    synthesize(zoo, tmp_path / "set", settings(), progress=watching)
    assert watching.done == watching.total == 20
    assert watching.notes > 0


def test_eight_bits_are_what_is_judged() -> None:
    pixels = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert float((from_bytes(to_bytes(pixels)) - pixels).abs().max()) <= 0.5 / 255 + 1e-6


def test_models_of_one_file_name_have_a_loss_term_each(module_of: Modules, tmp_path: Path) -> None:
    """`a/model.onnx b/model.onnx` is how model folders look."""
    modules = []
    for folder, name in (("a", "plain"), ("b", "inverted"), ("c", "residual")):
        path = tmp_path / folder / "model.onnx"
        path.parent.mkdir()
        path.write_bytes(module_of(name).classifier.path.read_bytes())
        modules.append(to_torch(load_classifier(path)))
    made = synthesize(modules, tmp_path / "set", settings(label=0.0))
    assert made.models == ["model", "model.2", "model.3"]
    assert set(made.losses) == {"batchnorm/model", "batchnorm/model.2", "batchnorm/model.3"}


def test_models_without_statistics_are_left_out_and_named(module_of: Modules, tmp_path: Path) -> None:
    said: list[str] = []

    class Heard(Silent):
        def say(self, message: str) -> None:
            said.append(message)

    modules = [module_of("plain"), module_of("inverted_folded")]
    made = synthesize(modules, tmp_path / "set", settings(label=0.0), progress=Heard())
    assert made.models == ["plain"]
    assert [Path(path).stem for path in made.left_out] == ["inverted_folded"]
    assert any("inverted_folded" in message for message in said)


def test_an_unfinished_set_says_so(made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    assert load_images(copy).source == str(copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
    assert "synth --resume" in load_images(copy).source


def test_a_black_picture_is_at_the_limits_in_colour_too() -> None:
    """Mean and standard deviation bring a limit back as 3e-8: it is the 8-bit value that counts."""
    spec = InputSpec(size=(28, 28), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    module = SimpleNamespace(spec=spec, device=torch.device("cpu"), layers=list)
    teacher = SimpleNamespace(name="none", module=module, factors=lambda _: {})
    how = settings(stages=(Stage(scale=1.0, steps=1),))
    batch = Batch([cast("Teacher", teacher)], how, (28, 28), torch.arange(4), 0)
    batch._stage = lambda images, *_: torch.full_like(images, -1e3)  # type: ignore[method-assign]  # of this batch
    with pytest.raises(DivergedError, match="4 of 4 images"):
        batch.optimise(Silent())


def test_a_set_that_is_not_whole_is_not_called_finished(
    zoo: list[TorchClassifier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that does not see the folder of the others."""
    monkeypatch.setattr(Ranks, "deal", lambda self, parts: list(parts)[:1])
    with pytest.raises(OutputError, match="all 2 batches"):
        synthesize(zoo, tmp_path / "set", settings())
    assert not timeless(tmp_path / "set")["finished"]


def test_a_stage_ends_on_a_plateau_and_its_steps_count_as_done(zoo: list[TorchClassifier], tmp_path: Path) -> None:
    """With a rate near zero nothing falls: the first look is the best one, and the second ends the stage."""
    how = settings(batch=8, stages=(Stage(scale=1.0, steps=60),), rate=1e-9, patience=8, flip=False, mixing="none")
    watching = Watching()
    synthesize(zoo, tmp_path / "set", how, progress=watching)
    assert watching.done == watching.total == 60
    assert watching.notes == 2
    falling = Watching()
    synthesize(zoo, tmp_path / "falling", how.model_copy(update={"rate": 0.1}), progress=falling)
    assert falling.done == 60
    assert falling.notes > 4


def test_plateau() -> None:
    assert not any(Plateau(0).reached(1.0, 8) for _ in range(100))
    plateau = Plateau(16)
    assert [plateau.reached(value, 8) for value in (3.0, 2.0, 1.9999, 1.5, 1.5, 1.6)] == [False] * 5 + [True]


def test_sixteen_bits_come_close_to_thirty_two(zoo: list[TorchClassifier], tmp_path: Path) -> None:
    stages = (Stage(scale=1.0, steps=30),)
    losses = [
        synthesize(zoo, tmp_path / kind, settings(batch=8, stages=stages, precision=kind)).losses
        for kind in ("float32", "bfloat16")
    ]
    for name, value in losses[0].items():
        if name.startswith("batchnorm"):
            assert losses[1][name] == pytest.approx(value, rel=0.1)


@pytest.mark.parametrize(("images", "classes"), [(128, 10), (64, 64), (128, 1000), (3, 10), (1, 7)])
def test_labels_are_dealt_out_over_all_classes(images: int, classes: int) -> None:
    labels = deal_labels(images, classes)
    assert len(labels) == images
    assert labels.max() < classes
    counts = torch.bincount(labels, minlength=classes)
    assert counts.max() - counts.min() <= 1
    taken = labels.unique()
    assert len(taken) == min(images, classes)
    if images < classes:  # from one end to the other
        ends = torch.tensor([classes])
        assert taken.diff(append=ends).max() <= -(-classes // images)
        assert int(taken[-1]) >= classes - -(-classes // images)
