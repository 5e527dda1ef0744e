"""Settings of synthesis; recipes (`default`, `labels`, `paper` and others) stand beside this module as TOML files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from recipes.settings import Effort, Jitter, Precision, Settings, Share, load_recipe

PACKAGE = "recipes.synth"


Edge = Annotated[float, Field(gt=0, le=1)]


class Stage(Settings):
    """A part of the schedule: `steps` at `scale` times the full height and width."""

    scale: float = Field(gt=0, le=1)
    steps: int = Field(ge=1)


class SynthSettings(Settings):
    """How images are made. Colour and size amounts are shares; rates are Adam learning rates.

    Images are optimised in normalised units: pixel minus mean, over standard deviation, of the first model's input.
    """

    models: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Of the models given, take only those with these file names (without suffix); all of them when not set."""
    images: int = Field(default=128, ge=1)
    """How many to make."""
    batch: int = Field(default=32, ge=1)
    """Images optimised together: their joint statistics are what is matched. One batch is one shard on disk."""
    start: Literal["noise", "leaves"] = "noise"
    """What optimisation begins with: white noise, or dead leaves: shapes that cover one another."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    """The schedule, stage after stage: `steps` at `scale` times the full height and width."""
    rate: float = Field(default=0.25, gt=0)
    """Learning rate of the images; it falls to zero along a cosine in each stage (MixMix, B.3)."""
    patience: int = Field(default=0, ge=0)
    """A stage ends when its loss has not fallen for this many steps; 0 for never before its time."""
    precision: Precision = "float32"
    """What the models compute in; statistics and losses are float32 throughout. `auto` takes bfloat16 for models with a
    large layer on processors that multiply matrices in it (AMX), and float32 elsewhere."""
    betas: tuple[Share, Share] = (0.5, 0.5)
    """Adam's decay rates for the images."""
    weight_rate: float = Field(default=1e-3, ge=0)
    """Learning rate of the loss weights alpha (MixMix, eq. 8); 0 fixes them at 1."""
    batchnorm: float = Field(default=1.0, ge=0)
    """Factor of the BatchNorm-statistics terms."""
    relative: bool = False
    """Divide each BatchNorm layer's term by the norm of its deviations (the paper does not)."""
    unevenness: float = Field(default=0.0, ge=0)
    """Factor of the unevenness terms: how far channels are from mean 0 and one deviation in the outputs of
    LayerNormalization, and of convolutions that BatchNorm may have been folded into, where training leaves them so."""
    label: float = Field(default=1.0, ge=0)
    """Factor of the cross-entropy terms."""
    prior: Literal["mean", "norm"] = "mean"
    """Whether the image prior is made of mean squares, or of DeepInversion's norms over a batch."""
    variation: float = Field(default=0.0, ge=0)
    """Factor of the total variation (differences of neighbours, in normalised units)."""
    magnitude: float = Field(default=0.0, ge=0)
    """Factor of the mean square of the image, in normalised units."""
    mixing: Literal["none", "label", "all"] = "all"
    """What sees the mixed images: nothing, the label loss alone, or the statistics too (the paper)."""
    box: tuple[Edge, Edge] = (0.1, 0.4)
    """Range of the mixing box's edge, as a share of height and width (MixMix, B.3)."""
    flip: bool = True
    """Mirror half of the samples at each step."""
    shift: float = Field(default=0.0, ge=0, le=1)
    """Largest cyclic shift, as a share of height and width."""
    jitter: Jitter = (0.0, 0.0, 0.0, 0.0)
    """Brightness, contrast, saturation and hue jitter a sample; the last two apply to three channels only."""
    models_per_step: int | None = Field(default=None, ge=1)
    """Draw this many of the models for each step; all of them when not given."""

    @classmethod
    def nested_keys(cls, _key: str) -> list[str]:
        return list(Stage.model_fields)

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def with_steps(self, steps: int) -> SynthSettings:
        """The same with `steps` in all (at least one a stage), shared out over the stages as before."""
        left = max(steps, len(self.stages))
        stages = []
        for index, stage in enumerate(self.stages):
            behind = self.stages[index + 1 :]
            share = round(left * stage.steps / sum(s.steps for s in (stage, *behind)))
            count = min(max(1, share), left - len(behind))
            stages.append(stage.model_copy(update={"steps": count}))
            left -= count
        return self.model_copy(update={"stages": tuple(stages)})


def load_synth_recipe(
    recipe: str, effort: Effort, overrides: Iterable[str], steps: int | None, changes: Mapping[str, Any]
) -> SynthSettings:
    """Settings of a synthesis recipe; `changes` are keys that the user gave as options (None: not given)."""
    given = [f"{key}={value}" for key, value in changes.items() if value is not None]
    settings = load_recipe(SynthSettings, PACKAGE, recipe, effort, [*overrides, *given])
    return settings if steps is None else settings.with_steps(steps)
