"""Lines of many processes."""

import io

import pytest

from trunkline.cli.dev.output import Output


def test_lines_are_aligned_behind_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    stream = io.StringIO()
    output = Output(stream)
    output.line("edge", "a")
    output.line("subscriptions", "b")
    output.ready("http://127.0.0.1:8080/")
    assert stream.getvalue().splitlines() == ["edge            │ a", "subscriptions   │ b", "ready: http://127.0.0.1:8080/"]


def test_color_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Output(io.StringIO()).color
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Output(io.StringIO()).color
