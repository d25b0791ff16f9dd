"""Mixed precision: fallback to fp32, and settings restored on exit."""

from typing import Any

import pytest
import torch

from llm.model.precision import autocast, computed_precision, fp32_products


@pytest.mark.parametrize("has_bf16", [False, True])
def test_a_cpu_falls_back_to_fp32(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16})
    found = {
        requested: computed_precision(requested, "cpu")
        for requested in ("fp32", "tf32", "bf16", "fp16")
    }
    assert found.pop("bf16") == ("bf16" if has_bf16 else "fp32")
    assert set(found.values()) == {"fp32"}
    assert autocast("fp16", "cpu")._enabled is False


@pytest.mark.parametrize("requested", ["fp32", "tf32", "bf16", "fp16"])
def test_a_gpu_computes_in_the_requested_precision(requested: Any) -> None:
    assert computed_precision(requested, "cuda") == requested


@pytest.mark.parametrize("requested", ["fp32", "tf32", "bf16"])
def test_fp32_products_are_rounded_as_requested_and_restored(requested: Any) -> None:
    """torch has three getters, two of them older; Inductor asks all, so all must answer alike."""
    products = torch.backends.cuda.matmul

    def found() -> tuple[str, bool, str]:
        return products.fp32_precision, products.allow_tf32, torch.get_float32_matmul_precision()

    before = found()
    for other in ("fp32", "tf32"):  # one inside the other
        with fp32_products(other, "cuda"):  # type: ignore[arg-type]
            outside = found()
            with pytest.raises(RuntimeError, match="on the way"), fp32_products(requested, "cuda"):
                is_tf32 = requested == "tf32"
                expected = ("tf32", True, "high") if is_tf32 else ("ieee", False, "highest")
                assert found() == expected
                raise RuntimeError("on the way")
            assert found() == outside
    assert found() == before
