"""What a person sees while work goes on."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mixmix_cli.console import Terminal


@pytest.fixture
def watched() -> Terminal:
    terminal = Terminal()
    terminal.errors = Console(file=io.StringIO(), force_terminal=True, width=120)  # type: ignore[assignment]  # of the same use
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
