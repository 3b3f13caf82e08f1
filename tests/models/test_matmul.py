"""Precision and threads: results stay exact, and torch's settings are restored."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mtl_ranker.models.matmul import fast_matmul, in_blocks, medium_is_exact


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [0, 1, 5, 4_000, 29_999])
@pytest.mark.parametrize("size", [1_000, 5_000])
def test_blocks_cover_every_row_once_and_in_order(rows: int, size: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        numbers = torch.arange(rows)
        blocks = in_blocks(lambda chosen: numbers[chosen], rows, size)
        assert torch.cat(blocks).tolist() == list(range(rows))
        assert max(len(block) for block in blocks) <= (1_000 if size == 1_000 else size * threads)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_block_is_raised_and_restores_the_threads() -> None:
    before = torch.get_num_threads()

    def work(chosen: slice) -> torch.Tensor:
        if chosen.stop == 8_000:
            raise FloatingPointError("row 7999")
        return torch.zeros(chosen.stop - chosen.start)

    with pytest.raises(FloatingPointError, match="row 7999"):
        in_blocks(work, 8_000, 1_000)
    assert torch.get_num_threads() == before


def test_precision_is_restored_after_the_last_of_several_threads() -> None:
    def enter(_: int) -> str:
        with fast_matmul(), fast_matmul():
            return torch.get_float32_matmul_precision()

    default = "medium" if medium_is_exact() else "highest"
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(enter, range(64))) == {default}
    assert torch.get_float32_matmul_precision() == "highest"


def test_products_stay_float32_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MTL_RANKER_MATMUL_PRECISION", raising=False)
    a = torch.randn(200, 200, generator=torch.Generator().manual_seed(1))
    with fast_matmul():
        product = a @ a
    torch.testing.assert_close(product.double(), a.double() @ a.double(), rtol=1e-3, atol=1e-4)


def test_a_precision_set_by_the_process_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with fast_matmul():
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    monkeypatch.setenv("MTL_RANKER_MATMUL_PRECISION", "highest")
    with fast_matmul():
        assert torch.get_float32_matmul_precision() == "highest"


def test_an_unknown_precision_is_named_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MTL_RANKER_MATMUL_PRECISION", "fast")
    message = r"MTL_RANKER_MATMUL_PRECISION = 'fast'; allowed: highest, high, medium"
    with pytest.raises(ValueError, match=message), fast_matmul():
        pass
    monkeypatch.delenv("MTL_RANKER_MATMUL_PRECISION")
    with fast_matmul():
        assert torch.get_float32_matmul_precision() == (
            "medium" if medium_is_exact() else "highest"
        )
    assert torch.get_float32_matmul_precision() == "highest"


def test_products_keep_the_accuracy_of_float32_or_of_bfloat16_factors() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(500, 135), torch.randn(144, 135)
    exact = x.double() @ w.double().t()
    with fast_matmul():
        error = (x @ w.t() - exact).abs().max() / exact.abs().max()
    assert error < 2**-7
