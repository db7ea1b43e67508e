"""Parts of models that are made anew here because they are faster: they compute what torch's own do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from training.models.cross_entropy import token_losses, twin_losses
from training.models.dropout import Dropout


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_and_gradients_are_those_of_torch(smoothing):
    torch.manual_seed(0)
    labels, weights = torch.randint(0, 50, (30,)), torch.rand(30)
    ours, theirs = (torch.randn(30, 50, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    our_losses = token_losses(ours, labels, smoothing)
    their_losses = F.cross_entropy(theirs, labels, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(our_losses, their_losses)
    (our_losses * weights).sum().backward()
    (their_losses * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_losses_and_gradients_of_r_drop_are_those_of_torch():
    torch.manual_seed(0)
    labels, weights = torch.randint(0, 50, (30,)), torch.rand(30)
    ours, theirs = (torch.randn(60, 50, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    our_losses = twin_losses(ours, labels, 0.1, 5.0)
    first, second = theirs.log_softmax(-1).chunk(2)
    there, back = (
        F.kl_div(second, first, log_target=True, reduction="none").sum(-1),
        F.kl_div(first, second, log_target=True, reduction="none").sum(-1),
    )
    losses = [F.cross_entropy(each, labels, label_smoothing=0.1, reduction="none") for each in theirs.chunk(2)]
    their_losses = (losses[0] + losses[1]) / 2 + 5.0 * (there + back) / 4
    torch.testing.assert_close(our_losses, their_losses)
    (our_losses * weights).sum().backward()
    (their_losses * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_logits_stay_as_they_were_and_a_second_backward_pass_is_an_error():
    logits = torch.randn(4, 7, requires_grad=True)
    before = logits.detach().clone()
    loss = token_losses(logits, torch.tensor([0, 1, 2, 6]), 0.1).sum()
    loss.backward(retain_graph=True)
    assert torch.equal(logits, before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_the_share_it_says_and_keeps_the_expectation(p):
    torch.manual_seed(0)
    x = torch.ones(1000, 1001, requires_grad=True)
    y = Dropout(p)(x)
    y.sum().backward()
    assert float((y == 0).double().mean()) == pytest.approx(p, abs=0.002)
    assert float(y.detach().double().mean()) == pytest.approx(1, abs=0.01)
    assert torch.equal(x.grad, y), "what is dropped learns nothing"


def test_dropout_drops_values_independently_of_their_neighbours():
    torch.manual_seed(0)
    dropped = (Dropout(0.5)(torch.ones(1_000_000)) == 0).double()
    for distance in (1, 2, 3, 4, 8):  # four values come of one random number
        both = float((dropped[distance:] * dropped[:-distance]).mean())
        assert both == pytest.approx(0.25, abs=0.003)
    assert all(float(dropped[lane::4].mean()) == pytest.approx(0.5, abs=0.003) for lane in range(4))


def test_dropout_depends_on_the_seed_alone_and_does_nothing_outside_of_training():
    x = torch.randn(33, 7)

    def dropped(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return Dropout(0.3)(x)

    assert torch.equal(dropped(1), dropped(1)) and not torch.equal(dropped(1), dropped(2))
    assert Dropout(0.3).eval()(x) is x and Dropout(0.0)(x) is x
