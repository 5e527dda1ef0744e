"""How often the input spec is detected: architectures by spec, BatchNorm statistics taken from photographs.

    pip install -e '.[bench]'
    python benchmarks/detection.py                  # about ten minutes on one core

Weights are random (seed 0), not trained ones; the statistics of every BatchNorm are those of 8 crops of each
photograph at 96x96 under the spec. Once of all 18 photographs, of which four are also the detector's own, and once of
the other 14, nine of which are gray and the rest far from typical (a retina, stained tissue, a deep field).
"""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import torchvision
from photographs import NAMES, random_crops
from torch import Tensor, nn

from converters.classifier import Classifier
from converters.detect import KNOWN
from converters.export import export_kept
from converters.input_spec import InputSpec
from converters.load import load_classifier

ARCHITECTURES = """
    resnet18 resnet50 mobilenet_v2 mobilenet_v3_large mnasnet1_0 densenet121 shufflenet_v2_x1_0 regnet_x_400mf googlenet
    efficientnet_b0 timm/seresnet50 timm/repvgg_a0 timm/ghostnet_100 timm/dla34
""".split()  # noqa: SIM905  (words in rows are easier to read and to add to)
DETECTORS_OWN = ("astronaut", "chelsea", "coffee", "rocket")
CROPS, SIDE = 8, 96
OUTCOMES = ("right", "right but for the channel order", "assumed", "wrong")


def specs() -> dict[str, InputSpec]:
    """The normalisations in use, and ImageNet's in BGR."""
    wanted = {known.name: known.keys(known.orders[0]) for known in KNOWN}
    wanted["ImageNet, BGR"] = KNOWN[0].keys("bgr")
    return {name: InputSpec(size=(SIDE, SIDE), **keys) for name, keys in wanted.items()}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("timm/"):
        return timm.create_model(name.removeprefix("timm/"))
    return torchvision.models.get_model(name)


@torch.no_grad()
def trained_on(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with the statistics of `x` in each BatchNorm."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()(x)
    return model.eval()


def outcome(found: Classifier, wanted: InputSpec) -> str:
    if found.spec.source == "assumed":
        return OUTCOMES[2]
    same = (found.spec.scale, sorted(found.spec.mean)) == (wanted.scale, sorted(wanted.mean))
    if not same:
        return OUTCOMES[3]
    return OUTCOMES[0] if found.spec.channels == wanted.channels else OUTCOMES[1]


def main() -> None:
    warnings.simplefilter("ignore")
    crops = random_crops(slice(None), CROPS, seed=3).pixels
    crops = F.interpolate(crops, (SIDE, SIDE), mode="bilinear", antialias=True)
    of_photograph = torch.arange(len(crops)) // CROPS
    own = torch.isin(of_photograph, torch.tensor([NAMES.index(name) for name in DETECTORS_OWN]))
    for title, images in (("all 18 photographs", crops), ("the 14 that the detector does not have", crops[~own])):
        counts: dict[str, Counter[str]] = {name: Counter() for name in specs()}
        for architecture in ARCHITECTURES:
            for name, spec in specs().items():
                model = trained_on(build(architecture), spec.to_input(images))
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "model.onnx"
                    export_kept(model, torch.zeros(2, 3, SIDE, SIDE), path)
                    counts[name][outcome(load_classifier(path), spec)] += 1
        total = sum(counts.values(), Counter())
        print(f"\nStatistics of {title}; {len(ARCHITECTURES)} architectures\n")
        print(f"| spec | {' | '.join(OUTCOMES)} |\n{'| --- ' * (len(OUTCOMES) + 1)}|")
        for name, counted in [*counts.items(), ("all", total)]:
            print(f"| {name} | {' | '.join(str(counted[kind]) for kind in OUTCOMES)} |", flush=True)


if __name__ == "__main__":
    main()
