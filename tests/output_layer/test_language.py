"""The fit for language-model losses against a dense solution of its problem over the whole vocabulary."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from reducing import alone, by_ranks
from torch import Tensor

from tezo_ds.errors import ProbeError
from tezo_ds.output_layer import language
from tezo_ds.output_layer.choosing import FOLD
from tezo_ds.output_layer.fit import Fitted
from tezo_ds.output_layer.language import GRID, TokenStates, fit_tokens
from tezo_ds.output_layer.lbfgs import minimise
from tezo_ds.output_layer.newton import by_halves
from tezo_ds.output_layer.principal import principal

WORDS = torch.tensor([2, 3, 5, 7, 11, 12, 16])
VOCABULARY, WIDTH = 17, 9


def layer(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64) / 4


def made(n: int = 211) -> tuple[TokenStates, Tensor]:
    """Makes states of a large mean, dims of different size, and labels that follow from them in part; and
    their logits over the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-1, 1, WIDTH)
    hidden = (torch.randn(n, WIDTH, generator=generator) * sizes + 3).double()
    logits = hidden @ layer().t()
    wanted = (hidden @ layer(2).t())[:, WORDS] + 2 * torch.randn(n, len(WORDS), generator=generator)
    truth = wanted.argmax(dim=1)
    truth[:7] = torch.arange(7)  # each occurs, the last alone among those to choose by
    truth[truth == 6] = 3
    truth[4] = 6
    rest = logits.clone()
    rest[:, WORDS] = -torch.inf
    others = torch.stack([rest.logsumexp(dim=1), rest.amax(dim=1)], dim=1)
    held = torch.arange(n) % FOLD == FOLD - 1
    offset = torch.zeros(len(WORDS), dtype=torch.float64)
    return TokenStates(hidden, others, truth, held, layer()[WORDS], offset), logits


def dense(
    states: TokenStates, logits: Tensor, basis: Tensor, share: float, mean: Tensor, scale: float, free: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Solves the problem as it is written, over all logits, by torch's own L-BFGS in float64."""
    inner = (states.hidden - mean) @ basis.double().t()
    x = torch.zeros(len(WORDS), basis.shape[0] + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [x], max_iter=4000, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        y = x * free[:, None]
        z = logits.clone()
        z[:, WORDS] += inner @ y[:, :-1].t() + y[:, -1]
        ridge = share * (scale * y[:, :-1].square().sum() + y[:, -1].square().sum())
        found = F.cross_entropy(z, WORDS[states.truth]) + ridge + 1e-3 * (x - y).square().sum()
        found.backward()
        return found

    optimiser.step(loss)
    y = (x * free[:, None]).detach()
    return y[:, :-1], y[:, -1]


def about(states: TokenStates, found: Fitted) -> tuple[Tensor, float]:
    assert found.basis is not None
    mean = states.hidden.mean(dim=0)
    inner = (states.hidden - mean) @ found.basis.double().t()
    return mean, float(inner.square().sum() / len(inner))


@pytest.mark.parametrize("rank", [0, 3, 16])
def test_the_fit_is_that_of_the_whole_vocabulary(rank: int) -> None:
    states, logits = made()
    found = fit_tokens(states, rank, alone)
    assert found.basis is not None and found.basis.shape == (min(rank, WIDTH), WIDTH)
    mean, scale = about(states, found)
    assert found.strength is not None
    share = found.strength / (scale if rank else 1)
    weight, bias = dense(states, logits, found.basis, share, mean, scale, torch.ones(len(WORDS)))
    own = found.weight.double() @ found.basis.double()
    torch.testing.assert_close(own, weight @ found.basis.double(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.bias.double() + own @ mean, bias, rtol=1e-3, atol=1e-4)
    assert (float(own.abs().max()) > 0.01) == (rank > 0) and float(bias.abs().max()) > 0.1
    assert found.after.loss < found.before.loss - 0.1


def test_the_ridge_is_chosen_by_what_is_held_out() -> None:
    states, logits = made()
    found = fit_tokens(states, 3, alone)
    assert found.basis is not None and found.strength is not None
    mean, scale = about(states, found)
    held, kept = states.held, ~states.held
    rest = replace(states, hidden=states.hidden[kept], truth=states.truth[kept])
    free = torch.bincount(states.truth[kept], minlength=len(WORDS)) > 0
    inner = (states.hidden[held] - mean) @ found.basis.double().t()
    truth, tried = WORDS[states.truth[held]], {}
    for share in GRID:
        weight, bias = dense(rest, logits[kept], found.basis, share, mean, scale, free.double())
        z = logits[held].clone()
        z[:, WORDS] += inner @ weight.t() + bias
        right = float((z.argmax(dim=1) == truth).double().mean())
        tried[share] = float(F.cross_entropy(z, truth)), right
    best = min(tried, key=lambda share: tried[share][0])
    assert found.strength == pytest.approx(best * scale)
    assert (found.after.loss, found.after.accuracy) == pytest.approx(tried[best], rel=1e-3)
    before = F.cross_entropy(logits[held], truth), (logits[held].argmax(1) == truth).double().mean()
    assert (found.before.loss, found.before.accuracy) == pytest.approx(tuple(map(float, before)))


def test_states_that_are_all_alike_tell_how_often_a_word_is_right() -> None:
    states, _ = made()
    alike = replace(states, hidden=torch.full_like(states.hidden, 7.5))
    found = fit_tokens(alike, 3, alone)
    assert not found.weight.any() and found.bias.any()
    torch.testing.assert_close(found.bias, fit_tokens(alike, 0, alone).bias)


def test_a_word_of_no_example_to_fit_by_has_no_term_while_the_ridge_is_chosen() -> None:
    states, _ = made()
    truth = torch.where(states.held, states.truth, states.truth.clamp(max=5))
    problem = language._Problem(replace(states, truth=truth), 3, alone)
    x = problem.least(problem.zero(), 1e-3, False, 1e-6).view(len(WORDS), -1)
    assert not x[6].any() and bool(x[:6].any(dim=1).all())


def test_chunks_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    states, _ = made()
    whole = fit_tokens(states, 3, alone)
    monkeypatch.setattr(language, "CHUNK_NUMEL", 40)
    monkeypatch.setattr(language, "CHUNK", 23)
    chunks = fit_tokens(states, 3, alone)
    torch.testing.assert_close(chunks.weight, whole.weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("parts", [2, 3])
def test_ranks_find_the_same_bits_and_up_to_rounding_what_one_finds(parts: int) -> None:
    states, _ = made()
    one = fit_tokens(states, 3, alone)

    def of(index: int, count: int) -> TokenStates:
        n = len(states.truth)
        rows = slice(n * index // count, n * (index + 1) // count)
        own = (states.hidden[rows], states.others[rows], states.truth[rows], states.held[rows])
        return TokenStates(*own, states.rows, states.offset)

    several = by_ranks(parts, lambda i, reduce: fit_tokens(of(i, parts), 3, reduce))
    assert one.basis is not None
    for found in several:
        assert found.basis is not None
        for part in ("weight", "bias", "basis"):
            assert torch.equal(getattr(found, part), getattr(several[0], part))
        own, expected = found.weight @ found.basis, one.weight @ one.basis
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-5)
        assert found.strength == pytest.approx(one.strength)
        assert found.message_bytes == 8 * len(WORDS) * (3 + 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["hidden", "others"])
def test_what_is_not_finite_is_refused(which: str, value: float) -> None:
    states, _ = made()
    getattr(states, which)[5, 1] = value
    with pytest.raises(ProbeError, match=r"output_layer: a hidden state or logit .* not finite"):
        fit_tokens(states, 3, alone)


def test_a_vocabulary_of_which_every_word_is_a_label() -> None:
    states, _ = made()
    none = replace(states, others=torch.full_like(states.others, -torch.inf))
    found = fit_tokens(none, 3, alone)
    assert found.weight.isfinite().all() and found.after.loss < found.before.loss


def test_principal_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(100, 7, generator=generator).double() * torch.logspace(0, 2, 7)
    moments = states.t() @ states
    found = principal(lambda rows: rows @ moments, 7, 3)
    torch.testing.assert_close(found @ found.t(), torch.eye(3).double(), rtol=0, atol=1e-12)
    leading = torch.linalg.eigh(moments).eigenvectors[:, -3:]
    torch.testing.assert_close((found @ leading).square().sum(), torch.tensor(3.0).double())
    flat = states[:, :2] @ torch.randn(2, 7, generator=generator).double()
    moments = flat.t() @ flat
    assert principal(lambda rows: rows @ moments, 7, 5).shape == (2, 7)


def test_sums_by_halves_and_a_bowl() -> None:
    numbers = torch.rand(3, 101, dtype=torch.float64)
    torch.testing.assert_close(by_halves(numbers), numbers.sum(dim=1))
    assert by_halves(numbers[:, :0]).tolist() == [0, 0, 0]
    curves = torch.logspace(-2, 1, 30, dtype=torch.float64)
    goal = torch.linspace(-1, 1, 30, dtype=torch.float64)
    found = minimise(lambda x: curves * (x - goal), torch.zeros(30, dtype=torch.float64), 1e-9)
    torch.testing.assert_close(found, goal, rtol=0, atol=1e-6)
