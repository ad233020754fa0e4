"""Which runs measured the accuracy of a ledger's row: at full scale, at reduced scale, or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tasks.reporting.ledger import LedgerTable, Row

HERE, REDUCED, QUOTED, NOT_RUN = "measured here", "measured at reduced scale", "quoted", "not run"
STATUSES = {
    HERE: "runs of the row's network on its data, at its size, for as long as conf/ledger asks, or of whole weights",
    REDUCED: "runs of the row's network on other data, at another size or for shorter: not to be set beside the print",
    QUOTED: "nothing here can measure it; the print is somebody else's",
    NOT_RUN: "the command would train it; no record of it",
}
NOT_ARCHITECTURE = {
    "name", "weights", "bn_momentum", "padding", "head_width", "head_activation", "num_classes", "class_weights",
    "dropout", "label_smoothing", "first_map_anchors", "min_scale", "max_scale", "loss", "box_loss", "box_weight",
    "match_iou", "negatives", "focal_alpha", "focal_gamma", "score_threshold", "candidates", "nms_iou", "detections",
}  # fmt: skip
"""Keys of backbone and head that leave the network what it is, but for the head's columns."""


class Measured(NamedTuple):
    """What runs of one network under one set of conditions scored."""

    status: str
    values: tuple[float, ...]
    """Fractions, a seed each."""
    conditions: str


def architecture(config: Mapping[str, Any], task: str) -> dict[str, dict[str, Any]]:
    """What of a config decides which network is built."""
    parts = {"backbone": config.get("backbone") or {}, "head": (config.get("heads") or {}).get(task) or {}}
    return {
        part: {key: value for key, value in node.items() if key not in NOT_ARCHITECTURE} for part, node in parts.items()
    }


def measurements(
    table: LedgerTable, row: Row, config: Mapping[str, Any], records: Iterable[Mapping[str, Any]]
) -> list[Measured]:
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
    groups: dict[tuple[str, str], list[float]] = {}
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
        groups.setdefault((HERE if full else REDUCED, conditions), []).append(value)
    found = [Measured(status, tuple(values), conditions) for (status, conditions), values in groups.items()]
    return sorted(found, key=lambda one: one.status != HERE)


def _untrained(record: Mapping[str, Any]) -> bool:
    """Scored without training, and not from a whole model's weights."""
    config = record["config"]
    trainer = config.get("trainer") or {}
    return 0 in (trainer.get("max_epochs"), trainer.get("max_steps")) and not config.get("weights")


def _long(record: Mapping[str, Any], table: LedgerTable) -> bool:
    trainer = record["config"].get("trainer") or {}
    if trainer.get("max_epochs") == 0:
        return True  # a whole model's weights, scored: see _untrained
    if trainer.get("max_time") is not None or trainer.get("max_steps") is not None:
        return False  # how much of the data they saw stands nowhere
    return (trainer.get("max_epochs") or 0) >= table.full_epochs


def status_of(table: LedgerTable, row: Row, found: Sequence[Measured]) -> str | None:
    """Where a row's accuracy stands; None: it prints none."""
    if row.score is None and row.claim is None:
        return None
    if found:
        return found[0].status
    return QUOTED if table.quoted or row.network is None else NOT_RUN
