"""What makes runs comparable: what a table's runs share, what sets its rows apart, and how both are named."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tasks.reporting.results import Record

BY = ("backbone", "head", "weights")
"""The fields that name a row unless others are asked for."""
NOT_SETTINGS = {
    "seed", "results", "output", "resume", "workers", "cache_gb", "eval_batch_size", "hydra", "overrides",
    "data", "data_seed", "trainer.progress", "trainer.save_every", "trainer.threads", "trainer.max_epochs",
    "trainer.max_steps", "trainer.max_time", "image_size", "task", "tasks", "weights", "skip_done",
}  # fmt: skip
"""Config keys that change no result, or that name the table already."""
NOT_DATA = {"root", "on_error", "name", "_target_"}
LAYOUTS = ("folder", "voc", "masks", "coco", "imagenet")
"""Data yamls that name a layout and no data set: there the root's last part says which."""
ABSENT = object()


def value_at(record: Mapping[str, Any], name: str) -> Any:
    """What stands at a dotted name; ``ABSENT`` if nothing does."""
    value: Any = record
    for part in name.split("."):
        value = value.get(part, ABSENT) if isinstance(value, Mapping) else ABSENT
    return value


def text_of(value: Any) -> str | None:
    """As shown and as typed in filters; None of what is not there."""
    if value is ABSENT:
        return None
    if value is None:
        return "none"
    if isinstance(value, list):
        return "x".join(str(item) for item in value)
    return str(value)


def field_text(record: Record, name: str) -> str:
    """A field of a record as tables show it, ``-`` where there is none."""
    if name == "weights" and record["weights"] is None:
        return "scratch"
    if name == "image_size":
        return size_text(record["image_size"])
    return text_of(value_at(record, name)) or "-"


def size_text(size: int | list[int]) -> str:
    """``320x320``."""
    return f"{size}x{size}" if isinstance(size, int) else f"{size[0]}x{size[1]}"


def group_of(record: Record) -> tuple[str, ...]:
    """What a table's runs share; the last part defines the data beyond its name."""
    config = record["config"]
    data = config.get("data")
    own = defining(data, record["data"]) if isinstance(data, dict) else {}
    budget = record["budget"]
    if (config.get("trainer") or {}).get("max_time") is not None:
        # minutes of another machine are another budget
        budget += f" on {record['device']}, {record['threads']} threads"
    definition = json.dumps({"data_seed": config.get("data_seed"), "data": own}, sort_keys=True)
    note = record.get("note") or ""
    return record["task"], record["data"], note, record["split"], size_text(record["image_size"]), budget, definition


def defining(data: Mapping[str, Any], name: object) -> dict[str, Any]:
    """The settings that say which data set it is, wherever it lies; of a joint one's parts, too."""
    own = {key: value for key, value in data.items() if key not in NOT_DATA}
    if name in LAYOUTS and data.get("root"):
        own["root"] = str(data["root"]).rstrip("/").rpartition("/")[2]
    if isinstance(data.get("parts"), dict):
        parts = {key: part for key, part in data["parts"].items() if isinstance(part, dict)}
        own["parts"] = {key: defining(part, part.get("name")) for key, part in parts.items()}
    return own


def titles(groups: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """A title each; where two would be equal, with what defines their data differently."""
    alike: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for group in groups:
        alike[group[:-1]].append(group)
    named = {}
    for (task, data, note, split, size, budget), members in alike.items():
        labels = differing([flatten(json.loads(member[-1])) for member in members])
        for member, label in zip(members, labels, strict=True):
            data_text = data + (f" ({note})" if note else "") + (f", {label}" if label else "")
            named[member] = f"{task} on {data_text}, {split} split, {size} px, budget {budget or 'unknown'}"
    return named


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> leaf."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differing(flat: Sequence[Mapping[str, Any]], most: int = 4) -> list[str]:
    """For each the ``key=value`` pairs that are not the same in all, the record's own fields first."""
    if len(flat) < 2:
        return [""] * len(flat)
    keys = dict.fromkeys(key for one in flat for key in one)
    different = [key for key in keys if len({json.dumps(one.get(key), sort_keys=True) for one in flat}) > 1]
    fields = {key for key in different if "." not in key}
    # a differing head explains all of head.*
    brief = [key for key in different if key in fields or key.partition(".")[0] not in fields]
    for wanted in (brief[:most], brief, different):
        labels = [" ".join(f"{k}={text_of(one.get(k, ABSENT)) or '-'}" for k in wanted) for one in flat]
        if len(set(labels)) == len(flat):
            break
    return labels


def settings_of(record: Record, by: Sequence[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """What may set a run apart from others of its table, but the seed: fields that name no row, and the config."""
    config = {k: v for k, v in record["config"].items() if k not in NOT_SETTINGS}
    if "head" in config:
        config.pop("heads", None)
    if isinstance(config.get("trainer"), dict):
        config["trainer"] = {k: v for k, v in config["trainer"].items() if f"trainer.{k}" not in NOT_SETTINGS}
    return {name: field_text(record, name) for name in BY if name not in by}, config
