"""`mixmix report`, end to end: the page holds what commands printed, and nothing that runs or is fetched."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from recipes import records
from recipes.demo import COLUMNS
from tests.mixmix_cli.command import run
from tests.mixmix_cli.report_page import NAMES, Page, load

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a & b &amp; c",
    "$x_1$ and \\$",
    "层/畳み込み/свёртка",
    "--> ]]> {{ 7 * 7 }} {% raw %}",
    "_hidden",
    "x" * 5000,
)


def test_the_page_names_what_it_reports(page: Page) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", page.source)
    assert len(headings) == 2 + len(NAMES)
    assert page.title.startswith("MixMix report: inverted, model.w2.onnx, model.w3.onnx, model.s50.onnx")
    assert f"<h1>{page.title}</h1>" in page.source


def test_nothing_is_fetched_and_nothing_runs(page: Page) -> None:
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "foreignobject"}
    for tag, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            if key in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert str(value).startswith(("data:image/", "#")), (tag, key, value)
    assert not re.search(r"https?:", page.source)
    assert not re.search(r"@import|url\((?!#)", page.source)
    assert any(a.get("http-equiv") == "Content-Security-Policy" for _, a in page.tags)


def test_identifiers_are_unique_and_point_to_something(page: Page) -> None:
    known = [str(attributes["id"]) for _, attributes in page.tags if "id" in attributes]
    assert len(known) == len(set(known))
    pointed = {str(a["href"])[1:] for _, a in page.tags if str(a.get("href", "")).startswith("#")}
    pointed |= set(re.findall(r"url\(#(.*?)\)", page.source))
    assert pointed
    assert pointed <= set(known)


def test_the_images_are_in_the_page(made: Path, page: Page) -> None:
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 2  # the set's and the demo's
    head, _, content = str(pictures[0]["src"]).partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(content) == (made / "data" / "preview.png").read_bytes()
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert (str(image.width), str(image.height)) == (pictures[0]["width"], pictures[0]["height"])
        assert image.width > 100


def test_validation_figures_are_those_of_the_file(made: Path, page: Page) -> None:
    document = load(made, "validate")
    grid = page.grid("Validation: model.w2.onnx", "as they are")
    reference, candidates = document["reference"], document["candidates"]
    keys = {
        "top-1": "top1", "top-5": "top5", "agreement": "agreement", "drop": "drop", "KL": "kl", "SNR": "snr_db",
        "size": "size_bytes", "latency": "latency_ms",
    }  # fmt: skip
    assert [cell.text for cell in grid.column("model")] == [
        f"{reference['path']} (reference)", *(candidate["path"] for candidate in candidates),
    ]  # fmt: skip
    for column, key in keys.items():
        assert [cell.value for cell in grid.column(column)[1:]] == [candidate[key] for candidate in candidates]
    assert grid.column("top-1")[0].value == reference["top1"]
    assert grid.column("top-1")[1].text == f"{100 * candidates[0]['top1']:.2f} %"
    said = ["failed: max-drop" if candidate["failed"] else "passed" for candidate in candidates]
    assert said[0] != "passed"
    assert [cell.text for cell in grid.column("gates")[1:]] == said
    gates = page.grid("Validation: model.w2.onnx", "Gates")
    expected = [gate for candidate in candidates for gate in candidate["gates"]]
    assert [cell.text for cell in gates.column("why")] == [gate["reason"] for gate in expected]
    assert [cell.text == "passed" for cell in gates.column("verdict")] == [gate["passed"] for gate in expected]


def test_layer_noise_is_told_in_full(made: Path, page: Page) -> None:
    candidate = load(made, "validate")["candidates"][0]
    grid = page.grid("Validation: model.w2.onnx", "layers of model.w2.onnx")
    for column, key in {"own SNR": "own_snr_db", "SNR": "snr_db", "zeros": "sparsity"}.items():
        assert [cell.value for cell in grid.column(column)] == [layer[key] for layer in candidate["layers"]]
    for layer in candidate["layers"]:
        assert layer["name"] in page.labels
        assert format(layer["own_snr_db"], ".1f") in page.labels


@pytest.mark.parametrize("name", ["quantize", "brecq", "prune", "distill"])
def test_compression_figures_are_those_of_the_file(made: Path, page: Page, name: str) -> None:
    document = load(made, name)
    section = f"Compression: {Path(document['output']).name}"
    facts = page.facts(section)
    assert facts.fact("size before").value == document["size_bytes"]["before"]
    assert facts.fact("size after").value == document["size_bytes"]["after"]
    assert facts.fact("zeros among the weights").value == document["sparsity"]
    assert facts.fact("made from").text == document["input"]
    assert ("taught by" in [row[0].text for row in facts.rows]) == (name == "distill")
    layers = page.grid(section, "layers in figures")
    word = "change" if name == "distill" else "error"
    assert [cell.text for cell in layers.column("layer")] == [layer["name"] for layer in document["layers"]]
    assert [cell.value for cell in layers.column(word)] == [layer["error"] for layer in document["layers"]]
    assert [cell.text for cell in layers.column("bits")] == [
        str(layer["bits"] or "float") for layer in document["layers"]
    ]
    if document["blocks"]:
        blocks = page.grid(section, "blocks in figures")
        for key in ("before", "after"):
            assert [cell.value for cell in blocks.column(key)] == [block[key] for block in document["blocks"]]
        assert {block["name"] for block in document["blocks"]} <= set(page.labels)
    agreement = page.grid(section, "as they are").column("agreement")[1]
    assert agreement.value == document["validation"]["candidates"][0]["agreement"]
    assert "not ground truth" in page.text


def test_the_summary_has_every_candidate(made: Path, page: Page) -> None:
    grid = page.grid("", "At a glance")
    documents = [load(made, name) for name in NAMES]
    validations = [
        d.get("validation", d) for d in documents if isinstance(d, dict) and ("validation" in d or "candidates" in d)
    ]
    expected = [(v, candidate) for v in validations for candidate in v["candidates"]]
    assert [cell.value for cell in grid.column("size")] == [candidate["size_bytes"] for _, candidate in expected]
    ratios = [v["reference"]["size_bytes"] / candidate["size_bytes"] for v, candidate in expected]
    assert [cell.value for cell in grid.column("smaller")] == pytest.approx(ratios)
    failed = sum(not candidate["passed"] for _, candidate in expected)
    assert f"{failed} of {len(expected)} results fail a gate: model.w2.onnx in validate.json (max-drop)" in page.text


def test_synthesis_figures_are_those_of_the_set(made: Path, page: Page) -> None:
    manifest = json.loads((made / "data" / "manifest.json").read_text())
    facts = page.facts("Images: data")
    assert facts.fact("images").value == 6
    assert facts.fact("state").text == "finished"
    assert facts.fact("recipe").text == manifest["identity"]["recipe"]
    assert facts.fact("batches").value == len(manifest["shards"]) == 2
    assert facts.fact("time it took").value == pytest.approx(sum(shard["seconds"] for shard in manifest["shards"]))
    losses = page.grid("Images: data", "Losses")
    assert dict(zip(
        [cell.text for cell in losses.column("loss")], [cell.value for cell in losses.column("value")], strict=True
    )) == manifest["losses"]  # fmt: skip
    models = page.grid("Images: data", "Models that")
    assert [cell.text for cell in models.column("SHA-256")] == [m["sha256"] for m in manifest["identity"]["models"]]
    assert "final losses of each batch, not the steps" in page.text
    final = page.grid("Synthesis: data", "Losses")
    assert [cell.value for cell in final.column("value")] == list(load(made, "synth")["final"].values())


def test_the_other_documents(made: Path, page: Page) -> None:
    inspected = load(made, "inspect")
    models = page.grid("Models: model.onnx", "files say")
    assert [cell.value for cell in models.column("MACs")] == [model["macs"] for model in inspected]
    assert [cell.value for cell in models.column("folded")] == [m["batchnorm"]["folded"] for m in inspected]
    assert "quantized already" in page.text
    comparison, facts = load(made, "compare"), page.facts("Image sets: data")
    assert facts.fact("MMD²").value == comparison["mmd2"]
    assert facts.fact("p-value").value == comparison["p_value"]
    demo = json.loads((made / "demo" / "results.json").read_text())
    grid = page.grid("Demo: inverted", "Top-1")
    for column in COLUMNS:
        assert [cell.value for cell in grid.column(column)] == [row[column] for row in demo["top1"].values()]


def test_bars_are_as_long_as_their_values() -> None:
    from mixmix_cli.report import plots

    values = [0.8, 0.1, 0.4]
    drawn = str(plots.bars(["a", "b", "c"], values, ["", "", ""], "x", "what"))
    paths = re.findall(r'<path d="([^"]*)"[^>]*style="fill: var\(--accent\)', drawn)
    spans = [[float(x) for x in re.findall(r"[ML] ([\d.]+)", path)] for path in paths]
    lengths = [max(span) - min(span) for span in spans]
    assert [length / lengths[0] for length in lengths] == pytest.approx([value / 0.8 for value in values], abs=1e-3)


def test_points_stand_at_their_values() -> None:
    from mixmix_cli.report import plots

    drawn = str(plots.lines({"a": {0: 1.0, 1: 2.0, 2: 4.0}, "b": {0: 3.0}}, "x", "y", "what"))
    heights = [float(y) for y in re.findall(r'<use [^>]*y="([\d.]+)"[^>]*fill: var\(--paper\)', drawn)][:3]
    assert len(heights) == 3
    assert (heights[0] - heights[2]) / (heights[0] - heights[1]) == pytest.approx(3, abs=1e-2)


def hostile(document: dict[str, Any]) -> dict[str, Any]:
    """The document with names of layers and blocks that mean harm."""
    document = copy.deepcopy(document)
    for entry, name in zip(document["layers"], HOSTILE, strict=False):
        entry.update(name=name, error=entry["error"] + 1, reason=name)  # large, so that each is drawn
    for entry, name in zip(document["blocks"], HOSTILE, strict=False):
        entry["name"] = name
    document["output"] = f"/tmp/{HOSTILE[1]}.onnx"
    document["validation"]["candidates"][0]["path"] = HOSTILE[0]
    return document


def test_hostile_names_are_text(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path) -> None:
    bad = tmp_path / '<img src=x onerror="1">&amp;层.json'
    bad.write_text(json.dumps(hostile(load(made, "brecq"))))
    data = tmp_path / "<b>&'\"" / "set"
    shutil.copytree(made / "data", data)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["identity"]["models"][0]["name"] = HOSTILE[0]
    for shard in manifest["shards"]:
        shard["losses"] = {f"{HOSTILE[1]}/{HOSTILE[0]}": 1.0, "a/\ud800\x00\x1b": 2.0, "_/_x": 3.0}
    (data / "manifest.json").write_text(json.dumps(manifest))
    output = tmp_path / "out.html"
    status, _, err = run(capsys, "report", bad, data, "-o", output)
    assert (status, err) == (0, "")
    page = Page(output)
    test_nothing_is_fetched_and_nothing_runs(page)
    assert [tag for tag, _ in page.tags].count("img") == 1
    assert "<script" not in page.source
    assert page.source.isprintable() or not re.search(r"[^\S\n ]|[\ud800-\udfff\x00\x1b]", page.source)
    layers = page.grid("Compression", "layers in figures")
    assert [cell.text for cell in layers.column("layer")][: len(HOSTILE)] == list(HOSTILE)
    for name in HOSTILE[:-1]:
        assert name in page.labels
    assert f"…{'x' * 44}" in page.labels
    assert any("\ufffd\ufffd\ufffd" in label for label in page.labels)
    assert bad.name in page.text
    assert str(data) in page.text
    assert HOSTILE[1] in page.title


def test_reading_direction_cannot_be_turned(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path) -> None:
    document = load(made, "pass")
    document["candidates"][0]["path"] = "good\u202edessap.onnx"
    (tmp_path / "v.json").write_text(json.dumps(document))
    assert run(capsys, "report", tmp_path / "v.json", "-o", tmp_path / "r.html")[0] == 0
    assert "\u202e" not in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: None, "1 of 1 results passes every gate that was asked for"),
        (lambda d: d["candidates"][0].update(gates=d["candidates"][0]["gates"][-2:]), "No gate was asked for"),
        (lambda d: d["candidates"][0]["gates"][0].update(passed=False), "1 of 1 results fails a gate"),
        (lambda d: d["candidates"][0].update(passed=False, failed=["min-top1"]), "model.onnx in v.json (min-top1)"),
        (lambda d: d["candidates"][0].update(failed=["min-top1"]), "1 of 1 results fails a gate"),
    ],
)
def test_the_verdict(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path, change: Any, said: str) -> None:
    """A file that contradicts itself is no pass."""
    document = load(made, "pass")
    change(document)
    (tmp_path / "v.json").write_text(json.dumps(document))
    assert run(capsys, "report", tmp_path / "v.json", "-o", tmp_path / "r.html")[0] == 0
    assert said in Page(tmp_path / "r.html").text


def test_an_unfinished_set_is_called_so(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path) -> None:
    """As a killed run leaves it: the manifest of the beginning, and records of what was finished."""
    data = tmp_path / "data"
    shutil.copytree(made / "data", data)
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(
        json.dumps({"format": 2, "finished": False, "identity": manifest["identity"], "shards": []})
    )
    (data / "preview.png").unlink()
    (data / "shards" / "00001.json").unlink()
    assert run(capsys, "report", data, "-o", tmp_path / "r.html")[0] == 0
    page = Page(tmp_path / "r.html")
    assert page.facts("Images").fact("state").text.startswith("not finished: 4 of 6")
    assert [tag for tag, _ in page.tags].count("img") == 1  # drawn from the images that are there


@pytest.mark.parametrize("content", [b"", b"not an image", b"<svg xmlns='x'><script/></svg>"])
def test_a_preview_that_is_no_image(
    capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path, content: bytes
) -> None:
    data = tmp_path / "data"
    shutil.copytree(made / "data", data)
    (data / "preview.png").write_bytes(content)
    assert run(capsys, "report", data, "-o", tmp_path / "r.html")[0] == 0
    page = Page(tmp_path / "r.html")
    source = next(str(attributes["src"]) for tag, attributes in page.tags if tag == "img")
    assert base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG")


def test_a_heavy_sheet_becomes_a_jpeg(tmp_path: Path) -> None:
    grain = np.random.default_rng(0).integers(0, 60, (1000, 1000, 3))
    noise = (np.arange(1000)[:, None, None] // 6 + grain).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "preview.png")
    assert (tmp_path / "preview.png").stat().st_size > records.HEAVY
    sheet = records.read_sheet(tmp_path)
    assert sheet is not None
    assert (sheet.media, sheet.width, sheet.height) == ("image/jpeg", 1000, 1000)
    assert len(sheet.content) < records.HEAVY
    with Image.open(io.BytesIO(sheet.content)) as image:
        assert np.abs(np.asarray(image).astype(float) - noise).mean() < 16


def test_many_layers_are_drawn_in_part(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path) -> None:
    document = load(made, "brecq")
    document["layers"] = [
        {"name": f"layer {i}", "bits": 4, "act_bits": None, "sparsity": 0.0, "error": 1 / (1 + i)} for i in range(120)
    ]
    (tmp_path / "q.json").write_text(json.dumps(document))
    assert run(capsys, "report", tmp_path / "q.json", "-o", tmp_path / "r.html")[0] == 0
    page = Page(tmp_path / "r.html")
    assert "40 of 120 are drawn" in page.text
    assert "layer 39" in page.labels
    assert "layer 40" not in page.labels
    assert len(page.grid("Compression", "layers in figures").rows) == 121
