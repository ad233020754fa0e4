"""How much of this machine's measured peak a network uses, and each of its layers: eager torch.

The peak of arithmetic is one large matrix product, that of memory one large copy. A layer cannot take less time than
its multiply-adds at the one, nor than its bytes at the other; its share is the larger of the two over the time it took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tasks import build
from tasks.benchmark import Options
from tasks.deploy import machine, timing
from tasks.deploy.cases import Case, Plan
from tasks.deploy.latency import call_of
from tasks.deploy.latency_text import Opened, Result, conclude, keep, weights_mb
from tasks.deploy.progress import Progress, show
from tasks.deploy.session import open_model
from tasks.reporting.costs import count
from tasks.training.model import Model

ROUNDS = 30
SLOWEST = 12
SIDE = 1536
"""Of the matrices: 1.4e10 operations, three matrices of 9 MB."""
COPIED = 64 * 2**20
"""Bytes of the copy, beyond what caches hold."""


class Peak(NamedTuple):
    """Of the machine with some number of threads."""

    flops: float
    """Operations a second of float32; a multiply-add is two."""
    bandwidth: float
    """Bytes a second, read and written added up."""


class Layer(NamedTuple):
    """A leaf of the network, or all its leaves of one kind."""

    name: str
    kind: str
    ms: float
    """Median over the passes, of all its calls in a pass."""
    flops: float
    moved: float
    """Bytes that it must read and write: inputs, weights, outputs, once each."""

    def share(self, peak: Peak) -> float:
        """Of the time that the machine could not do without."""
        return 1000 * max(self.flops / peak.flops, self.moved / peak.bandwidth) / self.ms

    def bound(self, peak: Peak) -> str:
        """What limits it on an ideal machine."""
        return "arithmetic" if self.flops / peak.flops > self.moved / peak.bandwidth else "memory"


def measure_peak(rounds: int) -> Peak:
    """One matrix product and one copy, the best of some rounds, with torch's threads as they are."""
    a, b, c = (torch.rand(SIDE, SIDE) for _ in range(3))
    source = torch.rand(COPIED // 4)
    target = torch.empty_like(source)
    product = timing.timed(lambda: torch.mm(a, b, out=c))
    copy = timing.timed(lambda: target.copy_(source))
    times = timing.measure_whole({"product": product, "copy": copy}, rounds, window=2, warmup=6)
    fastest = times.ms.min(axis=0) / 1000
    return Peak(2 * SIDE**3 / float(fastest[0]), 2 * COPIED / float(fastest[1]))


def work(options: Options, planned: Plan) -> int:
    """Measure peak, networks and layers for each number of threads; print. Returns the exit code."""
    rounds = options.rounds or ROUNDS
    cases = list(dict.fromkeys(case._replace(engine="torch", precision="f32") for case in planned.cases))
    progress, watch = Progress(len(cases)), machine.Watch()
    head = ["| backbone | head | size | threads | batch | ms [95 %] | GFLOP/s | share of peak | least time ms | |"]
    head.append("|" + " --- |" * 10)
    rows: list[str] = []
    details: list[str] = []
    left_out: list[str] = []
    interrupted = False
    peaks: dict[int, Peak] = {}
    try:
        for case in cases:
            progress.say(case.label, force=True)
            torch.set_num_threads(case.threads)
            if case.threads not in peaks:
                peaks[case.threads] = measure_peak(rounds)
            row, detail, result = measure_case(case, peaks[case.threads], rounds)
            rows.append(row)
            details += detail
            keep(result, options.results, left_out)
            progress.step()
    except KeyboardInterrupt:
        interrupted = True
    progress.clear()
    load = watch.load()
    lines = ["| threads | matrix product GFLOP/s | copy GB/s |", "| --- | --- | --- |"]
    lines += [f"| {threads} | {one.flops / 1e9:.1f} | {one.bandwidth / 1e9:.1f} |" for threads, one in peaks.items()]
    lines += [
        "",
        *head,
        *rows,
        *details,
        "",
        *machine.in_words(sorted(peaks)),
    ]
    lines += [
        f"peak      the best of {rounds}: a product of two {SIDE} x {SIDE} float32 matrices, a copy of "
        f"{COPIED >> 20} MiB (read + written)",
        "share     of a layer: the least time by its multiply-adds or by the bytes of its inputs, weights and outputs, "
        "over its own; above 100 %: its data lay in caches. Of a network: the layers' least times over its own time",
        "layers    timed one by one by hooks, whose cost of some microseconds is in it; the network's time is without",
        load.in_words(),
        *[f"noisy     {reason}" for reason in machine.noise(load)],
        *[f"left out  {line}" for line in left_out],
    ]
    if interrupted:
        lines.append("stopped   by Ctrl-C: what had been measured")
    show(lines, options.out)
    return conclude(options.results, left_out) if not interrupted else 130


def measure_case(case: Case, peak: Peak, rounds: int) -> tuple[str, list[str], Result]:
    """The network's row, the tables of its slowest layers and of their kinds, and what is recorded of it."""
    network = case.network
    model = build(network.task, network.overrides).to(memory_format=torch.channels_last)
    image = torch.rand(case.batch, 3, *network.size).contiguous(memory_format=torch.channels_last)
    layers = measure_layers(model, image, rounds)
    runner = open_model(model, "torch", case.threads, batch=case.batch)
    opened = Opened(case, runner, count(model, network.size), weights_mb(model), None)
    watch = machine.Watch()
    times = timing.measure_whole({"whole": timing.timed(call_of(opened))}, rounds, window=5, warmup=30)
    ms = times.ms[:, 0]
    summary = timing.summarise(ms)
    flops = sum(layer.flops for layer in layers)
    least = sum(layer.share(peak) * layer.ms for layer in layers)
    size = f"{network.size[0]}x{network.size[1]}"
    load = watch.load()
    noise = machine.noise(load, ms)
    row = (
        f"| {network.backbone} | {network.head} | {size} | {case.threads} | {case.batch} | {summary.median:.2f} "
        f"[{summary.low:.2f}, {summary.high:.2f}] | {flops / summary.median / 1e6:.1f} | "
        f"{100 * least / summary.median:.0f} % | {least:.2f} | {'noisy' if noise else ''} |"
    )
    title = f"{network.backbone} + {network.head} {size}, {case.threads} thread(s), batch {case.batch}"
    details = layer_table(f"slowest layers of {title}", slowest(layers), layers, peak)
    details += layer_table(f"kinds of layers of {title}", by_kind(layers), layers, peak)
    more = {"share_of_peak": round(least / summary.median, 4)}
    return row, details, Result(opened, summary, None, load, noise, times.steady, more=more)


def slowest(layers: Sequence[Layer]) -> list[Layer]:
    """The layers that take longest."""
    return sorted(layers, key=lambda layer: -layer.ms)[:SLOWEST]


def by_kind(layers: Sequence[Layer]) -> list[Layer]:
    """All layers of a kind added up."""
    kinds: dict[str, list[Layer]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    sums = [
        Layer(f"{len(ones)} layers", kind, *(sum(one[i] for one in ones) for i in (2, 3, 4)))  # type: ignore[misc]
        for kind, ones in kinds.items()
    ]
    return sorted(sums, key=lambda layer: -layer.ms)


def layer_table(title: str, shown: Sequence[Layer], layers: Sequence[Layer], peak: Peak) -> list[str]:
    """Markdown."""
    whole = sum(layer.ms for layer in layers)
    lines = ["", title, "", "| layer | kind | ms | of all | MAdds M | MB | share of peak | bound by |"]
    lines.append("|" + " --- |" * 8)
    lines += [
        f"| {one.name} | {one.kind} | {one.ms:.3f} | {100 * one.ms / whole:.1f} % | {one.flops / 2e6:.2f} | "
        f"{one.moved / 1e6:.2f} | {100 * one.share(peak):.0f} % | {one.bound(peak)} |"
        for one in shown
    ]
    return lines


def measure_layers(model: Model, image: Tensor, rounds: int) -> list[Layer]:
    """Time every leaf module by hooks, and count its operations and bytes.

    Args:
        model: in eval mode.
        image: [B, 3, H, W].
        rounds: passes that are counted, after two that are not.
    """
    leaves = {name: part for name, part in model.named_modules() if not list(part.children()) and name}
    counter = FlopCounterMode(display=False)
    flops, moved, calls = (dict.fromkeys(leaves, 0.0) for _ in range(3))
    taken: dict[str, list[float]] = {name: [] for name in leaves}
    started: list[float] = []
    state = {"count": True, "before": 0.0}

    def hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(_module: nn.Module, _inputs: Any) -> None:
            state["before"] = counter.get_total_flops() if state["count"] else 0.0
            started.append(time.perf_counter())

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            ms = (time.perf_counter() - started.pop()) * 1000
            if state["count"]:
                flops[name] += counter.get_total_flops() - state["before"]
                moved[name] += bytes_of([inputs, output, list(module.parameters())])
                calls[name] += 1
            else:
                taken[name][-1] += ms

        return enter, leave

    handles = []
    for name, part in leaves.items():
        enter, leave = hooks(name)
        handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave)]
    with torch.inference_mode():
        with counter:
            model(image)
        state["count"] = False
        for _ in range(rounds + 2):
            for times in taken.values():
                times.append(0.0)
            model(image)
    for handle in handles:
        handle.remove()
    return [
        Layer(name, kind_of(part), max(1e-6, float(np.median(taken[name][2:]))), flops[name], moved[name])
        for name, part in leaves.items()
        if calls[name]
    ]


def kind_of(part: nn.Module) -> str:
    """``depthwise 5x5``, ``1x1``, ``BatchNorm2d``."""
    if isinstance(part, nn.Conv2d):
        sides = "x".join(str(side) for side in part.kernel_size)
        return f"depthwise {sides}" if part.groups == part.in_channels > 1 else f"convolution {sides}"
    return type(part).__name__


def bytes_of(values: Any) -> float:
    """Of all tensors in nested lists and dicts."""
    if isinstance(values, Tensor):
        return float(values.numel() * values.element_size())
    if isinstance(values, dict):
        return sum(bytes_of(value) for value in values.values())
    return sum(bytes_of(value) for value in values) if isinstance(values, (list, tuple)) else 0.0
