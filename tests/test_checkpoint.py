"""Checkpoints: whole or not at all, read without running anything, refused with a reason."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tasks import build, load
from tasks.training import checkpoint


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"model": {"w": torch.ones(3)}})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*the one before it is whole.*free some space"):
        checkpoint.save(path, {"model": {"w": torch.zeros(3)}})
    assert checkpoint.load(path)["model"]["w"].tolist() == [1, 1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch /tmp/evil",)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", pickle.dumps({"model": Evil()})])
def test_a_file_that_is_no_checkpoint_is_refused_and_not_run(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "best.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"best\.pt cannot be read as a checkpoint"):
        checkpoint.load(path)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    checkpoint.save(path, {"model": {"w": torch.ones(10_000)}})
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(path)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"another architecture: weight \(2, 3\) here, \(2, 4\) there"):
        checkpoint.fill(nn.Linear(3, 2), nn.Linear(4, 2).state_dict(), "x.pt")
    with pytest.raises(ValueError, match="bias is left over"):
        checkpoint.fill(nn.Linear(3, 2, bias=False), nn.Linear(3, 2).state_dict(), "x.pt")
    with pytest.raises(ValueError, match="another architecture") as caught:
        checkpoint.fill(nn.Linear(3, 2), {f"key {i}": torch.zeros(1) for i in range(20)}, "x.pt")
    assert all(f"key {i} is left over" in str(caught.value) for i in range(20))
    assert " more" not in str(caught.value)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    small = build("detect", ["head.num_classes=2"])
    path = tmp_path / "small.pt"
    checkpoint.save(path, {"model": small.state_dict()})
    with pytest.raises(ValueError, match="of another net"):
        build("detect", ["backbone=large", "head.num_classes=2", f"weights={path}"])
    again = build("detect", ["head.num_classes=2", f"weights={path}"])
    ours, theirs = small.state_dict(), again.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_loading_a_folder_that_is_none_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no run folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path)
