"""What a person sees while work goes on."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mixmix_cli.console import Terminal, table


class Screen(io.StringIO):
    """Text that takes itself for a terminal's."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def watched() -> Terminal:
    terminal = Terminal()
    terminal.errors = Console(file=Screen(), force_terminal=True, width=120)  # type: ignore[assignment]  # of the same use
    return terminal


def shown(terminal: Terminal) -> str:
    assert isinstance(terminal.errors.file, io.StringIO)
    return terminal.errors.file.getvalue()


def test_a_part_of_a_task_has_a_line_below_it_and_leaves_it(watched: Terminal) -> None:
    with watched.task("the whole", 4) as whole:
        whole.advance(1)
        with watched.task("its part", 7) as part:
            part.advance(3, "loss 0.5")
            assert watched._bars is not None
            assert [task.description for task in watched._bars.tasks] == ["the whole", "its part"]
            watched._bars.refresh()
        whole.advance(2)
        assert [(task.description, task.completed) for task in watched._bars.tasks] == [("the whole", 3)]
    assert "3/7" in shown(watched)
    assert "loss 0.5" in shown(watched)
    with watched.task("another", 1):
        assert watched._bars is not None
        assert [task.description for task in watched._bars.tasks] == ["another"]


def test_an_error_within_a_part_leaves_no_task_behind(watched: Terminal) -> None:
    with pytest.raises(KeyboardInterrupt), watched.task("the whole", 4), watched.task("its part", 7):
        raise KeyboardInterrupt
    assert watched._bars is None


def test_colours_that_are_forced_make_no_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CI servers do: no bars in the log, no lines broken, no blanks at their ends."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    terminal, name = Terminal(), "folder/" * 20 + "model.onnx"
    with terminal.task("work", 1) as task:
        task.advance(1)
    terminal.show(table(["file", "top-1"], [[name, "1 %"], ["b", "100 %"]]))
    out, err = capsys.readouterr()
    assert err == ""
    assert name in out
    assert "\x1b" not in out
    assert all(line == line.rstrip() for line in out.splitlines())


def test_no_stdout_is_no_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mixmix recipe list >&-`."""
    monkeypatch.setattr("sys.stdout", None)
    terminal = Terminal()
    assert not terminal.on_screen
    terminal.show(table(["file"], [["a"]]))


@pytest.mark.parametrize("width", ["0", "1"])
def test_a_width_that_nothing_fits_in_is_none(
    width: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    Terminal().show(table(["file"], [["a model.onnx"]]))
    assert "a model.onnx" in capsys.readouterr().out


def test_brackets_in_names_are_no_markup(capsys: pytest.CaptureFixture[str], watched: Terminal) -> None:
    name = "b[v2]/m[int8][/x].onnx"
    Terminal().show(table(["file"], [[name]], f"layers of {name}"))
    assert capsys.readouterr().out.count(name) == 2
    with watched.task("inspecting", 2) as task:
        task.advance(1, name)
        assert watched._bars is not None
        watched._bars.refresh()
    assert name in shown(watched)
