"""Initial values that are drawn when they are needed: never in vain, and the same as if drawn at once."""

import copy
import io

import pytest
import torch
from torch import nn

from ldm.deferred import DeferredParameter, build_deferred


class Net(nn.Module):
    """A network with layers that are filled at random, with zeros, and by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 2)
        self.embedding = nn.Parameter(torch.empty(5, 8))
        nn.init.trunc_normal_(self.embedding, std=0.02)
        nn.init.zeros_(self.head.weight)
        for p in self.body[2].parameters():
            p.detach().zero_()
        self.shapes = {key: value.shape for key, value in self.state_dict().items()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)) + self.embedding[0])


class Reading(Net):
    """It reads its values while it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", self.embedding.detach().clone())


class Drawing(Net):
    """It draws other random values too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("noise", torch.randn(3))


class Counted:
    """Builds a model and counts how often."""

    def __init__(self, kind: type[nn.Module] = Net) -> None:
        self.kind, self.count = kind, 0

    def __call__(self) -> nn.Module:
        self.count += 1
        return self.kind()


def both(kind: type[nn.Module] = Net) -> tuple[nn.Module, nn.Module, Counted]:
    """The model as usual and deferred, from one seed."""
    build = Counted(kind)
    torch.manual_seed(3)
    usual = kind()
    torch.manual_seed(3)
    return usual, build_deferred(build), build


def waiting(model: nn.Module) -> int:
    return sum(isinstance(p, DeferredParameter) for p in model.parameters())


TOUCHES = {
    "state dict": lambda m: m.state_dict(),
    "forward": lambda m: m(torch.zeros(1, 3, 5, 5)),
    "one weight": lambda m: m.embedding.sum(),
    "half": lambda m: m.half().float(),
    "item": lambda m: m.body[0].weight[0, 0, 0, 0].item(),
    "print": lambda m: repr(m.embedding),
    "numpy": lambda m: m.embedding.data.numpy(),
    "copy": lambda m: copy.deepcopy(m),
    "pickle": lambda m: torch.save(m.embedding, io.BytesIO()),
    "copied from": lambda m: torch.empty(5, 8).copy_(m.embedding.detach()),
    "step": lambda m: (m(torch.ones(1, 3, 5, 5)).sum().backward(), torch.optim.SGD(m.parameters(), lr=0.0).step()),
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_the_values_are_those_of_a_model_built_as_usual(touch):
    usual, deferred, build = both()
    assert waiting(deferred) > 3 and build.count == 1
    TOUCHES[touch](deferred)
    assert waiting(deferred) == 0 and build.count == 2
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if touch == "half" else {"rtol": 0, "atol": 0}
    for key, value in deferred.state_dict().items():
        torch.testing.assert_close(value, usual.state_dict()[key], **tolerance)
    assert all(type(p) is nn.Parameter and p.requires_grad for p in deferred.parameters())


def test_the_published_way_draws_nothing():
    usual, deferred, build = both()
    optimizer = torch.optim.AdamW(deferred.cpu().to("cpu").requires_grad_(True).parameters())
    assert sum(p.numel() for p in deferred.parameters()) == sum(p.numel() for p in usual.parameters())
    assert waiting(deferred) > 3
    wanted = {key: value + 1 for key, value in usual.state_dict().items()}
    deferred.load_state_dict(wanted)
    assert build.count == 1 and waiting(deferred) == 0
    assert all(torch.equal(value, wanted[key]) for key, value in deferred.state_dict().items())
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in deferred.parameters()}


def test_what_is_not_loaded_keeps_its_initial_values():
    usual, deferred, build = both()
    deferred.load_state_dict({"head.bias": torch.tensor([7.0, 8.0])}, strict=False)
    assert torch.equal(deferred.head.bias, torch.tensor([7.0, 8.0]))
    assert torch.equal(deferred.embedding, usual.embedding) and build.count == 2
    assert torch.equal(deferred.head.bias, torch.tensor([7.0, 8.0]))


@pytest.mark.parametrize("kind", [Reading, Drawing])
def test_models_that_need_values_at_once_are_built_as_usual(kind):
    usual, deferred, _ = both(kind)
    assert waiting(deferred) == 0
    assert all(torch.equal(value, usual.state_dict()[key]) for key, value in deferred.state_dict().items())


def test_two_models_differ_and_a_seed_repeats_both():
    def pair():
        torch.manual_seed(5)
        return build_deferred(Net), build_deferred(Net), torch.rand(3)

    (a, b, noise), (c, d, again) = pair(), pair()
    assert not torch.equal(a.embedding, b.embedding)
    assert torch.equal(a.embedding, c.embedding) and torch.equal(b.embedding, d.embedding) and torch.equal(noise, again)
