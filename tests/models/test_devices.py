"""The choice of a device and its refusals. What a GPU computes is checked by ``make gpu-check`` where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from daaswarm.config import load_config
from daaswarm.errors import ConfigError
from daaswarm.experts.loading import load_hosted
from daaswarm.models.cuda import GRAPH_ROWS, get_graph_rows
from daaswarm.models.devices import choose_device, explaining_full, to_device, to_host
from daaswarm.models.sources import find_model, ignore_progress


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)


@pytest.mark.parametrize("gpus", [0], indirect=True)
def test_without_a_gpu(gpus: None) -> None:
    assert choose_device("cpu", key="host.device") == choose_device("auto", key="host.device") == torch.device("cpu")
    for wish in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match=f"host.device = '{wish}': there is no GPU that torch can use") as info:
            choose_device(wish, key="host.device")
        assert info.value.hint == "set host.device to cpu"


@pytest.mark.parametrize("gpus", [2], indirect=True)
def test_with_two_gpus(gpus: None) -> None:
    got = [str(choose_device(wish, key="k")) for wish in ("cpu", "auto", "cuda", "cuda:1")]
    assert got == ["cpu", "cuda:0", "cuda:0", "cuda:1"]
    with pytest.raises(ConfigError, match="this machine has 2, numbered from 0"):
        choose_device("cuda:2", key="k")


@pytest.mark.parametrize("wish", ["", "gpu", "cpu:0", "auto:1", "cuda:x", "cuda:-1", "mps"])
def test_what_is_no_device(wish: str) -> None:
    with pytest.raises(ConfigError, match="is not a device"):
        choose_device(wish, key="k")


@pytest.mark.parametrize("key", ["host.device", "infer.device"])
def test_the_setting(key: str, tmp_path: Path) -> None:
    section, name = key.split(".")
    for wish in ("cpu", "auto", "cuda", "cuda:12"):
        config = load_config(tmp_path / "none.toml", environ={}, flags={key: wish})
        assert getattr(getattr(config, section), name) == wish
    with pytest.raises(ConfigError, match="gpu"):
        load_config(tmp_path / "none.toml", environ={}, flags={key: "gpu"})


@pytest.mark.parametrize("gpus", [0], indirect=True)
def test_a_host_refuses_before_it_reads(gpus: None, dense: Path, cache: Path) -> None:
    model = find_model(str(dense), cache)
    read: list[object] = []
    with pytest.raises(ConfigError, match=r"host\.device = 'cuda'"):
        load_hosted(model, {0: [0]}, "f32", lambda *said: read.append(said), "cuda")
    assert not read
    assert load_hosted(model, {0: [0]}, "f32", ignore_progress, "auto")[0].device == "cpu"


def test_a_full_gpu_is_named() -> None:
    with (
        pytest.raises(ConfigError, match="the memory of cuda:0 is full") as info,
        explaining_full(torch.device("cuda:0"), "infer.device"),
    ):
        raise torch.cuda.OutOfMemoryError
    assert info.value.hint == "move less there, or set infer.device to cpu"


def test_graphs_are_as_large_as_the_call_or_a_little_larger() -> None:
    assert [get_graph_rows(rows) for rows in range(1, 11)] == [1, 2, 4, 4, 8, 8, 8, 8, None, None]
    assert tuple(sorted(GRAPH_ROWS)) == GRAPH_ROWS


def test_on_the_processor_nothing_is_copied() -> None:
    rows = torch.randn(3, 4)
    assert to_host(rows, torch.float32) is rows
    assert to_device(rows, torch.device("cpu"), torch.float32) is rows
    assert to_host(rows.t(), torch.float32).is_contiguous() and to_host(rows, torch.bfloat16).dtype == torch.bfloat16
