"""Initial values that are drawn when they are read: never in vain, and the same however they are read."""

import copy
import io
import threading
from typing import Any

import pytest
import torch
from torch import nn

from ldm import initial_values
from ldm.initial_values import DeferredParameter, deferred_initial_values


class Net(nn.Module):
    """Layers that are filled at random, by zeros after that, and by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 1))
        self.zeroed = nn.Linear(8, 8)
        nn.init.zeros_(self.zeroed.weight)
        self.embedding = nn.Parameter(torch.empty(5, 8))
        nn.init.normal_(self.embedding, std=3.0)
        self.truncated = nn.Parameter(torch.empty(6, 8))
        nn.init.trunc_normal_(self.truncated, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.zeroed(self.body(x).mean((2, 3)) + self.embedding[0])


def deferred(seed: int = 3) -> Net:
    torch.manual_seed(seed)
    with deferred_initial_values():
        return Net()


def waiting(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if isinstance(p, DeferredParameter)}


@pytest.fixture(autouse=True)
def small_parameters_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial_values, "SMALLEST", 24)


READS = {
    "state dict": lambda m: m.state_dict(),
    "forward": lambda m: m(torch.zeros(1, 3, 5, 5)),
    "compiled": lambda m: torch.compile(m, backend="eager")(torch.zeros(1, 3, 5, 5)),
    "inference": torch.inference_mode()(lambda m: m(torch.zeros(1, 3, 5, 5))),
    "double": lambda m: m.double().float(),
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
    "one by one, backwards": lambda m: [p.flatten()[0].item() for p in reversed(list(m.parameters()))],
    "numpy": lambda m: [p.data.numpy() for p in m.parameters()],
    "print": lambda m: repr(list(m.parameters())),
    "copied": lambda m: copy.deepcopy(m),
    "pickled": lambda m: torch.save(m, io.BytesIO()),
    "copied from": lambda m: [torch.empty(p.shape).copy_(p) for p in m.parameters()],
    "step": lambda m: (m(torch.ones(1, 3, 5, 5)).sum().backward(), torch.optim.SGD(m.parameters(), lr=0.0).step()),
}


@pytest.mark.parametrize("read", READS)
def test_however_they_are_read_the_values_are_the_same(read: str):
    want = {key: value.clone() for key, value in deferred().state_dict().items()}
    model = deferred()
    assert waiting(model) == {"body.0.weight", "body.2.weight", "embedding"}
    READS[read](model)
    if read in ("forward", "compiled", "inference", "step"):  # this one reads them all
        assert not waiting(model) and all(type(p) is nn.Parameter for p in model.parameters())
    assert all(torch.equal(value, want[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters()) and not want["zeroed.weight"].any()


def test_values_are_distributed_as_torch_does_it():
    with deferred_initial_values():
        linear, table = nn.Linear(400, 500), nn.Embedding(300, 400)
    assert waiting(linear) == {"weight", "bias"}
    assert float(linear.weight.detach().abs().max()) == pytest.approx(1 / 20, rel=1e-3)  # 1 / sqrt(inputs)
    assert float(linear.weight.std()) == pytest.approx(1 / 20 / 3**0.5, rel=0.01)
    assert float(table.weight.std()) == pytest.approx(1, rel=0.01) and abs(float(table.weight.mean())) < 0.02


def test_the_published_way_draws_nothing(monkeypatch: pytest.MonkeyPatch):
    wanted = {key: value + 1 for key, value in deferred().state_dict().items()}
    model = deferred()
    optimizer = torch.optim.AdamW(model.cpu().to("cpu").to(torch.float32).requires_grad_(True).parameters())
    assert sum(p.numel() for p in model.parameters()) == sum(value.numel() for value in wanted.values())
    assert waiting(model) == {"body.0.weight", "body.2.weight", "embedding"}
    for p in model.parameters():
        p.fill = pytest.fail  # type: ignore[attr-defined]
    model.load_state_dict(wanted)
    assert not waiting(model) and all(torch.equal(v, wanted[k]) for k, v in model.state_dict().items())
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_what_is_not_overwritten_gets_its_initial_value():
    want, model = deferred().embedding.detach().clone(), deferred()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"embedding": torch.zeros(1, 1)}, strict=False)
    with pytest.raises(RuntimeError), torch.no_grad():
        model.embedding.copy_(torch.zeros(7, 7))
    model.load_state_dict({"body.2.weight": torch.ones(8, 8, 1, 1)}, strict=False)
    assert waiting(model) == {"body.0.weight", "embedding"} and model.body[2].weight.min() == 1
    assert torch.equal(model.embedding, want)


def test_a_seed_repeats_and_two_models_differ():
    def pair() -> tuple[Any, Any]:
        torch.manual_seed(5)
        with deferred_initial_values():
            return Net(), Net()

    (a, b), (c, d) = pair(), pair()
    assert torch.equal(b.embedding, d.embedding) and torch.equal(a.embedding, c.embedding)
    assert not torch.equal(a.embedding, b.embedding)


def test_threads_that_read_at_once_see_whole_values():
    want, model, seen = deferred().embedding.detach().clone(), deferred(), []
    threads = [threading.Thread(target=lambda: seen.append(model.embedding.detach().clone())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8 and all(torch.equal(value, want) for value in seen)


def test_small_parameters_and_those_elsewhere_are_as_without_it(monkeypatch: pytest.MonkeyPatch):
    with deferred_initial_values(), torch.device("meta"):
        assert not waiting(nn.Linear(8, 8))
    monkeypatch.setattr(initial_values, "SMALLEST", 10**6)
    torch.manual_seed(0)
    want, noise = nn.Linear(8, 8).weight, torch.randn(3)
    torch.manual_seed(0)
    with deferred_initial_values():
        got = nn.Linear(8, 8)
    assert not waiting(got) and torch.equal(got.weight, want) and torch.equal(torch.randn(3), noise)
