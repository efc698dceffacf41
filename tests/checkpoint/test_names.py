"""Names here and in diffusers, against the key lists of the published networks on both sides."""

from contextlib import nullcontext

import pytest
import torch

from cldm.checkpoint.diffusers_config import component_config
from cldm.checkpoint.names import COMPONENTS, from_diffusers, to_diffusers
from ldm.files import CheckpointError, LazyTensor
from tests.parity import load_json

THEIRS = load_json("core/manifest_diffusers.json")
CASES = [(f"manifest_{v}", part, f"{part}_{v}") for v in ("v15", "v21") for part in ("unet", "controlnet")]
CASES += [("manifest_v15", "vae", "vae"), ("manifest_v21", "vae", "vae")]


def unread(shape: tuple[int, ...]) -> LazyTensor:
    """An entry with a shape, that names alone must suffice to convert."""

    def read() -> torch.Tensor:
        raise AssertionError("renaming must not read tensors")

    return LazyTensor(tuple(shape), torch.float32, read)


def ours(manifest: str, prefix: str) -> dict[str, LazyTensor]:
    entries = load_json(f"core/{manifest}.json")
    return {k.removeprefix(prefix): unread(shape) for k, (shape, _) in entries.items() if k.startswith(prefix)}


def shapes(entries: dict[str, LazyTensor]) -> dict[str, tuple[int, ...]]:
    return {key: entry.shape for key, entry in entries.items()}


@pytest.mark.parametrize(("manifest", "part", "theirs"), CASES)
def test_published_networks_convert_both_ways(manifest: str, part: str, theirs: str) -> None:
    entries = ours(manifest, COMPONENTS[part])
    converted, unknown = to_diffusers(part, entries)
    assert not unknown
    assert shapes(converted) == {key: tuple(shape) for key, shape in THEIRS[theirs].items()}
    back, unknown = from_diffusers(part, converted)
    assert not unknown and shapes(back) == shapes(entries)


def test_names_that_carry_the_meaning() -> None:
    entries, _ = to_diffusers("unet", ours("manifest_v15", "model.diffusion_model."))
    back = {there: here for here, there in zip(ours("manifest_v15", "model.diffusion_model."), entries, strict=True)}
    assert back["down_blocks.1.downsamplers.0.conv.bias"] == "input_blocks.6.0.op.bias"
    assert back["up_blocks.0.upsamplers.0.conv.bias"] == "output_blocks.2.1.conv.bias"
    assert back["up_blocks.1.upsamplers.0.conv.bias"] == "output_blocks.5.2.conv.bias"
    assert back["up_blocks.3.attentions.2.proj_out.weight"] == "output_blocks.11.1.proj_out.weight"
    assert back["mid_block.resnets.1.conv2.weight"] == "middle_block.2.out_layers.3.weight"
    assert back["down_blocks.2.resnets.0.time_emb_proj.weight"] == "input_blocks.7.0.emb_layers.1.weight"


def test_open_clip_splits_and_joins_its_projections() -> None:
    generator = torch.Generator().manual_seed(0)
    width = 6
    tensors = {
        "model.transformer.resblocks.0.attn.in_proj_weight": torch.randn(3 * width, width, generator=generator),
        "model.transformer.resblocks.0.attn.in_proj_bias": torch.randn(3 * width, generator=generator),
        "model.transformer.resblocks.0.mlp.c_fc.weight": torch.randn(4 * width, width, generator=generator),
        "model.text_projection": torch.randn(width, 5, generator=generator),
        "model.positional_embedding": torch.randn(7, width, generator=generator),
    }
    entries = {key: LazyTensor.of(tensor) for key, tensor in tensors.items()}
    converted, unknown = to_diffusers("text_encoder", {**entries, "model.attn_mask": unread((7, 7))})
    assert unknown == ["model.attn_mask"]
    joint = tensors["model.transformer.resblocks.0.attn.in_proj_weight"]
    for i, name in enumerate("qkv"):
        entry = converted[f"text_model.encoder.layers.0.self_attn.{name}_proj.weight"]
        assert entry.shape == (width, width)
        assert torch.equal(entry.read(), joint[i * width : (i + 1) * width])
    assert converted["text_projection.weight"].shape == (5, width)
    back, unknown = from_diffusers("text_encoder", converted, open_clip=True)
    assert not unknown and back.keys() == tensors.keys()
    assert all(torch.equal(back[key].read(), tensor) for key, tensor in tensors.items())


def test_published_text_encoders_round_trip_by_name() -> None:
    for manifest, open_clip in (("manifest_v15", False), ("manifest_v21", True)):
        entries = ours(manifest, "cond_stage_model.")
        converted, unknown = to_diffusers("text_encoder", entries)
        assert not unknown and all(
            key.startswith(("text_model.", "text_projection.", "logit_scale")) for key in converted
        )
        back, unknown = from_diffusers("text_encoder", converted, open_clip)
        assert not unknown and shapes(back) == shapes(entries)


def test_vae_of_old_diffusers() -> None:
    """Published SD 1.x pipelines name the VAE's attention as diffusers did before 0.16."""
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, shape in THEIRS["vae"].items():
        for new, name in renames.items():
            key = key.replace(f".attentions.0.{new}.", f".attentions.0.{name}.")
        old[key] = unread(shape)
    converted, unknown = from_diffusers("vae", old)
    assert not unknown and shapes(converted) == shapes(ours("manifest_v15", "first_stage_model."))


def test_what_has_no_counterpart_is_refused() -> None:
    entries = ours("manifest_v15", "model.diffusion_model.")
    with pytest.raises(CheckpointError, match="label_emb"):
        to_diffusers("unet", {**entries, "label_emb.0.weight": unread((4, 4))})
    with pytest.raises(CheckpointError, match="motion_modules"):
        from_diffusers(
            "unet", {**to_diffusers("unet", entries)[0], "down_blocks.0.motion_modules.0.weight": unread((4,))}
        )
    with pytest.raises(CheckpointError, match="incomplete"):
        to_diffusers("unet", {key: entry for key, entry in entries.items() if not key.startswith("input_blocks.4.0.")})


ODD = [
    ("unet", {"up_blocks.9.upsamplers.0.conv.weight": (2, 2, 3, 3)}),
    ("unet", {"down_blocks.9.resnets.0.conv1.weight": (2,)}),
    ("unet", {f"down_blocks.{'9' * 5000}.resnets.0.conv1.weight": (2,), "down_blocks.9.resnets.0.conv1.weight": (2,)}),
    ("unet", {f"down_blocks.{i}.resnets.0.conv1.weight": () for i in range(9000)}),  # not in quadratic time
    ("vae", {"encoder.down_blocks.3.resnets.0.conv1.weight": ()}),
    ("vae", {"encoder.down_blocks.0.resnets.0.conv1.weight": (), "a." * 2_000_000: ()}),
    (
        "vae",
        {"encoder.down_blocks.0.resnets.0.conv1.weight": (), "decoder.mid_block.attentions.0.to_q.weight": (1,) * 5},
    ),
    ("text_encoder", {f"text_model.encoder.layers.0.self_attn.{name}_proj.weight": () for name in "qkv"}),
    ("text_encoder", {f"encoder.layers.0.self_attn.{name}_proj.weight": (2 + (name == "v"), 2) for name in "qkv"}),
    ("text_encoder", {"text_projection.weight": (2,)}),
]


@pytest.mark.parametrize(("part", "given"), ODD, ids=range(len(ODD)))
def test_odd_names_and_shapes_are_refused_or_left(part: str, given: dict[str, tuple[int, ...]]) -> None:
    """A file may hold anything: it converts or is refused, and soon."""
    entries = {key: unread(shape) for key, shape in given.items()}
    refused = part == "text_encoder" or any("_blocks.9." in key for key in given) and len(given) < 3
    with pytest.raises(CheckpointError) if refused else nullcontext():
        from_diffusers(part, entries, open_clip=True)


@pytest.mark.parametrize(
    ("component", "one", "other"),
    [
        ("vae", "decoder.mid_block.attentions.0.to_q.weight", "decoder.mid_block.attentions.0.query.weight"),
        (
            "vae",
            "encoder.down_blocks.0.resnets.0.conv_shortcut.bias",
            "encoder.down_blocks.0.resnets.0.nin_shortcut.bias",
        ),
        ("text_encoder", "text_model.final_layer_norm.bias", "final_layer_norm.bias"),
    ],
)
def test_of_two_entries_for_one_place_none_is_lost(component: str, one: str, other: str) -> None:
    entries = {"encoder.down_blocks.0.resnets.0.conv1.weight": unread((2,)), one: unread((2, 2))}
    converted, unknown = from_diffusers(component, entries)
    assert len(converted) + len(unknown) == 2
    with pytest.raises(CheckpointError, match=f"'{other}' is there a second time"):
        from_diffusers(component, {**entries, other: unread((2, 2))})


def test_layers_with_numbers_written_in_two_ways_are_two_layers() -> None:
    names = [f"text_model.encoder.layers.{i}.self_attn.{name}_proj.bias" for i in ("1", "01") for name in "qkv"]
    converted, unknown = from_diffusers("text_encoder", {name: unread((2,)) for name in names}, open_clip=True)
    assert not unknown and len(converted) == 2


@pytest.mark.parametrize("shape", [(), (4,), (4, 4, 4), (4, 4, 4, 4, 4)])
@pytest.mark.parametrize(
    "key", ["input_blocks.0.0.weight", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", "out.2.weight"]
)
def test_configurations_need_shapes_of_a_unet(key: str, shape: tuple[int, ...]) -> None:
    entries = {**ours("manifest_v15", "model.diffusion_model."), key: unread(shape)}
    params = {"unet_config": {"params": {"num_heads": 8}}, "image_size": 64}
    with pytest.raises(CheckpointError, match="which no model of this kind has"):
        component_config("unet", to_diffusers("unet", entries)[0], params)
