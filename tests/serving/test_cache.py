import pytest
import torch

from chatglm_ptuning.serving.cache import BatchCache


def make_cache() -> BatchCache:
    return BatchCache(2, 1, 2, torch.float32, torch.device("cpu"))


def tokens(count: int, value: float) -> list[torch.Tensor]:
    return [torch.full((2, 2, 1, count, 2), value)]


def test_what_a_row_left_behind_is_not_before_the_next_one() -> None:
    cache = make_cache()
    cache.add_rows([tokens(5, 1.0), tokens(3, 2.0)])
    cache.next_token()
    cache.buffer[:, :, 1, :, cache.end - 1] = torch.nan  # of an answer that fails
    cache.remove_row(1)
    for _ in range(4):
        cache.next_token()
    cache.add_rows([tokens(2, 3.0)])
    assert cache.buffer[:, :, 1].isfinite().all()  # a masked NaN is still NaN


def test_moved_row_takes_its_blanks_along() -> None:
    cache = make_cache()
    cache.add_rows([tokens(5, torch.nan), tokens(3, 2.0)])
    cache.remove_row(0)
    assert cache.buffer[:, :, 0].isfinite().all()


def test_full_memory_leaves_the_rows_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache()
    cache.add_rows([tokens(300, 1.0), tokens(2, 2.0)])
    cache.remove_row(0)  # from now on there are columns to spare
    while cache.end < cache.buffer.shape[4]:
        cache.next_token()
        cache.buffer[:, :, 0, :, cache.end - 1] = 2.0

    def fail(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError

    before, end = cache.buffer.clone(), cache.end
    monkeypatch.setattr(torch.Tensor, "new_zeros", fail)
    with pytest.raises(torch.OutOfMemoryError):
        cache.next_token()
    assert cache.end == end
    assert cache.buffer.equal(before)
