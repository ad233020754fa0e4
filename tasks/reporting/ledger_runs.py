"""Which runs measured the accuracy of a ledger's row: at full scale, at reduced scale, or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tasks.reporting.grouping import BY, differing, flatten, group_of, settings_of
from tasks.reporting.ledger import LedgerTable, Row
from tasks.reporting.results import Record
from tasks.reporting.statistics import Difference, paired_difference

CONF = Path(__file__).resolve().parents[2] / "conf"
HERE, REDUCED, QUOTED, NOT_RUN = "measured here", "measured at reduced scale", "quoted", "not run"
STATUSES = {
    HERE: "runs of the row's network on its data, at its size, for as long as conf/ledger asks, or of whole weights",
    REDUCED: "runs of the row's network on other data, at another size or for shorter: not to be set beside the print",
    QUOTED: "nothing here can measure it; the print is somebody else's",
    NOT_RUN: "the command would train it; no record of it",
}
NOT_ARCHITECTURE = {
    "name", "weights", "bn_momentum", "padding", "head_width", "head_activation", "num_classes", "class_weights",
    "dice", "dropout", "label_smoothing", "first_map_anchors", "min_scale", "max_scale", "loss", "box_loss",
    "box_weight", "match_iou", "negatives", "focal_alpha", "focal_gamma", "score_threshold", "candidates", "nms_iou",
    "detections",
}  # fmt: skip
"""Keys of backbone and head that leave the network what it is, but for the head's columns."""

NOT_RECIPE = {"name", "weights", "num_classes", "head_width", "head_activation", "bn_momentum", "first_map_anchors"}
"""Of those, what is not a choice of the training either: a table's rows may differ in it."""
SETS = {"imagenet": (1_281_167, 1000), "coco": (118_287, 80), "cityscapes": (2_975, 19)}
"""Data set -> training images, classes. ILSVRC 2012; COCO train2017, the classes that occur; Cityscapes, fine."""
OWN = ("best.pt", "last.pt")
"""What a run of ours leaves: its weights are no published ones."""
HOLDS, REVERSED, OPEN = "holds", "is reversed", "is undecided"
ORDERS = {
    HOLDS: "the 95 % bootstrap interval of the paired differences lies on the paper's side of zero",
    REVERSED: "it lies on the other side",
    OPEN: "it holds zero, or there is one pair only",
}


class Measured(NamedTuple):
    """What runs of one network under one set of conditions scored."""

    status: str
    scores: dict[int, float]
    """seed -> fraction; of runs equal in everything the last counts."""
    conditions: str
    key: str
    """Equal for runs that may be compared: task, data, split, size, budget and recipe."""

    @property
    def values(self) -> tuple[float, ...]:
        """The scores by seed."""
        return tuple(self.scores[seed] for seed in sorted(self.scores))


class Ordering(NamedTuple):
    """Two rows of a table as the paper orders them, and runs of both under equal conditions."""

    better: str
    worse: str
    """As printed."""
    printed_points: float
    conditions: str
    difference: Difference
    """Ours, of the better to the worse, seed by seed; fractions."""
    verdict: str
    """A key of ``ORDERS``."""


def architecture(config: Mapping[str, Any], task: str) -> dict[str, dict[str, Any]]:
    """What of a config decides which network is built; a key that it is too old to have is at its default."""
    parts = {"backbone": config.get("backbone") or {}, "head": (config.get("heads") or {}).get(task) or {}}
    return {
        part: {
            key: value
            for key, value in {**_defaults(part, str(node.get("name"))), **node}.items()
            if key not in NOT_ARCHITECTURE
        }
        for part, node in parts.items()
    }


@cache
def _defaults(group: str, name: str) -> dict[str, Any]:
    """The plain values of a part's yaml; none of a part from elsewhere."""
    file = CONF / group / f"{name.partition('/')[0]}.yaml"
    content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {key: value for key, value in content.items() if key != "defaults" and "${" not in str(value)}


def measurements(table: LedgerTable, row: Row, config: Mapping[str, Any], records: Iterable[Record]) -> list[Measured]:
    """The runs that trained a row's network, grouped by conditions, those at full scale first.

    Args:
        table: has the metric and what counts as full scale.
        row: has a network. Where another row is the same at another size, only runs of the row's size are its.
        config: the row's, complete.
        records: of ``results.jsonl``.
    """
    if table.quoted or table.metric is None or row.network is None:
        return []
    wanted = architecture(config, row.network.command)
    groups: dict[tuple[str, str, str], dict[int, float]] = {}
    for record in records:
        value = record["metrics"].get(table.metric)
        if value is None or record["task"] != row.network.command or _untrained(record):
            continue
        size = record["image_size"]
        height, width = (size, size) if isinstance(size, int) else size
        same_size = (height, width) == row.network.size
        if not (same_size or row.alone) or architecture(record["config"], record["task"]) != wanted:
            continue
        full = same_size and record["data"] == table.data and not record.get("note") and _long(record, table)
        start = record["weights"] or "scratch"
        note = f" ({record['note']})" if record.get("note") else ""
        conditions = (
            f"{record['data']}{note}, {record['split']}, {height}x{width}, {record['budget']}, from {Path(start).name}"
        )
        key = json.dumps([conditions, group_of(record), _recipe(record), start], sort_keys=True)
        groups.setdefault((HERE if full else REDUCED, conditions, key), {})[record["seed"]] = value
    names = _conditions([(conditions, key) for _, conditions, key in groups])
    found = [Measured(status, scores, names[key], key) for (status, _, key), scores in groups.items()]
    return sorted(found, key=lambda one: (one.status != HERE, -len(one.scores)))


def _conditions(groups: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Key -> its conditions in words; where two have the same words, with what sets their recipes apart."""
    alike: dict[str, list[str]] = {}
    for conditions, key in groups:
        alike.setdefault(conditions, []).append(key)
    named: dict[str, str] = {}
    for conditions, keys in alike.items():
        labels = differing([flatten(json.loads(key)[2]) for key in keys])
        named |= {
            key: f"{conditions}, {label}" if label else conditions for key, label in zip(keys, labels, strict=True)
        }
    return named


def _recipe(record: Record) -> dict[str, Any]:
    """Everything of a config that is a choice of the training, not of the network."""
    settings = settings_of(record, BY)[1]
    head = (record["config"].get("heads") or {}).get(record["task"]) or {}
    parts = {**(record["config"].get("backbone") or {}), **head}
    of_parts = {key: value for key, value in parts.items() if key in NOT_ARCHITECTURE - NOT_RECIPE}
    return {key: value for key, value in settings.items() if key not in ("backbone", "head", "heads")} | of_parts


def orderings(rows: Sequence[tuple[Row, Sequence[Measured]]]) -> list[Ordering]:
    """Every two rows of a table whose printed scores differ and that were run under equal conditions.

    Args:
        rows: with what was measured of each.
    """
    scored = [(float(row.score), row.name, {one.key: one for one in found}) for row, found in rows if row.score]
    scored.sort(key=lambda one: -one[0])
    ordered = []
    for i, (high, better, ours) in enumerate(scored):
        for low, worse, theirs in scored[i + 1 :]:
            for key in ours.keys() & theirs.keys() if high > low else ():
                difference = paired_difference(ours[key].scores, theirs[key].scores)
                if difference is not None:
                    points = round(high - low, 6)
                    ordered.append(
                        Ordering(better, worse, points, ours[key].conditions, difference, _verdict(difference))
                    )
    return ordered


def _verdict(difference: Difference) -> str:
    if difference.low is None or difference.high is None or difference.low <= 0 <= difference.high:
        return OPEN
    return HOLDS if difference.low > 0 else REVERSED


def _untrained(record: Mapping[str, Any]) -> bool:
    """Scored without training, and not from a whole model's weights."""
    config = record["config"]
    trainer = config.get("trainer") or {}
    return 0 in (trainer.get("max_epochs"), trainer.get("max_steps")) and not config.get("weights")


def _long(record: Mapping[str, Any], table: LedgerTable) -> bool:
    """Whether a run saw all of the published data set, for as long as the table asks; or scored published weights."""
    images, classes = SETS.get(record["data"], (None, None))
    head = (record["config"].get("heads") or {}).get(record["task"]) or {}
    if classes is not None and head.get("num_classes") not in (None, classes):
        return False  # a part of it
    trainer = record["config"].get("trainer") or {}
    if trainer.get("max_epochs") == 0:  # a whole model's weights, scored: see _untrained
        path = Path(str(record["weights"]))
        return (path.suffix != "" or path.name == "imagenet") and path.name not in OWN
    if trainer.get("max_time") is not None:
        return False  # how much of the data they saw stands nowhere
    if trainer.get("max_steps") is not None:
        return images is not None and trainer["max_steps"] * record["batch_size"] >= table.full_epochs * images
    return (trainer.get("max_epochs") or 0) >= table.full_epochs


def status_of(table: LedgerTable, row: Row, found: Sequence[Measured]) -> str | None:
    """Where a row's accuracy stands; None: it prints none."""
    if row.score is None and row.claim is None:
        return None
    if found:
        return found[0].status
    return QUOTED if table.quoted or row.network is None else NOT_RUN
