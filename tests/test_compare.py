"""The command: its words, its answers, its mistakes."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path

import pytest
from example_records import record, write
from fixtures import ROOT, Command

from tasks import compare


@pytest.fixture
def results(tmp_path: Path) -> Path:
    records = [record(backbone=name, seed=seed) for name in ("small", "large") for seed in (0, 1)]
    return write(tmp_path / "results.jsonl", records)


def test_tables_and_page(command: Command, results: Path) -> None:
    with results.open("a") as lines:
        lines.write('{"task": "det\n')
    done = command("compare")
    assert "### detect on bccd" in done.stdout
    assert f"{results.name}:5: is not JSON" in done.stdout
    page = results.with_name("report.html")
    assert str(page) in done.stderr
    assert "results.jsonl:5" in page.read_text()


def test_a_ledger_in_the_folder_is_taken(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(results.parent)
    assert compare.parse([]).ledger is None
    Path("ledger.json").write_text("{")
    assert compare.parse([]).ledger == "ledger.json"
    assert compare.parse(["ledger=null"]).ledger is None
    for word, message in ((None, "ledger=ledger.json is not JSON"), ("ledger=none.json", "none.json is not a file")):
        monkeypatch.setattr(sys, "argv", ["compare", *([word] if word else [])])
        with pytest.raises(SystemExit):
            compare.main()
        assert message in capsys.readouterr().err


def test_filters_formats_and_no_page(command: Command, results: Path) -> None:
    done = command(
        "compare", "task=detect", "data=bccd", "backbone=small", "format=csv", f"results={results},{results}"
    )
    assert [row["backbone"] for row in csv.DictReader(io.StringIO(done.stdout))] == ["small"]
    assert not results.with_name("report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tsk=detect"], "there is no key 'tsk', did you mean 'task'?"),
        (["detect"], "'detect' is no key=value"),
        (["format=html"], "expected one of markdown, csv, latex, json"),
        (["results=none.jsonl"], "none.jsonl is not a file"),
        (["task=classify"], "task=classify fits no record; there are detect"),
        (["columns="], "columns= is empty"),
    ],
)
def test_mistakes_end_in_one_line(
    words: list[str], message: str, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(results.parent)
    monkeypatch.setattr(sys, "argv", ["compare", *words])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (results.parent / "report.html").exists()


def test_a_file_without_records_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results.jsonl").write_text("nonsense\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no record in it; results\.jsonl:1: is not JSON"):
        compare.work(compare.parse([]))


def test_latencies_alone_are_said_to_be_that(command: Command, tmp_path: Path) -> None:
    write(tmp_path / "results.jsonl", [record(metrics={})])
    assert "1 latencies without scores" in command("compare").stdout


def test_help_lists_every_option() -> None:
    for key in compare.Options.__dataclass_fields__:
        assert key == "filters" or f"  {key}=" in compare.HELP


def test_neither_torch_nor_hydra_is_imported(results: Path) -> None:
    code = "import sys; from tasks import compare; sys.argv[1:] = ['results=' + sys.argv[1], 'report=' + sys.argv[1] + '.html']; compare.main(); sys.exit(bool({'torch', 'hydra'} & set(sys.modules)))"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code, str(results)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
