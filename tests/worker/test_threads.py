"""One thread for short steps, and as many as before for all else."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from workbench.worker import threads  # noqa: E402
from workbench.worker.methods import feedback  # noqa: E402


def test_small_matrices_get_one_thread_and_nothing_stays_changed() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = []
        for weights in (threads.ALONE - 1, threads.ALONE):
            with threads.fit_for(weights):
                seen.append(torch.get_num_threads())
        with pytest.raises(KeyError), threads.fit_for(1):
            raise KeyError
        assert (seen, torch.get_num_threads()) == ([1, 2], 2)
    finally:
        torch.set_num_threads(before)


def test_the_feedback_of_one_thread_is_that_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a file is the same bytes on both sides of the border."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(768, 512) * 0.02, torch.randn(1500, 768)
    factor = feedback.factored(inputs.t() @ inputs / 1500, torch.randperm(768), 0.01)
    counts: list[int] = []

    def nearest(column: int, wanted: object) -> object:
        counts.append(torch.get_num_threads())
        return (wanted * 50).round() / 50  # type: ignore[operator]

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone, _ = feedback.feedback(weight, factor, nearest)
        monkeypatch.setattr(threads, "ALONE", 1)
        both, _ = feedback.feedback(weight, factor, nearest)
    finally:
        torch.set_num_threads(before)
    assert counts == [1] * 768 + [2] * 768
    assert torch.equal(alone, both)
