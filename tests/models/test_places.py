"""A device that is not there, and a dtype that is none, are refused before anything is loaded."""

import pytest
import torch

from moa_lab.models import device_of, dtype_of, load_model


@pytest.fixture
def only_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("only_a_cpu")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", torch.device("cuda"), "cpux", "mps", "xpu", "meta", "", "cpu:3", 7, "cuda:-1"])
def test_a_device_that_is_not_here_is_refused_before_a_model_is_looked_for(device: object) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ValueError, match="use one of: cpu") as caught:
        load_model("nobody/has-this", device=device)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert str(device) in str(caught.value)


def test_the_index_is_held_against_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="use one of: cpu, cuda:0, cuda:1"):
        device_of("cuda:2")


@pytest.mark.parametrize("dtype", ["float64", "bf16", "", torch.float64, torch.int8, torch.float8_e4m3fn, 16, ["float32"]])
def test_another_dtype_is_refused_before_a_model_is_looked_for(dtype: object) -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16"):
        load_model("nobody/has-this", device="cpu", dtype=dtype)  # type: ignore[arg-type]


def test_a_dtype_may_be_given_by_name() -> None:
    assert dtype_of("bfloat16") is dtype_of(torch.bfloat16) is torch.bfloat16
    assert dtype_of(None) is None
