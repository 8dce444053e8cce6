"""The choice of types: the best of all mixtures, within the bytes, and what cannot be chosen told."""

from __future__ import annotations

import itertools
import random

import pytest

from workbench.errors import UserError
from workbench.shape import NamedShape, Traits
from workbench.worker.ggml.choice import TYPES, Budget, allowed, choose, range_of, refusal, types_for
from workbench.worker.ggml.mixtures import tensor_bytes

TENSORS = (
    NamedShape("token_embd.weight", (64, 256)),
    NamedShape("blk.0.attn_q.weight", (256, 256)),
    NamedShape("blk.0.ffn_down.weight", (256, 512)),
    NamedShape("blk.1.ffn_down.weight", (256, 512)),
    NamedShape("blk.1.attn_norm.weight", (256,)),
)
FEW = ("Q8_0", "Q6_K", "Q4_K", "Q2_K")


def prices_of(seed: int) -> dict[str, dict[str, float]]:
    """Errors that halve with each bit, of tensors that matter more or less."""
    chance = random.Random(seed)
    bits = dict(zip(FEW, (8, 6, 4, 2), strict=True))
    return {
        tensor.name: {
            kind: 10 ** chance.uniform(-3, 0) * 4.0**-n * chance.uniform(0.8, 1.2) for kind, n in bits.items()
        }
        for tensor in TENSORS[:4]
    }


@pytest.mark.parametrize("seed", range(20))
def test_no_mixture_of_as_many_bytes_costs_less(seed: int) -> None:
    """Of all 256 mixtures: at the bytes of the one that is chosen none is better, and little of the budget is left."""
    may, prices = allowed(TENSORS, FEW, {}), prices_of(seed)
    smallest, largest = range_of(TENSORS, may)
    all_of_them = []
    for kinds in itertools.product(FEW, repeat=4):
        pairs = list(zip(TENSORS[:4], kinds, strict=True))
        size = sum(tensor_bytes(kind, tensor) for tensor, kind in pairs) + 4 * 256
        all_of_them.append((size, sum(prices[tensor.name][kind] for tensor, kind in pairs)))
    assert (min(all_of_them)[0], max(all_of_them)[0]) == (smallest, largest)
    for part in (0.0, 0.2, 0.5, 0.8, 1.0):
        budget = int(smallest + part * (largest - smallest))
        found = choose(TENSORS, may, prices, budget)
        assert found.size_bytes <= budget
        best = min(price for size, price in all_of_them if size <= budget)
        assert best <= found.divergence * 1.000001
        within = [price for size, price in all_of_them if size <= found.size_bytes * 0.9]
        assert all(found.divergence <= price * 1.000001 for price in within)
        assert found.types.keys() == may.keys()


def test_a_type_that_costs_more_and_is_larger_is_never_chosen() -> None:
    may = {"blk.0.attn_q.weight": ["Q4_K", "Q5_K", "Q6_K"]}
    prices = {"blk.0.attn_q.weight": {"Q4_K": 2.0, "Q5_K": 3.0, "Q6_K": 1.0}}
    budget = range_of(TENSORS[1:2], may)[1] - 1
    assert choose(TENSORS[1:2], may, prices, budget).types == {"blk.0.attn_q.weight": "Q4_K"}
    assert choose(TENSORS[1:2], may, prices, budget + 1).types == {"blk.0.attn_q.weight": "Q6_K"}


def test_what_has_no_price_gets_eight_bits() -> None:
    may = allowed(TENSORS, TYPES, {})
    prices = {name: found for name, found in prices_of(0).items() if "attn_q" not in name}
    assert choose(TENSORS, may, prices, range_of(TENSORS, may)[1]).types["blk.0.attn_q.weight"] == "Q8_0"
    with pytest.raises(UserError, match="is the least with these types"):
        choose(TENSORS, may, prices, range_of(TENSORS, may)[0])


def test_which_types_a_matrix_can_have() -> None:
    assert "Q4_K" in types_for(256, weighted=False) and "IQ2_XXS" not in types_for(256, weighted=False)
    assert "IQ2_XXS" in types_for(512, weighted=True)
    assert types_for(96, weighted=True) == ["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL"]
    assert types_for(100, weighted=True) == ["F16", "BF16"]


def test_rows_of_another_length_get_what_llama_cpp_takes_instead() -> None:
    odd = (NamedShape("blk.0.attn_q.weight", (64, 96)),)
    assert allowed(odd, ("Q4_K", "Q6_K"), {}) == {"blk.0.attn_q.weight": ["Q8_0", "Q5_0"]}


def test_kept_tensors_keep_their_type() -> None:
    may = allowed(TENSORS, FEW, {"*.ffn_down.weight": "Q6_K", "token_embd.weight": "BF16"})
    assert may["blk.0.ffn_down.weight"] == may["blk.1.ffn_down.weight"] == ["Q6_K"]
    assert (may["token_embd.weight"], may["blk.0.attn_q.weight"]) == (["BF16"], list(FEW))


WRONG = {
    "nothing": (
        {"blk.7.*": "Q4_K"},
        r"keep: no tensor is called 'blk.7.\*'; there are token_embd.weight, blk.0.attn_q",
    ),
    "contradicting": (
        {"*.ffn_down.weight": "Q4_K", "blk.0.*": "Q6_K"},
        r"keep: '\*.ffn_down.weight' Q4_K and 'blk.0.\*' Q6_K contradict each other: both name blk.0.ffn_down.weight",
    ),
    "blind": (
        {"token_embd.weight": "IQ2_XS"},
        "keep: token_embd.weight cannot be IQ2_XS: its rows are of 256, and no importance matrix speaks of it",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_kept_is_told(name: str) -> None:
    keep, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        allowed(TENSORS, FEW, keep)


def test_a_budget_in_bytes() -> None:
    traits = Traits(layers=2, heads=4, kv_heads=4)
    assert Budget(size="1MiB").weight_bytes(TENSORS, traits, 1000) == 2**20 - 1000
    assert Budget(bits=4.5).weight_bytes(TENSORS, traits, 1000) == int(4.5 * (64 + 256 + 512 + 512 + 1) * 256 / 8)
    q6, q4 = (64 * 256 * 210 / 256), (256 * 256 + 256 * 512) * 144 / 256 + 256 * 512 * 210 / 256
    assert Budget(like="Q4_K_M").weight_bytes(TENSORS, traits) == q6 + q4 + 1024


def test_a_size_that_no_mixture_has_is_refused_with_those_there_are() -> None:
    smallest, largest = 2**20, 2**21
    assert refusal(Budget(bits=5), smallest, smallest, largest) is None
    assert refusal(Budget(size="4MiB"), largest + 1, smallest, largest) == (
        "size: 4MiB leaves 2.0 MiB for weights, and 1.0 MiB to 2.0 MiB are possible with these types"
    )
    assert refusal(Budget(bits=1), smallest - 1, smallest, largest)
