"""Builds every row of the ledger and counts it, on torch's ``meta`` device: no memory, no arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from hydra.errors import InstantiationException
from torch.utils.flop_counter import FlopCounterMode

from backbones.blocks import SqueezeExcite
from tasks.cli import compose
from tasks.reporting.costs import Costs, count
from tasks.reporting.ledger import (
    DIFFERS,
    NOT_BUILT,
    NOT_PRINTED,
    UNITS,
    Figure,
    LedgerTable,
    Network,
    Row,
    judge,
    side_lengths,
)
from tasks.reporting.ledger_runs import Measured, measurements, status_of
from tasks.reporting.results import Record
from tasks.training.build import complete, model_from_config, plain
from tasks.training.model import Model


class Found(NamedTuple):
    """A figure of ours beside the printed one."""

    figure: Figure
    ours: int | None
    verdict: str
    why: str | None
    """Why it differs."""
    tried: dict[str, tuple[int, str]]
    """Other countings: what they give, and the verdict on that."""

    @property
    def off(self) -> float | None:
        """Ours over the print, minus 1."""
        if self.ours is None or self.figure.printed is None:
            return None
        return self.ours / (float(self.figure.printed) * UNITS[self.figure.unit]) - 1


@dataclass(frozen=True)
class Outcome:
    """A row with all that was found."""

    row: Row
    figures: dict[str, Found]
    status: str | None
    measured: list[Measured]
    not_built: str | None
    """Why."""


def find(table: LedgerTable, records: Sequence[Record] = ()) -> list[Outcome]:
    """Every row of a table, in order; a row that cannot be built says why.

    Args:
        table: with the rows that are wanted.
        records: of ``results.jsonl``, for accuracies.
    """
    outcomes = []
    for row in table.rows:
        found: list[Measured] = []
        not_built = row.why["row"] if row.network is None else None
        figures = {
            key: Found(figure, None, NOT_BUILT if figure.printed else NOT_PRINTED, None, {})
            for key, figure in row.figures.items()
        }
        if row.network is not None:
            try:
                figures = {key: _find(row, key, figure) for key, figure in row.figures.items()}
            except (ValueError, InstantiationException) as error:  # an optional library is not installed, say
                reason = error.__cause__ if isinstance(error, InstantiationException) else error
                if not isinstance(reason, ValueError):
                    raise
                not_built = str(reason)
            else:
                if records and not table.quoted:
                    config = complete(plain(_compose(row.network.command, row.network.overrides)))[0]
                    found = measurements(table, row, config, records)
        outcomes.append(Outcome(row, figures, status_of(table, row, found), found, not_built))
    return outcomes


def _find(row: Row, key: str, figure: Figure) -> Found:
    assert row.network is not None
    ours = _value(row.network, key)
    if row.less:
        ours -= _value(row.less, key)
    verdict = judge(figure, ours, tolerance=key != "params")
    if verdict != DIFFERS:
        return Found(figure, ours, verdict, None, {})
    tried = {}
    for label, other in row.tried.items():
        if key == other.figure or (other.figure is None and "@" not in key):
            value = count_as(other.network)[key == "params"]
            if other.less:
                value -= count_as(other.less)[key == "params"]
            tried[label] = value, judge(figure, value, tolerance=key != "params")
    return Found(figure, ours, verdict, row.why.get(key, "no reason is known"), tried)


def _value(network: Network, key: str) -> int:
    """A count by its name: ``params``, ``madds``, ``madds@512x1024``."""
    name, _, size = key.partition("@")
    return count_as(network._replace(size=side_lengths(size)) if size else network)[name == "params"]


def count_as(network: Network) -> tuple[int, int]:
    """Multiply-adds and parameters by the network's convention."""
    costs = _costs(network.command, network.overrides, network.size)
    more = 0
    if network.resizing:
        more = _resizing(build_meta(network.command, network.overrides), network.size, network.resizing)
    params = costs.params if network.batch_norm else costs.params_without_bn
    if network.folded:  # batch norm into the convolution before it, whose bias its shift becomes
        shifts = (costs.params - costs.params_without_bn) // 2
        params = costs.params_without_bn + shifts - _gate_biases(build_meta(network.command, network.overrides))
    return costs.madds + more, params


@cache
def _costs(command: str, overrides: tuple[str, ...], size: tuple[int, int]) -> Costs:
    return count(build_meta(command, overrides), size)


@cache
def build_meta(command: str, overrides: tuple[str, ...]) -> Model:
    """What ``tasks.build`` gives, on the meta device."""
    with torch.device("meta"):
        return model_from_config(_compose(command, overrides)).eval()


_compose = cache(compose)


def _gate_biases(model: Model) -> int:
    gates = [module for module in model.modules() if isinstance(module, SqueezeExcite)]
    return sum(layer.bias.numel() for gate in gates for layer in (gate.reduce, gate.expand) if layer.bias is not None)


def _resizing(model: Model, size: tuple[int, int], each: int) -> int:
    """Multiply-adds of all bilinear resizing, that of the output to the input's size included."""

    def flops(*_shapes: object, out_shape: Sequence[int], **_more: object) -> int:
        return 2 * each * math.prod(out_shape)

    image = torch.empty(1, 3, *size, device="meta")
    counters = [FlopCounterMode(display=False, custom_mapping=mapping) for mapping in ({}, {_BILINEAR: flops})]
    for counter in counters:
        with torch.no_grad(), counter:
            outputs = model(image)
    plain_flops, all_flops = (counter.get_total_flops() for counter in counters)
    classes = sum(output.shape[1] for output in outputs.values())
    return (all_flops - plain_flops) // 2 + each * classes * math.prod(size)


_BILINEAR = torch.ops.aten.upsample_bilinear2d
