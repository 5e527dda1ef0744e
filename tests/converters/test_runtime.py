"""onnxruntime behind one small class: same numbers, errors of one sentence, a time that is a time."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from converters import runtime
from converters.errors import ModelError
from converters.runtime import Array, Session, installation_conflict, serialise
from tests import models
from tests.converters import oracle

MODEL = models.conv().SerializeToString()


def one_line(error: pytest.ExceptionInfo[ModelError], name: str, action: str) -> None:
    message = str(error.value)
    assert message.startswith(f"{name}: onnxruntime cannot {action} the model (")
    assert "\n" not in message
    assert len(message) < len(name) + 400


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "absent.onnx"
    with pytest.raises(ModelError) as caught:
        Session(path)
    one_line(caught, str(path), "load")


@pytest.mark.parametrize("content", [b"", b"not a model", MODEL[:300], models.broken_graph().SerializeToString()])
def test_bad_bytes(content: bytes) -> None:
    with pytest.raises(ModelError) as caught:
        Session(content, name="somewhere.onnx")
    one_line(caught, "somewhere.onnx", "load")


def test_unknown_operator() -> None:
    with pytest.raises(ModelError, match="Frobnicate") as caught:
        Session(models.unknown_operator().SerializeToString())
    one_line(caught, "model", "load")


@pytest.mark.parametrize(
    "batch",
    [np.zeros((1, 3, 8), np.float32), np.zeros((1, 4, 8, 8), np.float32)],
    ids=["rank", "channels"],
)
def test_input_that_does_not_fit(batch: oracle.Array) -> None:
    with pytest.raises(ModelError) as caught:
        Session(MODEL, name="m.onnx").run(batch)
    one_line(caught, "m.onnx", "run")


def test_failing_run_writes_nothing_beside_the_error(capfd: pytest.CaptureFixture[str]) -> None:
    """The sentence is all that a person sees: onnxruntime's own log stays quiet."""
    model = models.fixed_batch(reshape=[1, models.PIXELS])
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    with pytest.raises(ModelError, match="Reshape"):
        Session(model.SerializeToString()).run(models.images(3))
    assert capfd.readouterr().err == ""


def test_outputs_by_name(tmp_path: Path) -> None:
    path = models.write(models.detector(), tmp_path / "model.onnx")
    session, x = Session(path), models.images()
    assert session.input_name == "image"
    assert session.output_names == ["boxes", "scores"]
    boxes, scores = session.run(x)
    assert (boxes.shape, scores.shape) == ((2, 4), (2, 5))
    (alone,) = session.run(x, ["scores"])
    np.testing.assert_array_equal(alone, scores)


def test_optimisation_changes_rounding_only(embedded_path: Path) -> None:
    x = models.random(2, 1, 28, 28)
    fused, plain = (Session(embedded_path, optimise=optimise).run(x)[0] for optimise in (True, False))
    oracle.assert_close(fused, plain, 1e-5)


def test_optimisation_can_be_turned_off() -> None:
    """Folding BatchNormalization rounds its numbers anew, so the last bits tell whether it was folded."""
    content, x = models.batchnorm().SerializeToString(), models.images(20)
    fused, plain, again = (Session(content, optimise=optimise).run(x)[0] for optimise in (True, False, False))
    assert not np.array_equal(fused, plain)
    assert np.array_equal(plain, again)


def test_what_a_file_said_of_its_values_stays_and_nothing_is_said_of_initializers() -> None:
    """Their tensors say it, and onnx-ir would say it again: three per cent of a small file at 4 bits."""
    given = onnx.shape_inference.infer_shapes(models.batchnorm())
    inner = [info.name for info in given.graph.value_info]
    assert inner
    written = onnx.load_from_string(serialise(ir.from_proto(given)))
    assert [info.name for info in written.graph.value_info] == inner
    assert [t.name for t in written.graph.initializer] == [t.name for t in given.graph.initializer]


@pytest.mark.timing
def test_latency_is_in_milliseconds() -> None:
    """Against a stopwatch; the factor of 5 is for a busy machine."""
    session, x = Session(MODEL, threads=1), models.images(2000)
    latency = session.latency(x, seconds=0.05, least=3)
    times = []
    for _ in range(5):
        before = time.perf_counter()
        session.run(x)
        times.append(1e3 * (time.perf_counter() - before))
    assert 0.2 < latency / float(np.median(times)) < 5


@pytest.mark.timing
def test_latency_grows_with_the_work() -> None:
    session = Session(MODEL, threads=1)
    small, large = (session.latency(models.images(batch), seconds=0.02) for batch in (1, 2000))
    assert large > 5 * small


@pytest.mark.parametrize(("each", "runs"), [(0.2, 5), (0.02, 25), (1e-3, 200), (1e-4, 1000)])
def test_how_often_latency_runs(each: float, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second, five runs at least; a tenth of a second is enough for 200."""
    clock, session = [0.0], Session(MODEL, threads=1)

    def run(_: Array) -> list[Array]:
        clock[0] += each
        return []

    monkeypatch.setattr(session, "run", run)
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: clock[0])
    assert session.latency(models.images(1)) == pytest.approx(1e3 * each)
    assert clock[0] / each == pytest.approx(1 + runs, abs=2)


def test_installation_conflict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This environment has one of the two; with both on the path, a sentence says so."""
    assert installation_conflict() is None
    for name in ("onnxruntime", "onnxruntime_gpu"):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    conflict = installation_conflict()
    assert conflict is not None
    assert "uninstall both, reinstall one" in conflict
