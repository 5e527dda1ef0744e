"""Named zoos: what the paper lists, and files that are models with their statistics and their input spec."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from converters.classifier import Classifier
from converters.errors import MixMixError, OutputError
from converters.load import load_classifier
from recipes import libraries, zoo
from recipes.pipeline import choose_models
from recipes.synth.settings import load_synth_recipe
from recipes.zoo_facts import show_files


def small(*models: str) -> zoo.Zoo:
    members = [zoo.Member(paper=name, accuracy=None, library="torchvision", name=name) for name in models]
    return zoo.Zoo("small", "for tests", tuple(members))


def test_the_papers_zoos_are_complete() -> None:
    zoos = zoo.named_zoos()
    assert {name: len(found.members) for name, found in zoos.items()} == {
        "mixmix": 21, "mixmix-mobile": 3, "mixmix-residual": 3,
    }  # fmt: skip
    for found in zoos.values():
        assert max(Counter(member.file_name for member in found.members).values()) == 1  # one file each
        assert all(member.library in libraries.LIBRARIES for member in found.members)


def test_every_torchvision_member_exists() -> None:
    from torchvision import models

    known = models.list_models(module=models)
    members = {m.name for found in zoo.named_zoos().values() for m in found.members if m.library == "torchvision"}
    assert members
    assert members <= set(known)


def test_a_misspelt_zoo_is_told_the_nearest() -> None:
    with pytest.raises(MixMixError, match="'mixmix-mobile'"):
        zoo.find_zoo("mixmix-mobil")


def test_exported_members_keep_statistics_and_say_what_they_take(tmp_path: Path) -> None:
    done = libraries.export_zoo(small("shufflenet_v2_x0_5"), tmp_path / "models", trained=False)
    (path,) = done.written
    assert (path.name, done.kept, done.failed) == ("shufflenet_v2_x0_5.onnx", [], {})
    classifier = load_classifier(path)
    assert classifier.has_statistics
    assert classifier.fixed_batch is None
    spec = classifier.spec
    assert (spec.source, spec.size, spec.mean, spec.labels) == (
        "metadata", (224, 224), (0.485, 0.456, 0.406), "imagenet-1k",
    )  # fmt: skip
    before = path.read_bytes()
    again = libraries.export_zoo(small("shufflenet_v2_x0_5"), tmp_path / "models", trained=False)
    assert (again.written, again.kept) == ([], [path])
    assert path.read_bytes() == before
    trained = libraries.export_zoo(small("shufflenet_v2_x0_5"), tmp_path / "models")
    assert "random weights, not" in trained.failed["shufflenet_v2_x0_5.onnx"]  # never taken for the trained one
    assert classifier.original.metadata_props[libraries.SOURCE] == "torchvision/shufflenet_v2_x0_5, random weights"
    facts = show_files([classifier])
    assert facts.models[0].batchnorms == 56
    assert facts.models[0].classes == 1000
    assert facts.dimension == 3 * 224 * 224
    assert facts.needed == -(-(facts.dimension + 1) // facts.models[0].width)
    path.write_bytes(before[:1000])
    cut_off = libraries.export_zoo(small("shufflenet_v2_x0_5"), tmp_path / "models", trained=False)
    assert "replace it with --force" in cut_off.failed["shufflenet_v2_x0_5.onnx"]


def test_a_member_that_cannot_be_had_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr(libraries, "is_installed", lambda library: library != "timm")
    members = (
        zoo.Member("a", None, "timm", "resnet50d"),
        zoo.Member("b", None, "torchvision", "no_such_net"),
        zoo.Member("c", None, "elsewhere", "net"),
        *small("shufflenet_v2_x0_5").members,
    )
    done = libraries.export_zoo(zoo.Zoo("mixed", "for tests", members), tmp_path, trained=False)
    assert [path.name for path in done.written] == ["shufflenet_v2_x0_5.onnx"]
    assert "pip install timm" in done.failed["resnet50d.onnx"]
    assert "no_such_net" in done.failed["no_such_net.onnx"]
    assert "elsewhere" in done.failed["net.onnx"]
    assert [path.name for path in tmp_path.iterdir()] == ["shufflenet_v2_x0_5.onnx"]


def test_weights_that_cannot_be_fetched_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("network is unreachable\nand more")

    monkeypatch.setattr(models, "get_model", unreachable)
    with pytest.raises(libraries.LibraryError, match="network is unreachable"):
        libraries.create("torchvision", "resnet18")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file"):
        libraries.export_zoo(small("resnet18"), tmp_path / "file" / "models", trained=False)


@pytest.mark.parametrize("name", ["mixmix-mobile", "mixmix-residual"])
def test_the_small_zoos_recipes_are_the_papers_on_their_members(name: str) -> None:
    paper = load_synth_recipe("paper", "default", (), None, {})
    small_zoo = load_synth_recipe(name, "default", (), None, {})
    assert small_zoo.models == tuple(member.name for member in zoo.find_zoo(name).members)
    assert small_zoo.model_copy(update={"models": None}) == paper


def test_a_recipe_takes_its_own_models_out_of_those_given(classifier_of: Callable[[str], Classifier]) -> None:
    given = [classifier_of(name) for name in ("plain", "residual", "inverted")]
    settings = load_synth_recipe("default", "default", ['models=["inverted","plain"]'], None, {})
    assert [model.name for model in choose_models(given, settings, "mine")] == ["inverted", "plain"]
    assert choose_models(given, load_synth_recipe("default", "default", (), None, {}), "default") == given
    with pytest.raises(MixMixError, match="two have the same"):
        choose_models([*given, given[0]], settings, "mine")
    with pytest.raises(MixMixError, match=r"recipe mine .* inverted\.onnx is not among"):
        choose_models(given[:2], settings, "mine")
