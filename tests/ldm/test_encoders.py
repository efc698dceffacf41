"""Text encoders: values and keys of the published networks, tokens, loading, options."""

import copy
import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from ldm.modules.encoders.modules import (
    ClassEmbedder,
    FrozenCLIPEmbedder,
    FrozenOpenCLIPEmbedder,
    IdentityEncoder,
    PromptOptions,
    set_default_options,
)
from ldm.modules.encoders.prompt_weights import parse_weights
from ldm.util import ConfigError
from tests.parity import fill_, load_cases, load_json, relative_error

TEXTS = [
    "burly wood circle with orange background",
    "",
    "A Photo of a CAT!!, 8k   détaillé 猫 🐱 (best quality:1.2), " + "very " * 80,
]
IDS = "transformer.text_model.embeddings.position_ids"
BEGIN, END = 49406, 49407


def small_clip(**options: Any) -> FrozenCLIPEmbedder:
    return FrozenCLIPEmbedder(**{"width": 64, "layers": 3, "heads": 4, **options})


def small_open_clip(**options: Any) -> FrozenOpenCLIPEmbedder:
    return FrozenOpenCLIPEmbedder(**{"width": 64, "layers": 3, "heads": 4, **options})


def filled(cls: type[nn.Module], **options: Any) -> Any:
    """An encoder made without memory and then filled by the parity rule, as it is inside the whole model."""
    with torch.device("meta"):
        model = cls(**options)
    model.to_empty(device="cpu")
    return fill_(model, prefix="cond_stage_model.")


def check_published(encoder: Any, version: str) -> None:
    """Keys, shapes, types, tokens and values of a full-size configuration."""
    manifest = load_json(f"core/manifest_{version}.json")
    prefix = "cond_stage_model."
    expected = {k.removeprefix(prefix): (tuple(s), t) for k, (s, t) in manifest.items() if k.startswith(prefix)}
    found = {k: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in encoder.state_dict().items()}
    assert found == expected
    cases = load_cases(f"core/full_{version}.npz")
    assert encoder.tokenize(TEXTS).tolist() == cases["tokens"].tolist()
    with torch.no_grad():
        assert relative_error(encoder.encode(TEXTS)[:, ::4, ::8], cases["text"]) < 1e-4


def test_sd1_is_the_published_network():
    check_published(filled(FrozenCLIPEmbedder), "v15")


@pytest.mark.full
def test_sd2_is_the_published_network():
    check_published(filled(FrozenOpenCLIPEmbedder, layer="penultimate"), "v21")


def test_sd2_has_the_published_entries():
    with torch.device("meta"):
        encoder = FrozenOpenCLIPEmbedder(layer="penultimate")
    manifest = load_json("core/manifest_v21.json")
    expected = {k: tuple(s) for k, (s, _) in manifest.items() if k.startswith("cond_stage_model.")}
    assert {f"cond_stage_model.{k}": tuple(v.shape) for k, v in encoder.state_dict().items()} == expected
    assert encoder.tokenize(TEXTS).tolist() == load_cases("core/full_v21.npz")["tokens"].tolist()


def test_sd1_equals_transformers():
    transformers = pytest.importorskip("transformers")
    encoder = fill_(small_clip())
    config = transformers.CLIPTextConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="quick_gelu",
        eos_token_id=END,
    )
    theirs = transformers.CLIPTextModel(config).eval()
    # Their layout has the prefix `text_model.` or, in later versions, none.
    prefix = "text_model." if "text_model.final_layer_norm.weight" in theirs.state_dict() else ""
    weights = {k.removeprefix("text_model."): v for k, v in encoder.transformer.named_parameters()}
    missing, unexpected = theirs.load_state_dict({prefix + k: v for k, v in weights.items()}, strict=False)
    assert not unexpected and all("position_ids" in k for k in missing)
    tokens = encoder.tokenize(TEXTS)
    with torch.no_grad():
        want = theirs(input_ids=tokens, output_hidden_states=True)
        states = encoder.transformer.hidden_states(tokens)
        for got, state in zip(states[:-1], want.hidden_states[:-1], strict=True):
            assert relative_error(got, state) < 1e-5
        assert relative_error(encoder(TEXTS), want.last_hidden_state) < 1e-5
        pooled = copy.copy(encoder)
        pooled.layer = "pooled"
        assert relative_error(pooled(TEXTS), want.pooler_output[:, None]) < 1e-5


def test_sd2_equals_open_clip():
    import open_clip

    encoder = fill_(small_open_clip())
    text_cfg = {"width": 64, "layers": 3, "heads": 4, "context_length": 77, "vocab_size": 49408}
    theirs = open_clip.CLIP(64, {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}, text_cfg).eval()
    missing, unexpected = theirs.load_state_dict(encoder.model.state_dict(), strict=False)
    assert not unexpected and all(k.startswith("visual.") for k in missing)
    with torch.no_grad():
        tokens = encoder.tokenize(TEXTS)
        ends = encoder(TEXTS)[torch.arange(3), tokens.argmax(dim=1)] @ encoder.model.text_projection
        assert relative_error(ends, theirs.encode_text(tokens)) < 1e-5


def test_tokens_of_sd1():
    cases = load_json("core/tokens_v15.json")
    encoder = small_clip()
    tokens = encoder.tokenize(cases["prompts"])
    assert tokens.dtype == torch.long and tokens.tolist() == cases["ids"]
    for text, ids, raw in zip(cases["prompts"], cases["ids"], cases["raw"], strict=True):
        assert ids[1 : 1 + min(len(raw), 75)] == raw[:75]
        assert encoder.tokenize(text).tolist() == [ids]  # a single prompt is a batch of one


def test_padding_and_truncation():
    one, two = small_clip(), small_open_clip()
    assert one.tokenize("a cat")[0, :6].tolist() == [BEGIN, 320, 2368, END, END, END]
    assert two.tokenize("a cat")[0, :6].tolist() == [BEGIN, 320, 2368, END, 0, 0]
    for encoder in (one, two):
        row = encoder.tokenize("cat " * 200)[0].tolist()
        assert row == [BEGIN, *[2368] * 75, END]
    short = small_clip(max_length=8)
    assert short.tokenize("cat " * 200).tolist() == [[BEGIN, *[2368] * 6, END]]
    assert short("cat").shape == (1, 8, 64) and short.state_dict().keys() == one.state_dict().keys()
    assert one([]).shape == (0, 77, 64)


@pytest.mark.parametrize(
    "file_ids", [None, torch.arange(77)[None], torch.arange(77.0)[None]], ids=["none", "int", "float"]
)
def test_position_ids_are_optional(file_ids: torch.Tensor | None):
    weights = fill_(small_clip()).state_dict()
    del weights[IDS]
    if file_ids is not None:
        weights[IDS] = file_ids
    keys = set(weights)
    holder = nn.ModuleDict({"cond_stage_model": small_clip()}).to_empty(device="cpu")
    holder.load_state_dict({f"cond_stage_model.{k}": v for k, v in weights.items()}, strict=True)
    encoder = holder["cond_stage_model"]
    assert torch.equal(encoder.state_dict()[IDS], torch.arange(77)[None])
    assert set(weights) == keys
    with pytest.raises(RuntimeError, match="token_embedding"):  # only that entry is optional
        encoder.load_state_dict({k: v for k, v in weights.items() if "token_embedding" not in k}, strict=True)


@pytest.mark.parametrize("make", [small_clip, small_open_clip])
def test_made_without_memory(make: Any):
    source = fill_(make())
    with torch.device("meta"):
        assigned, emptied = make(), make()
    assert all(p.is_meta for p in assigned.parameters())
    assigned.load_state_dict(source.state_dict(), strict=True, assign=True)
    emptied.to_empty(device="cpu").load_state_dict(source.state_dict(), strict=True)
    for filled_encoder in (assigned, emptied):
        assert not any(t.is_meta for t in (*filled_encoder.parameters(), *filled_encoder.buffers()))
        assert torch.equal(filled_encoder(TEXTS), source(TEXTS))


def test_later_tokens_do_not_reach_earlier_ones():
    for encoder in (fill_(small_clip()), fill_(small_open_clip())):
        a, b = encoder(["a cat on a mat", "a cat under trees"])
        assert torch.allclose(a[:3], b[:3], atol=1e-6) and not torch.allclose(a[3], b[3], atol=1e-3)


def test_layers():
    encoder = fill_(small_clip())
    states = encoder.transformer.hidden_states(encoder.tokenize(TEXTS))
    for index in (0, 2, -1, -4):
        hidden = fill_(small_clip(layer="hidden", layer_idx=index))
        assert torch.equal(hidden(TEXTS), states[index])
    pooled = fill_(small_clip(layer="pooled"))(TEXTS)
    last = encoder(TEXTS)
    assert torch.equal(pooled, torch.stack([last[0, 8], last[1, 1], last[2, 76]])[:, None])

    last, penultimate = (fill_(small_open_clip(layer=name)) for name in ("last", "penultimate"))
    assert not torch.allclose(last(TEXTS), penultimate(TEXTS), atol=1e-2)
    last.model.transformer.resblocks[-1] = nn.Identity()  # then the last layer is the one before it
    assert torch.equal(last(TEXTS), penultimate(TEXTS))


WORDS = [f"{number}" for number in range(10)] * 30  # one token each


@pytest.mark.parametrize("make", [small_clip, small_open_clip])
def test_long_prompts_are_windows_encoded_apart(make: Any):
    encoder = fill_(make())
    texts = ["", " ".join(WORDS[:100]), " ".join(WORDS[:225])]
    with encoder.using(windows=3):
        long = encoder(texts)
    assert long.shape == (3, 231, 64)
    assert torch.allclose(long[0], encoder([""] * 3).flatten(0, 1), atol=1e-5)
    for row, count in ((1, 100), (2, 225)):
        parts = [" ".join(WORDS[:count][start : start + 75]) for start in (0, 75, 150)]
        assert torch.allclose(long[row], encoder(parts).flatten(0, 1), atol=1e-5)
    with encoder.using(windows=None):  # as many as the longest needs
        assert torch.allclose(encoder(texts), long, atol=1e-5) and encoder(texts[:2]).shape == (2, 154, 64)
        assert encoder("").shape == (1, 77, 64)
        with pytest.raises(ValueError, match="tokens is too long: at most 20 windows"):
            encoder("cat " * 1501)
    with pytest.raises(ValueError, match="30000 characters is too long"):
        encoder("a" * 30_000)
    assert encoder(texts).shape == (3, 77, 64)  # the option ended with its block


@pytest.mark.parametrize("make", [small_clip, small_open_clip])
def test_clip_skip_counts_hidden_states_from_the_end(make: Any):
    encoder = fill_(make())
    states = encoder._network.hidden_states(encoder.tokenize(TEXTS))
    for clip_skip in (1, 2, 3):
        skipped = fill_(make(prompt_options={"clip_skip": clip_skip}))
        assert torch.allclose(skipped(TEXTS), encoder._network.final_norm(states[-clip_skip]), atol=1e-5)
    with pytest.raises(ValueError, match="clip_skip must be from 1 to 3 .* found 4"), encoder.using(clip_skip=4):
        encoder("a")


def test_prompts_that_are_cut_are_reported_a_few_times(caplog: Any):
    encoder = fill_(small_clip())
    whole = encoder(" ".join(WORDS[:75]))
    assert not caplog.records
    assert torch.equal(encoder(" ".join(WORDS[:76])), whole)
    assert "a prompt of 76 tokens is cut to 75" in caplog.text and "PromptOptions.windows" in caplog.text
    encoder([f"{i} " * 80 for i in range(20)])
    assert len(caplog.records) == 10 and caplog.records[-1].message.endswith("further ones are not reported")


def test_a_repeated_prompt_is_encoded_once():
    encoder, seen = fill_(small_clip()), []
    encoder.transformer.text_model.embeddings.register_forward_hook(
        lambda _m, inputs, _out: seen.append(len(inputs[0]))
    )
    many = encoder(["a", "b", "a", "a"])
    assert seen == [2] and torch.equal(many[[0, 0, 0]], many[[0, 2, 3]])
    assert torch.allclose(many[:2], torch.cat([encoder("a"), encoder("b")]), atol=1e-6)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a (red:1.3) car", [("a ", 1), ("red", 1.3), (" car", 1)]),
        ("(a) ((b)) [c]", [("a", 1.1), (" ", 1), ("b", 1.21), (" ", 1), ("c", 1 / 1.1)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1), (" c", 0.5)]),
        (r"a \(b\) \[c", [("a (b) [c", 1)]),
        ("smile :) or (: here", [("smile :) or (: here", 1)]),
        ("(open [b] (c:1.5)", [("(open ", 1), ("b", 1 / 1.1), (" ", 1), ("c", 1.5)]),
        ("(12:30) (a:b) c:2", [("12", 30), None]),
        ("(time 12:30pm)", [("time 12:30pm", 1.1)]),
        ("", [("", 1)]),
    ],
)
def test_weights_in_brackets(prompt: str, parts: list):
    if None in parts:
        with pytest.raises(ValueError, match="weight must lie within -10 and 10, found 30"):
            parse_weights(prompt)
        return
    found = parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


@pytest.mark.parametrize("make", [small_clip, small_open_clip])
def test_a_weight_moves_its_tokens_away_from_the_empty_prompt(make: Any):
    encoder = fill_(make())
    plain, empty = encoder("a red car"), encoder("")
    # By default brackets are characters.
    assert torch.equal(encoder("a (red:1.5) car")[0, :2], encoder("a (red")[0, :2])
    with encoder.using(weights=True):
        assert torch.allclose(encoder("a (red:1.0) car"), plain, atol=1e-5)
        weighted = encoder(["a (red:1.5) car", "a cat"])
        assert torch.allclose(weighted[1], fill_(make())("a cat")[0], atol=1e-5)
    change = torch.zeros(77)
    change[2] = 0.5  # begin, a, red, car
    assert torch.allclose(weighted[0], (plain + change[:, None] * (plain - empty))[0], atol=1e-5)


OVERFLOWING = [
    (FrozenCLIPEmbedder, "transformer.text_model.encoder.layers.1.mlp.fc1"),
    (FrozenOpenCLIPEmbedder, "model.transformer.resblocks.1.mlp.c_fc"),
]


@pytest.mark.parametrize("cls, name", OVERFLOWING)
@torch.no_grad()
def test_an_overflow_in_half_precision_is_named_and_repaired(cls: type[nn.Module], name: str, caplog: Any):
    encoder = filled(cls, width=64, layers=3, heads=4, prompt_options={"weights": True})
    encoder.get_submodule(name).weight.mul_(1e9).clamp_(-6e4, 6e4)
    texts = ["a (blue:1.3) circle", "a square"]
    want = encoder.half().float()(texts)
    before = {key: value.clone() for key, value in encoder.half().state_dict().items()}
    got = encoder(texts)
    assert got.dtype == torch.float16 and relative_error(got.float(), want) < 2e-3
    assert (
        f"encoding prompts in float16 is not finite from {name} (Linear) on; it is repeated in float32" in caplog.text
    )
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


def test_options_of_a_process_and_of_one_encoder():
    encoder, own = fill_(small_clip()), fill_(small_clip(prompt_options={"windows": 2}))
    set_default_options(PromptOptions(windows=3))
    try:
        assert encoder("a").shape == (1, 231, 64) and own("a").shape == (1, 154, 64)
    finally:
        set_default_options(None)
    assert encoder("a").shape == (1, 77, 64)
    for options in ({"windows": 0}, {"windows": 21}, {"clip_skip": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            small_clip(prompt_options=options)
    with pytest.raises(ConfigError, match="window_count"):
        small_clip(prompt_options={"window_count": 2})


@pytest.mark.parametrize("make", [small_clip, small_open_clip])
def test_frozen_stays_frozen_and_free_learns(make: Any):
    frozen = make()
    assert not any(module.training for module in frozen.train().modules())
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen("a").requires_grad

    torch.manual_seed(0)
    encoder = make(freeze=False)
    assert encoder.train().training
    wanted = torch.randn(3, 77, 64)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = (encoder(TEXTS) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    unused = {"model.text_projection", "model.logit_scale"}
    assert {k for k, p in encoder.named_parameters() if p.grad is None} == {
        k for k, _ in encoder.named_parameters() if k in unused
    }
    encoder.freeze()
    assert not encoder.train().training and not any(p.requires_grad for p in encoder.parameters())


def test_bad_options_are_named():
    for make, options, message in (
        (small_clip, {"layer": "penultimate"}, "last, pooled, hidden"),
        (small_clip, {"layer": "hidden"}, "layer_idx from -4 to 3, found None"),
        (small_clip, {"layer": "hidden", "layer_idx": 4}, "found 4"),
        (small_clip, {"max_length": 78}, "max_length must be from 3 to 77"),
        (small_clip, {"heads": 5}, "64 is not a multiple of 5"),
        (small_open_clip, {"layer": "hidden"}, "last, penultimate"),
        (small_open_clip, {"arch": "ViT-Z-99"}, "ViT-Z-99"),
        (small_open_clip, {"arch": "ViT-B-16-SigLIP"}, "plain transformer"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    with pytest.raises(TypeError, match="must be a string, found int"):
        small_clip()(["a", 3])


def test_subclasses_and_public_place():
    common = ["version", "device", "max_length", "freeze", "layer"]
    for cls, first in ((FrozenCLIPEmbedder, [*common, "layer_idx"]), (FrozenOpenCLIPEmbedder, ["arch", *common])):
        assert cls.__module__ == "ldm.modules.encoders.modules"
        assert list(inspect.signature(cls).parameters)[:6] == first

    class Half(FrozenCLIPEmbedder):
        def forward(self, text: Any) -> torch.Tensor:
            return super().forward(text) / 2

    encoder = fill_(Half(width=64, layers=2, heads=4))
    assert torch.equal(encoder.encode("a"), FrozenCLIPEmbedder.forward(encoder, "a") / 2)


def test_import_is_light():
    heavy = {"open_clip", "transformers", "torchvision"}
    code = f"import sys, ldm.modules.encoders.modules; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_class_embedder_and_identity():
    encoder = ClassEmbedder(8, n_classes=5, ucg_rate=1.0)
    labels = {"class": torch.tensor([0, 3])}
    nothing = encoder(encoder.get_unconditional_conditioning(2))
    assert encoder(labels).shape == (2, 1, 8)
    assert torch.equal(encoder(labels), nothing)  # in training all are dropped at rate 1
    assert torch.equal(encoder(labels, disable_dropout=True)[:, 0], encoder.embedding.weight[[0, 3]])
    assert torch.equal(encoder.eval().encode(labels)[:, 0], encoder.embedding.weight[[0, 3]])
    assert IdentityEncoder().encode(labels) is labels
