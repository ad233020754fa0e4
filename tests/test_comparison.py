"""What is compared, what is not, and how it is written down."""

from __future__ import annotations

import csv
import io
import json
import random
import statistics
from collections import defaultdict
from typing import Any

import pytest
from example_records import record

from tasks.reporting.comparison import compare
from tasks.reporting.tables import FORMATS, check_columns, columns_of, latex, markdown

ORDERS = {"map": "abc", "-map": "cba", "params": "bca", "backbone": "abc", "-backbone": "cba", "latency_ms": "cab"}
LATENCY = {"median_ms": 6.5, "engine": "torch", "device": "some CPU", "threads": 1, "batch_size": 1}


def runs(name: str, values: list[float], **changes: Any) -> list[dict[str, Any]]:
    """One run a value, seeds 0, 1, ..."""
    return [record(backbone=name, seed=seed, metrics={"map": value}, **changes) for seed, value in enumerate(values)]


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "segment"},
        {"data": "voc"},
        {"split": "val"},
        {"image_size": [320, 321]},
        {"budget": "20 min"},
        {"note": "10 % of train"},
        {"config": {"data_seed": 1}},
        {"config": {"data": {"name": "bccd", "val": 0.2}}},
    ],
)
def test_what_may_not_be_compared_stands_in_another_table(changes: dict[str, Any]) -> None:
    comparison = compare([record(), record(backbone="large", **changes)])
    assert [len(table.rows) for table in comparison.tables] == [1, 1]
    assert comparison.tables[0].title != comparison.tables[1].title


def test_minutes_of_another_machine_are_another_budget() -> None:
    timed = {"trainer": {"max_time": "00:00:10:00"}}
    assert len(compare([record(config=timed), record(config=timed, device="fast CPU")]).tables) == 2
    assert len(compare([record(), record(device="fast CPU")]).tables) == 1


def test_where_the_data_lie_makes_no_difference() -> None:
    here, there = ({"data": {"name": "bccd", "root": root}} for root in ("a", "b"))
    [table] = compare([record(config=here), record(config=there, seed=1, image_size=[320, 320])]).tables
    assert [len(row.runs) for row in table.rows] == [2]
    [table] = compare([record(image_size=320), record(seed=1)]).tables
    assert [len(row.runs) for row in table.rows] == [2]


def test_rows_hold_runs_that_differ_in_the_seed_only() -> None:
    slow, fast = {"optimizer": {"lr": 0.01, "name": "adamw"}}, {"optimizer": {"lr": 0.1, "name": "adamw"}}
    [table] = compare([*runs("small", [0.1, 0.2], config=slow), *runs("small", [0.3], config=fast)]).tables
    assert [(row.settings, len(row.runs)) for row in table.rows] == [("optimizer.lr=0.1", 1), ("optimizer.lr=0.01", 2)]
    assert any("optimizer.lr" in line for line in table.mind)


def test_by_never_pools_what_it_does_not_name() -> None:
    heads = [
        record(head=head, config={"head": {"name": head, "depth": i}}) for i, head in enumerate(["ssd", "fcoslite"])
    ]
    [table] = compare(heads, by=["backbone"]).tables
    assert sorted(row.settings for row in table.rows) == ["head=fcoslite", "head=ssd"]


def test_of_equal_runs_the_last_counts() -> None:
    [table] = compare([*runs("small", [0.1, 0.2]), *runs("small", [0.3])]).tables
    assert table.rows[0].by_seed("map") == {0: 0.3, 1: 0.2}
    assert any("1 run repeated" in line for line in table.left_out)


def test_means_are_brute_force_s() -> None:
    draw = random.Random(0)
    records = [
        record(
            backbone=draw.choice("abcd"), head=draw.choice("xy"), data=draw.choice(["p", "q"]), seed=seed,
            metrics={"map": draw.random(), "map_50": draw.random() if draw.random() < 0.9 else None},
        )
        for seed in range(300)
    ]  # fmt: skip
    values: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for one in records:
        for metric, value in one["metrics"].items():
            if value is not None:
                values[one["data"], one["backbone"], one["head"], metric].append(value)
    found = {
        (table.fields["data"], row.names["backbone"], row.names["head"], metric): row.stats[metric]
        for table in compare(records).tables
        for row in table.rows
        for metric in table.metrics
    }
    assert found.keys() == values.keys()
    for key, stat in found.items():
        assert stat == pytest.approx((statistics.mean(values[key]), statistics.stdev(values[key]), len(values[key])))


def test_overlapping_spreads_are_not_ranked() -> None:
    records = [*runs("a", [0.50, 0.52]), *runs("b", [0.51, 0.52]), *runs("c", [0.30, 0.31]), *runs("d", [0.9])]
    [table] = compare(records).tables
    assert {row.names["backbone"]: row.place for row in table.rows} == {
        "a": (1, 2),
        "b": (1, 2),
        "c": (3, 3),
        "d": None,
    }
    assert any("1 row of one seed" in line for line in table.left_out)


def test_differences_are_paired_by_seed() -> None:
    records = [*runs("a", [0.5, 0.6, 0.7]), *runs("b", [0.4, 0.5, 0.6, 0.0])]
    [table] = compare(records).tables
    assert table.base == "a + ssdlite"
    assert table.rows[1].difference == pytest.approx((-0.1, -0.1, -0.1, 3))
    [table] = compare(records, against="b").tables
    assert table.rows[0].difference == pytest.approx((0.1, 0.1, 0.1, 3))
    with pytest.raises(ValueError, match=r"against=zzz.*a \+ ssdlite"):
        compare(records, against="zzz")


@pytest.mark.parametrize(("sort", "order"), ORDERS.items())
def test_sorting(sort: str, order: str) -> None:
    [table] = compare(
        [
            *runs("a", [0.3], params=30, latency=LATENCY),
            *runs("b", [0.2], params=10),
            *runs("c", [0.1], params=20, latency=LATENCY | {"median_ms": 1}),
        ],
        sort=sort,
    ).tables
    assert "".join(row.names["backbone"] for row in table.rows) == order


def test_latency_is_shown_only_where_its_conditions_agree() -> None:
    records = [
        *runs("a", [0.3, 0.4], latency=LATENCY),
        *runs("b", [0.2], latency=LATENCY | {"median_ms": 4.0}),
        *runs("c", [0.1], latency=LATENCY | {"threads": 2}),
        *runs("d", [0.1], latency=LATENCY | {"device": "other CPU"}),
        *runs("e", [0.1]),
    ]
    [table] = compare(records).tables
    shown = {row.names["backbone"]: row.latency_ms for row in table.rows}
    assert shown == {"a": 6.5, "b": 4.0, "c": None, "d": None, "e": None}
    assert sum("other conditions" in line for line in table.left_out) == 2
    assert "1 thread, batch 1, some CPU" in markdown(compare(records))


def test_a_benchmark_s_latency_joins_the_trained_row() -> None:
    ort = LATENCY | {"engine": "onnxruntime", "median_ms": 2.0}
    records = [
        *runs("a", [0.3], latency=LATENCY),
        *runs("b", [0.2], latency=LATENCY, params=7),
        record(backbone="a", metrics={}, latency=ort, budget="0"),
        record(backbone="b", metrics={}, latency=ort, budget="0"),  # another network: its params differ
    ]
    [table] = compare(records, {"latency.engine": ["onnx*"]}).tables
    assert [row.latency_ms for row in table.rows] == [2.0, None]
    [table] = compare(records).tables
    assert [row.latency_ms for row in table.rows] == [6.5, 6.5]


def test_calm_measurements_are_preferred() -> None:
    records = runs("a", [0.3, 0.4, 0.5], latency=LATENCY)
    for busy in records[:2]:
        busy["latency"] = LATENCY | {"median_ms": 60.0, "noisy": True}
    [table] = compare(records).tables
    assert table.rows[0].latency_ms == 6.5
    assert not any("busy" in line for line in table.mind)
    records[2]["latency"] = records[0]["latency"]
    [table] = compare(records).tables
    assert table.rows[0].latency_ms == 60
    assert "the latency of 1 row was only ever measured on a busy machine" in table.mind


def test_a_benchmark_on_a_calm_machine_outvotes_what_nobody_checked() -> None:
    records = runs("a", [0.3, 0.4, 0.5], latency=LATENCY)
    [table] = compare(records).tables
    assert any(line.startswith("the latency of 1 row was taken within seconds after training") for line in table.mind)
    calm = record(backbone="a", metrics={}, latency=LATENCY | {"median_ms": 5.0, "noisy": False})
    [table] = compare([*records, calm]).tables
    assert table.rows[0].latency_ms == 5.0
    assert not any("after training" in line for line in table.mind)
    busy = record(backbone="a", metrics={}, latency=LATENCY | {"median_ms": 60.0, "noisy": True})
    assert compare([*records, busy]).tables[0].rows[0].latency_ms == 6.5


def test_filters_choose_and_say_what_they_left_out() -> None:
    records = [*runs("small", [0.1]), *runs("large", [0.2], config={"optimizer": {"lr": 0.5}}), *runs("large_x", [0.3])]
    comparison = compare(records, {"backbone": ["large*"]})
    assert len(comparison.tables[0].rows) == 2
    assert comparison.left_out == ["1 record by backbone=large*"]
    assert len(compare(records, {"config.optimizer.lr": ["0.5"]}).tables[0].rows) == 1
    assert len(compare(records, {"image_size": ["320x320"]}).tables[0].rows) == 3
    with pytest.raises(ValueError, match="fits no record; there are large, large_x, small"):
        compare(records, {"backbone": ["huge"]})
    with pytest.raises(ValueError, match=r"no record has a field config\.x"):
        compare(records, {"config.x": ["1"]})
    with pytest.raises(ValueError, match=r"sort=foo.*map"):
        compare(records, sort="foo")


def test_commits_that_differ_are_said() -> None:
    [table] = compare([record(commit="a" * 40, dirty=True), record(commit="b" * 40, seed=1)]).tables
    assert any("2 commits (aaaaaaaa, bbbbbbbb)" in line for line in table.mind)
    assert any("changed after" in line for line in table.mind)


def test_joint_runs_show_each_task_s_metric() -> None:
    joint = record(task="multitask", metrics={"classify/loss": 0.1, "classify/top1": 0.9, "detect/map": 0.3})
    [table] = compare([joint]).tables
    assert columns_of(table)[:5] == ["backbone", "head", "n", "detect/map", "classify/top1"]


def example() -> list[dict[str, Any]]:
    return [*runs("a_1", [0.5, 0.6], latency=LATENCY), *runs("b|<&>", [0.25, 0.35]), *runs("c", [0.4])]


def test_markdown() -> None:
    lines = markdown(compare(example())).split("\n")
    assert lines[0] == "### detect on bccd, test split, 320x320 px, budget 10 min"
    assert lines[2].replace(" ", "").startswith("|place|backbone|head|n|map%|")
    assert "| 1 " in lines[4]
    assert "55.0 ± 7.1" in lines[4]
    assert "b\\|<&>" in markdown(compare(example()))
    assert len({len(line) for line in lines[2:7]}) == 1


def test_csv_holds_plain_numbers() -> None:
    rows = list(csv.DictReader(io.StringIO(FORMATS["csv"](compare(example()), None))))
    assert [row["backbone"] for row in rows] == ["a_1", "c", "b|<&>"]
    assert float(rows[0]["map"]) == pytest.approx(0.55)
    assert float(rows[0]["map_sd"]) == pytest.approx(statistics.stdev([0.5, 0.6]))
    assert (rows[0]["n"], rows[1]["map_sd"], rows[0]["budget"]) == ("2", "", "10 min")
    assert float(rows[2]["difference_mean"]) == pytest.approx(-0.25)


def test_json_holds_everything() -> None:
    [table] = json.loads(FORMATS["json"](compare(example()), None))["tables"]
    assert table["rows"][0]["metrics"]["map"]["n"] == 2
    assert table["rows"][0]["latency_ms"] == 6.5
    assert table["latency"]["engine"] == "torch"


def test_latex_is_escaped() -> None:
    text = latex(compare(example()))
    assert r"a\_1" in text
    assert r"b|\textless{}\&\textgreater{}" in text
    assert r"55.0 $\pm$ 7.1" in text
    assert text.count(r"\\") == 4


def test_columns_as_asked() -> None:
    text = markdown(compare(example()), ["backbone", "device", "map"])
    assert [cell.strip() for cell in text.split("\n")[2].strip("|").split("|")] == ["backbone", "device", "map %"]
    assert "some CPU" in text
    with pytest.raises(ValueError, match=r"no column 'mop', did you mean 'map'\?; there are .*map"):
        check_columns(compare(example()).tables, ["backbone", "mop"])
    check_columns(compare(example()).tables, ["backbone", "note", "map"])


def test_a_column_that_one_table_has_is_empty_in_the_others() -> None:
    other = [{**record, "task": "classify", "metrics": {"top1": 0.5}} for record in example()[:1]]
    comparison = compare([*example(), *other])
    check_columns(comparison.tables, ["backbone", "map"])
    first, second = (text.splitlines()[4] for text in markdown(comparison, ["backbone", "map"]).split("### ")[1:])
    assert first.split("|")[2].strip() == "-"
    assert "±" in second


def test_a_field_that_no_record_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"by=bakbone: no record has a field bakbone, did you mean 'backbone'\?"):
        compare(example(), by=["bakbone"])


def test_the_folder_says_which_data_a_layout_holds() -> None:
    """Two folders read by data=folder are two data sets; one that was moved to another disk is one."""
    roots = ("/data/cats", "/disk/cats/", "/data/xrays")
    runs = [
        {**example()[0], "data": "folder", "seed": seed, "config": {"data": {"name": "folder", "root": root}}}
        for seed, root in enumerate(roots)
    ]
    tables = compare(runs).tables
    assert sorted(len(row.runs) for table in tables for row in table.rows) == [1, 2]
    assert len(tables) == 2


@pytest.mark.parametrize("name", ["coco", "imagenet"])
def test_two_sets_in_a_known_layout_are_two(name: str) -> None:
    roots = ("/datasets/set", "/d/set", "/d/cars")
    runs = [
        {**example()[0], "data": name, "seed": seed, "config": {"data": {"name": name, "root": root}}}
        for seed, root in enumerate(roots)
    ]
    assert sorted(len(row.runs) for table in compare(runs).tables for row in table.rows) == [1, 2]


def test_where_the_parts_of_a_joint_set_lie_makes_no_difference() -> None:
    def joint(seed: int, cells: str, streets: str) -> dict[str, Any]:
        parts = {"cells": {"name": "bccd", "root": cells}, "streets": {"name": "masks", "root": streets}}
        return record(data="combined", seed=seed, config={"data": {"name": "combined", "parts": parts}})

    same = [joint(0, "../data/bccd", "/d/streets"), joint(1, "/d/cells", "/disk/streets/")]
    [table] = compare(same).tables
    assert [len(row.runs) for row in table.rows] == [2]
    assert len(compare([*same, joint(2, "/d/cells", "/d/fields")]).tables) == 2


def test_n_is_that_of_the_mean() -> None:
    runs = [{**example()[0], "seed": seed, "metrics": {"map": value}} for seed, value in enumerate((0.5, 0.6, None))]
    assert "| 2 of 3 " in markdown(compare(runs))


def test_a_filter_on_latencies_that_fits_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"latency\.engin=torch fits no latency"):
        compare(example(), {"latency.engin": ["torch"]})
