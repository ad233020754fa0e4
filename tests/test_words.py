"""Plain command lines: how they end, and what they say of a wrong word."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

import pytest

from tasks.words import command, end_as_by_ctrl_c, pairs, suggest


def raises(error: BaseException) -> Callable[[list[str]], int]:
    def work(words: list[str]) -> int:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        (lambda words: len(words), 2, ""),
        (raises(KeyboardInterrupt()), 130, ""),
        (raises(ValueError("threads=0; expected numbers above 0")), 1, "error: threads=0; expected numbers above 0\n"),
        (raises(FileNotFoundError("there is no results.jsonl")), 1, "error: there is no results.jsonl\n"),
    ],
)
def test_a_command_ends_in_an_exit_code_and_a_line(
    work: Callable[[list[str]], int | None],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["tasks.compare", "task=detect", "by=backbone"])
    with pytest.raises(SystemExit) as end:
        command("help\n", work)
    assert end.value.code == code
    assert capsys.readouterr().err == said


def test_a_command_that_went_well_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tasks.compare"])
    command("help\n", lambda words: None)
    command("help\n", lambda words: 0)


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tasks.compare"])
    with pytest.raises(ZeroDivisionError):
        command("help\n", raises(ZeroDivisionError()))


def test_traceback_shows_one_for_every_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tasks.compare"])
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(SystemExit):
        command("help\n", raises(ValueError("no")))
    assert capsys.readouterr().err.startswith("Traceback")


def test_help_does_no_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["tasks.compare", "task=detect", "--help"])
    command("what it does\n", raises(AssertionError()))
    assert capsys.readouterr().out == "what it does\n"


def test_words_are_pairs() -> None:
    assert list(pairs(["a=1", "b=x=y", "c="])) == [("a", "1"), ("b", "x=y"), ("c", "")]
    with pytest.raises(ValueError, match="'detect' is no key=value"):
        list(pairs(["a=1", "detect"]))


def test_a_near_miss_is_named() -> None:
    assert suggest("smal", ["large", "small"]) == ", did you mean 'small'?"
    assert suggest("xyz", ["large", "small"]) == ""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_what_ends_a_process_ends_it_as_ctrl_c_does(name: str) -> None:
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"there is no {name} here")
    before = signal.getsignal(number)
    try:
        signal.signal(number, signal.SIG_IGN)  # as nohup has it
        end_as_by_ctrl_c()
        assert signal.getsignal(number) is signal.SIG_IGN
        signal.signal(number, signal.SIG_DFL)
        end_as_by_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)
