"""LoRA adapters and PEFT: the same numbers there and here, whoever wrote the folder, merged or beside."""

from __future__ import annotations

import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.bridge.layouts import BFLOAT16, openvla_folder, read, same, write
from tests.bridge.openvla_reference import CONFIG, HEADS, weights
from wovr_jax.bridge import adapters, exporter, formats, importer
from wovr_jax.bridge.sources import FileError, find, open_source
from wovr_jax.core import checkpoint, config
from wovr_jax.nn import lora
from wovr_jax.policy import vla
from wovr_jax.policy.train import PolicyAdapters, adapted_network
from wovr_jax.policy.vla import PolicyLoRA, VLAConfig
from wovr_jax.policy.weights import adapter_table, unused_layers
from wovr_jax.weights import native
from wovr_jax.weights.plan import KeymapError
from wovr_jax.weights.safetensors import header
from wovr_jax.weights.source import open_native

CLOSE = 1e-5
FRAME = np.random.default_rng(1).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
IDS = [1, 17, 5, 80, 33, 9]
RLINF_TARGETS = ["proj", "qkv", "fc1", "fc2", "q", "kv", "fc3", "q_proj", "k_proj", "v_proj", "o_proj"]
RLINF_TARGETS += ["gate_proj", "up_proj", "down_proj", "lm_head"]


def far(got, want):
    """Largest error relative to the largest number."""
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


def opened(folder, **how):
    (file,) = find(folder)
    return importer.read_import(open_source(file), heads=HEADS, **how)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A release without adapters of its own."""
    there = openvla_folder(tmp_path_factory.mktemp("release"), weights(), CONFIG)
    (there / "lora_adapter" / "adapter_config.json").unlink()
    return there


@pytest.fixture(scope="module")
def base(folder):
    """Config and parameters."""
    ready = opened(folder)
    return ready.cfg, jax.tree.map(jnp.asarray, ready.params())


def lively(cfg, own, seed=0):
    """Adapters with numbers everywhere, small enough that the network stays the network."""
    shapes = jax.eval_shape(functools.partial(lora.init, params=vla.network(cfg).shapes(), cfg=own), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)


@functools.cache
def running(net):
    return jax.jit(lambda params, frame, prompt: net(params, frame, prompt))


def slots(net, params):
    with jax.default_matmul_precision("highest"):
        return np.asarray(running(net)(params, FRAME, jnp.array([IDS]))).reshape(56, 256)


def in_torch(release):
    """The release as a torch module."""
    pytest.importorskip("torch")
    from tests.bridge import released

    return released.build(release)


def said(module):
    """Its logits."""
    from tests.bridge import released

    return released.slots(module, FRAME, IDS)


def peft_loads(folder):
    """The release in torch with the adapters of ``folder``; a key too many or too few is a warning, and fails."""
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(in_torch(weights()), str(folder))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A folder that PEFT wrote, with RLinf's targets, and what the policy says with it in torch."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    own = peft.LoraConfig(r=3, lora_alpha=3, target_modules=RLINF_TARGETS, init_lora_weights="gaussian")
    model = peft.get_peft_model(in_torch(weights()), own)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    there = tmp_path_factory.mktemp("foreign") / "lora_adapter"
    with warnings.catch_warnings():  # it looks for a transformers model around the head, and finds none
        warnings.simplefilter("ignore", UserWarning)
        model.save_pretrained(str(there))
    # Inside a transformers model PEFT saves the head itself beside its adapter.
    head = {"base_model.model.language_model.lm_head.base_layer.weight": weights()["language_model.lm_head.weight"]}
    write(there / "adapter_model.safetensors", read(there / "adapter_model.safetensors") | head)
    return there, said(model)


# Ours, read by PEFT ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [PolicyLoRA.oft, PolicyLoRA.rlinf])
def test_peft_loads_our_adapters_and_says_the_same(base, preset, tmp_path):
    cfg, params = base
    own = preset(rank=4)
    ours = lively(cfg, own)
    adapters.write_peft(tmp_path, PolicyAdapters(cfg, own), native.flatten(ours))
    want = said(peft_loads(tmp_path))
    beside = slots(adapted_network(cfg, own), lora.join(params, ours))
    merged = slots(vla.network(cfg), lora.merge(params, ours, own))
    assert far(beside, want) <= CLOSE and far(merged, want) <= CLOSE
    assert far(slots(vla.network(cfg), params), want) > 1000 * CLOSE  # they do something
    wrong = lora.merge(params, ours, PolicyLoRA(4, 2 * own.alpha, own.targets))
    assert far(slots(vla.network(cfg), wrong), want) > 1000 * CLOSE  # twice the scale


def test_fresh_adapters_change_nothing(base, tmp_path):
    cfg, params = base
    own = PolicyLoRA.rlinf(rank=4)  # the program of the test above
    fresh = lora.init(jax.random.key(0), params, own)
    plain = slots(vla.network(cfg), params)
    np.testing.assert_array_equal(slots(vla.network(cfg), lora.merge(params, fresh, own)), plain)
    assert far(slots(adapted_network(cfg, own), lora.join(params, fresh)), plain) <= 1e-6
    adapters.write_peft(tmp_path, PolicyAdapters(cfg, own), jax.device_get(native.flatten(fresh)))
    assert far(said(peft_loads(tmp_path)), plain) <= CLOSE


# PEFT's, read by us ---------------------------------------------------------------------------------------------


def test_what_peft_wrote_says_the_same_here(base, foreign):
    cfg, params = base
    there, want = foreign
    found = adapters.open_peft(there, cfg)
    own = found.about.lora
    assert (own.rank, own.alpha, own.init) == (3, 3.0, "gaussian")
    assert set(own.targets) == set(lora.targets(params, PolicyLoRA.rlinf()))
    ours = native.unflatten(found.leaves)
    assert far(slots(adapted_network(cfg, own), lora.join(params, ours)), want) <= CLOSE
    assert "of rank 3 and scale 1" in found.report("kept") and "lm_head.base_layer.weight" in found.report("kept")


def test_merged_on_the_way_in(folder, foreign, tmp_path):
    there, want = foreign
    ready = opened(folder, merge=there)
    assert any("merged in float32" in line for line in ready.report())
    card = importer.write_import(ready, tmp_path / "ours")
    cfg, params = native.load(card, put=lambda _, leaf: jnp.asarray(leaf))
    assert far(slots(vla.network(cfg), params), want) <= CLOSE
    # ... and the exported folder is the sum in torch too, in the layers that the policy does not run as well
    exporter.write_export(card, "openvla", tmp_path / "out")
    theirs = read(tmp_path / "out" / "model.safetensors")
    assert far(said(in_torch(theirs)), want) <= CLOSE
    held = {
        name.removeprefix("base_model.model."): array
        for name, array in read(there / "adapter_model.safetensors").items()
    }
    for layer in ("vision_backbone.fused_featurizer.attn_pool.kv", "vision_backbone.featurizer.blocks.2.mlp.fc1"):
        a, b = (held[f"{layer}.lora_{letter}.weight"] for letter in "AB")
        np.testing.assert_allclose(theirs[f"{layer}.weight"], weights()[f"{layer}.weight"] + b @ a, atol=1e-6)


def test_a_folder_goes_in_and_out_without_a_changed_bit(base, foreign, tmp_path):
    cfg, _ = base
    there, _ = foreign
    card = adapters.write_native(adapters.open_peft(there, cfg), tmp_path / "ours")
    about = open_native(card)[0]
    assert about.network == cfg and about.lora.rank == 3
    assert sorted(path.name for path in card.parent.iterdir()) == ["lora.json", "lora.rest", "lora.safetensors"]
    adapters.export(card, tmp_path / "back")
    before, after = (read(at / "adapter_model.safetensors") for at in (there, tmp_path / "back"))
    same({name: array for name, array in before.items() if ".base_layer." not in name}, after)
    for file in ("adapter_config.json", "README.md"):
        assert (tmp_path / "back" / file).read_bytes() == (there / file).read_bytes()


def test_half_weights_are_merged_in_float32_and_rounded_once(foreign, tmp_path):
    there, _ = foreign
    half = {name: array.astype(BFLOAT16) for name, array in weights().items()}
    merged = dict(opened(openvla_folder(tmp_path, half, CONFIG), merge=there).leaves())
    held = read(there / "adapter_model.safetensors")
    name = "language_model.model.layers.1.mlp.down_proj"
    a, b = (held[f"base_model.model.{name}.lora_{letter}.weight"].astype(np.float64) for letter in "AB")
    exact = half[f"{name}.weight"].astype(np.float64) + b @ a
    got = merged["llm/blocks/down/kernel"][1].T
    assert got.dtype == BFLOAT16
    # One rounding to eight digits, and at most a neighbour where float32 fell on the other side of the middle.
    np.testing.assert_allclose(got.astype(np.float64), exact, rtol=1.001 * 2.0**-8)


def test_a_checkpoint_of_a_fine_tuning_goes_out(base, tmp_path):
    cfg, _ = base
    own = PolicyLoRA(2, 4.0, ("llm/blocks/q", "projector/fc2"))
    ours = lively(cfg, own)
    checkpoint.save(tmp_path / "adapters", ours, config.to_dict(PolicyAdapters(cfg, own)))
    adapters.export(tmp_path / "adapters", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], len(said["target_modules"])) == (2, 4, 3 + 1)
    found = adapters.open_peft(tmp_path / "out", cfg)
    same(found.leaves, native.flatten(ours))


# Sizes, refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, scale, count", [(PolicyLoRA.oft, 0.5, 109_563_904), (PolicyLoRA.rlinf, 1.0, 110_828_288)]
)
def test_the_two_stacks_at_full_size(preset, scale, count):
    cfg, own = VLAConfig.openvla_7b(), preset()
    assert own.scale == scale
    made = jax.eval_shape(functools.partial(lora.init, params=vla.network(cfg).shapes(), cfg=own), jax.random.key(0))
    ours = sum(leaf.size for leaf in jax.tree.leaves(made))
    # Both stacks also adapt what the policy does not run: the towers' last blocks and the attention pool.
    idle = sum(own.rank * (outputs + inputs) for outputs, inputs in unused_layers(cfg).values())
    assert ours + idle == count


def test_names_are_pefts(base):
    names = {row.theirs for row in adapter_table(base[0]).rows}
    assert "base_model.model.vision_backbone.featurizer.blocks.<i>.attn.qkv.lora_A.weight" in names
    assert "base_model.model.language_model.lm_head.lora_B.weight" in names


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_rslora": True}, "use_rslora True"),
        ({"use_dora": True}, "use_dora True"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"bias": "all"}, "bias 'all'"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base weights"),
        ({"alpha_pattern": {"q": 3}}, "alpha_pattern"),
        ({"r": 0}, "r 0, lora_alpha 3"),
        ({"r": None}, "r None"),
    ],
)
def test_adapters_of_another_kind(base, foreign, tmp_path, change, message):
    there, _ = foreign
    said = json.loads((there / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(said | change))
    with pytest.raises(FileError, match=message):
        adapters.open_peft(tmp_path, base[0])


def test_adapters_that_do_not_fit(base, foreign, tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    there, _ = foreign
    held = read(there / "adapter_model.safetensors")
    stem = "base_model.model.language_model.model.layers"
    del held[f"{stem}.0.mlp.up_proj.lora_B.weight"]
    held[f"{stem}.7.mlp.up_proj.lora_A.weight"] = held[f"{stem}.1.self_attn.q_proj.lora_A.weight"]
    held[f"{stem}.1.self_attn.q_proj.lora_A.weight"] = np.zeros((4, 40), np.float32)
    (tmp_path / "adapter_config.json").write_bytes((there / "adapter_config.json").read_bytes())
    library.save_file(held, tmp_path / "adapter_model.safetensors")
    with pytest.raises(KeymapError) as caught:
        adapters.open_peft(tmp_path, base[0])
    assert {kind: len(cases) for kind, cases in caught.value.problems.items()} == {
        "missing in the file": 1,
        "not in the table": 1,
        "shape": 1,
    }
    with pytest.raises(FileError, match=r"adapter_config\.json cannot be read"):
        adapters.open_peft(tmp_path / "nothing", base[0])
    assert header(tmp_path / "adapter_model.safetensors").facts  # still there


def test_a_policy_is_no_adapter(folder, base, tmp_path):
    card = importer.write_import(opened(folder), tmp_path)
    with pytest.raises(FileError, match="holds no adapters"):
        adapters.export(card, tmp_path / "out")
    with pytest.raises(FileError, match="has no outside format"):
        formats.part_of(PolicyAdapters(base[0], PolicyLoRA()))


# As trainers leave them -----------------------------------------------------------------------------------------


def adapter_folder(there, base, names=lambda name: name, **settings):
    """A PEFT folder that needs no PEFT: adapters of the projector and of one attention layer."""
    own = PolicyLoRA(2, 4.0, ("llm/blocks/q", "projector/fc2"))
    adapters.write_peft(there, PolicyAdapters(base[0], own), native.flatten(lively(base[0], own)))
    held = read(there / "adapter_model.safetensors")
    write(there / "adapter_model.safetensors", {names(name): array for name, array in held.items()})
    said = json.loads((there / "adapter_config.json").read_text(encoding="utf-8"))
    (there / "adapter_config.json").write_text(json.dumps(said | settings), encoding="utf-8")
    return there


@pytest.mark.parametrize("alpha", [0, 0.0, -1])
def test_adapters_that_count_nothing_are_refused(base, tmp_path, alpha):
    with pytest.raises(FileError, match=r"lora_alpha .*adding them changes nothing\. verl's model merger writes 0"):
        adapters.open_peft(adapter_folder(tmp_path, base, lora_alpha=alpha), base[0])


def test_adapters_that_were_never_trained_are_warned_of(folder, base, tmp_path):
    there = adapter_folder(tmp_path, base)
    assert adapters.open_peft(there, base[0]).warnings() == []
    held = read(there / "adapter_model.safetensors")
    write(
        there / "adapter_model.safetensors",
        {name: 0 * array if "lora_B" in name else array for name, array in held.items()},
    )
    assert "all b of its adapters are zero" in " ".join(opened(folder, merge=there).warnings())


def test_settings_of_adapters_that_nobody_looks_at_are_warned_of(base, tmp_path):
    there = adapter_folder(tmp_path, base, target_modules=["q_proj", "fc2", "lm_head"], layers_to_transform=[0])
    odd = adapters.open_peft(there, base[0]).warnings()
    assert "layers_to_transform [0]" in odd[0] and "target_modules lm_head, for which the file has no adapter" in odd[1]


@pytest.mark.parametrize(
    "names",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: "module." + name.removeprefix("base_model.model.").replace(".weight", ".actor.weight"),
        lambda name: name.replace("base_model.", "base_model._orig_mod."),
    ],
)
def test_adapters_whose_state_dict_was_saved_are_read(base, tmp_path, names):
    plain, there = (adapter_folder(tmp_path / which, base, *how) for which, how in (("a", ()), ("b", (names,))))
    same(*(adapters.open_peft(at, base[0]).leaves for at in (there, plain)))


def test_adapters_that_are_not_where_they_are_looked_for(base, tmp_path):
    adapter_folder(tmp_path / "epoch_3", base)
    with pytest.raises(FileError, match=r"cannot be read as the config.*There is one in epoch_3 below it"):
        adapters.open_peft(tmp_path, base[0])
    (tmp_path / "epoch_3" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileError, match=r"expected adapter_model\.safetensors \(or adapter_model\.bin\)"):
        adapters.open_peft(tmp_path / "epoch_3", base[0])
