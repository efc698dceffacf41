"""What a configuration may name: classes of the kind that a place needs, and nothing else is called."""

import os

import pytest
import torch
from torch import nn

from ldm.lr_scheduler import with_schedule
from ldm.util import ConfigError, instantiate_from_config

MARKED: list[str] = []


class Own(nn.Linear):
    """A user's network."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)


class Faulty(nn.Module):
    """A user's network with a mistake in it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.half = width / "2"  # type: ignore[operator]


class OwnSchedule:
    """A user's schedule."""

    def schedule(self, n: int) -> float:
        return 1.0


class NoNetwork:
    """A class that acts when it is made."""

    def __init__(self) -> None:
        MARKED.append("made")


def act(**_: object) -> nn.Module:
    """A function that acts; also one that returns a network is none."""
    MARKED.append("called")
    return nn.Identity()


ATTACKS = {
    "os.system": {"command": "touch mark"},
    "subprocess.Popen": {"args": ["touch", "mark"]},
    "shutil.rmtree": {"path": "folder"},
    "torch.load": {"f": "weights.pt", "weights_only": False},
    "builtins.eval": {"expression": "open('mark', 'w')"},
    "builtins.__import__": {"name": "os"},
    "torch.hub.load": {"repo_or_dir": "a/b", "model": "c"},
    "ldm.util.instantiate_from_config": {"config": {"target": "os.system"}},
    "pathlib.Path": {},
    "torch.nn.init": {},
    f"{__name__}.act": {},
    f"{__name__}.NoNetwork": {},
}


@pytest.mark.parametrize("target", ATTACKS)
@pytest.mark.parametrize(
    "place", ["top", "unet_config", "first_stage_config", "cond_stage_config", "lossconfig", "scheduler"]
)
def test_nothing_but_the_kind_that_a_place_needs_is_called(target, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    attack = {"target": target, "params": ATTACKS[target]}
    with pytest.raises(ConfigError, match="it was not called") as raised:
        if place == "top":
            instantiate_from_config(attack)
        elif place == "scheduler":
            with_schedule(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0), attack)
        elif place == "lossconfig":
            dd = {"z_channels": 4, "ch": 32, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "resolution": 8,
                  "in_channels": 3, "out_ch": 3}  # fmt: skip
            params = {"ddconfig": dd, "lossconfig": attack}
            instantiate_from_config({"target": "ldm.models.autoencoder.AutoencoderKL", "params": params})
        else:
            unet = {"target": "torch.nn.Identity"}
            params = {"first_stage_config": unet, "cond_stage_config": unet, "unet_config": unet, place: attack}
            instantiate_from_config({"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params})
    assert repr(target) in str(raised.value)
    assert os.listdir(tmp_path) == ["folder"] and not MARKED


def test_what_people_write_themselves_works():
    assert instantiate_from_config({"target": f"{__name__}.Own", "params": {"width": 3}}).in_features == 3
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    for target, params in (
        (f"{__name__}.OwnSchedule", {}),
        ("ldm.lr_scheduler.LambdaLinearScheduler",
         {"warm_up_steps": [1], "f_min": [1.0], "f_max": [1.0], "f_start": [1.0], "cycle_lengths": [9]}),
    ):  # fmt: skip
        with_schedule(optimizer, {"target": target, "params": params})
    assert instantiate_from_config({"target": f"{__name__}.OwnSchedule"}, OwnSchedule)


@pytest.mark.parametrize("target", [5, None, ["os.system"], {"a": 1}, "", "system", "no.such.module.Thing"])
def test_targets_that_are_no_names(target):
    with pytest.raises(ConfigError):
        instantiate_from_config({"target": target})


def test_a_module_that_python_does_not_find():
    with pytest.raises(
        ConfigError, match="there is no module 'mine'; for one of your own, name its folder in PYTHONPATH"
    ):
        instantiate_from_config({"target": "mine.Network"})
    with pytest.raises(ConfigError, match="there is no module 'ldm.mine'$"):
        instantiate_from_config({"target": "ldm.mine.Network"})


@pytest.mark.parametrize(
    "place, value, message",
    [
        ("model_channels", "abc", "UNetModel: model_channels must be int, found 'abc'"),
        ("model_channels", 3.5, "UNetModel: model_channels must be int, found 3.5"),
        ("channel_mult", [1, "x"], r"UNetModel: channel_mult must be Sequence\[int\], found \[1, 'x'\]"),
        ("num_res_blocks", None, r"UNetModel: num_res_blocks must be int \| Sequence\[int\], found None"),
        ("ch", "abc", "ddconfig: ch must be int, found 'abc'"),
        ("timesteps", "abc", "LatentDiffusion: timesteps must be int, found 'abc'"),
        ("in_channels", -4, "UNetModel cannot be made with in_channels=-4: .*negative dimension"),
        ("model_channels", True, "UNetModel: model_channels must be int, found True"),
        ("ch_mult", [-1], r"ddconfig cannot be made with ch_mult=\[-1\]"),
    ],
)
def test_a_number_that_is_something_else_is_named(place, value, message):
    dd = {"z_channels": 4, "ch": 32, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "resolution": 8,
          "in_channels": 3, "out_ch": 3}  # fmt: skip
    unet = {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {"model_channels": 32, "num_heads": 1},
    }
    first = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"ddconfig": dd}}
    params = {"first_stage_config": first, "cond_stage_config": "__is_unconditional__", "unet_config": unet}
    {"ch": dd, "ch_mult": dd, "timesteps": params}.get(place, unet["params"])[place] = value
    with pytest.raises(ConfigError, match=message):
        instantiate_from_config({"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params})


def test_an_error_in_what_people_write_themselves_stays_what_it_is():
    with pytest.raises(TypeError, match="unsupported operand"):
        instantiate_from_config({"target": f"{__name__}.Faulty", "params": {"width": 3}})


@pytest.mark.parametrize("params", [[1], "x", {1: 2}, {None: 2}])
def test_parameters_that_have_no_names(params):
    with pytest.raises(ConfigError, match="a mapping from names"):
        instantiate_from_config({"target": f"{__name__}.Own", "params": params})
