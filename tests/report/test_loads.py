"""Latencies, throughput and goodput from samples made by hand."""

from __future__ import annotations

import pytest

from workbench.records import LoadPoint, Request
from workbench.report.loads import figures, keeps, own


def request(sent_s: float, first_s: float = 0.1, gaps: tuple[float, ...] = (0.01, 0.03), error: str = "") -> Request:
    return Request(sent_s, 0.0, 50, first_s + sum(gaps), first_s, [*gaps], [1, 2, 2][: len(gaps) + 1], error)


def test_the_latencies_of_one_answer() -> None:
    each = request(0.0)
    assert own(each, "ttft") == 0.1 and own(each, "e2e") == pytest.approx(0.14)
    assert own(each, "tpot") == pytest.approx(0.04 / 4), "over tokens, not chunks"
    assert own(each, "itl") == pytest.approx(0.0298)
    one = request(0.0, gaps=())
    assert own(one, "itl") is None and own(one, "tpot") is None


def test_limits() -> None:
    assert keeps(request(0.0), {"ttft": 0.1, "itl": 0.03, "tpot": 0.011, "e2e": 0.15})
    assert not keeps(request(0.0), {"ttft": 0.09})
    assert not keeps(request(0.0), {"itl": 0.02})
    assert not keeps(request(0.0, error="status 500"), {"ttft": 9.0}), "a fault keeps none"
    assert keeps(request(0.0, gaps=()), {"itl": 1e-9}), "one token has no time between tokens"


def test_figures_of_a_point() -> None:
    requests = [request(9.0), request(0.0), request(1.0, first_s=0.5), request(1.86, error="status 500")]
    found = figures([LoadPoint("poisson", 2.0, requests, 1, [0.001, 0.002, 0.3])], {"ttft": 0.2})
    assert found is not None and (found.name, found.asked, found.failed) == ("2/s poisson", 3, 1)
    assert found.requests_s == pytest.approx(2 / 2) and found.output_tok_s == pytest.approx(10 / 2)
    assert found.goodput_req_s == pytest.approx(1 / 2) and found.kept == pytest.approx(1 / 3)
    assert found.ttft_s == pytest.approx((0.3, 0.46, 0.496)) and found.late_s == 0.002
    plain = figures([LoadPoint("closed", 4.0, requests)], {})
    assert plain is not None and plain.goodput_req_s is None and plain.name == "4 at once"
    assert figures([LoadPoint("closed", 4.0, [])], {}) is None


def test_a_sample_without_its_times_is_refused() -> None:
    with pytest.raises(ValueError, match="an arrival has not a time"):
        Request(0.0, 0.0, 5, 1.0, 0.5, [0.1], [1])
