"""The transformer against diffusers, its action channels against torch, sizes, and its complaints."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.nn.functional import Pure
from wovr_jax.world.dit import Context, DiT, DiTConfig, group_actions, patchify, sinusoid, unpatchify


def build(cfg):
    return Pure(lambda rngs: DiT(cfg, rngs=rngs))


def randomised(pure, seed=0):
    """Parameters in which nothing is zero or one, so that no branch can hide."""
    rng = np.random.default_rng(seed)
    fresh = pure.init(jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32), fresh)


def run(pure, params, *args, **kwargs):
    """The network in one compiled program, which is quicker than one program an operation."""
    return jax.jit(lambda p, a, k: pure(p, *a, **k))(params, args, kwargs)


def window(cfg, size=(4, 4, 6), batch=2):
    """Latents, noise levels (two clean frames) and actions; every axis of another length."""
    frames, rows, columns = size
    latent = jax.random.normal(jax.random.key(2), (batch, frames, rows, columns, cfg.channels))
    time = jnp.tile(jnp.array([0.0, 0.0, 952.0, 555.6, 300.0])[None, :frames], (batch, 1))
    time = time * jnp.linspace(1.0, 0.5, batch)[:, None]
    action = jax.random.normal(jax.random.key(3), (batch, 1 + 4 * (frames - 1), cfg.action_dim))
    return latent, time, action


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_the_5b_network_has_its_parameters():
    shapes = build(DiTConfig.ti2v_5b()).shapes()
    assert count(shapes["action_cross"]) == 9_464_832
    assert count(shapes["action_adaln"]) == 38_108_160
    assert count(shapes) == 5_025_334_464


@pytest.mark.parametrize("conditioning, absent", [("cross", "action_adaln"), ("adaln", "action_cross")])
def test_ablations_have_no_idle_weights(conditioning, absent):
    cfg = DiTConfig.fake(action_conditioning=conditioning)
    shapes = build(cfg).shapes()
    assert absent not in shapes
    assert ("cross_attn" in shapes["blocks"]) == (conditioning == "cross")
    assert jax.eval_shape(build(cfg), shapes, *window(cfg)).shape == (2, 4, 4, 6, 4)


def test_new_network_predicts_zero():
    cfg = DiTConfig.fake()
    velocity = run(build(cfg), build(cfg).init(jax.random.key(0)), *window(cfg))
    np.testing.assert_array_equal(velocity, 0.0)


def test_context_once_equals_context_each_time():
    cfg = DiTConfig.fake()
    pure, (latent, time, action) = build(cfg), window(cfg)
    params = randomised(pure)
    context = jax.jit(lambda p: pure(p, action, method="context"))(params)
    again = run(pure, params, latent, time, context=context)
    np.testing.assert_allclose(run(pure, params, latent, time, action), again, rtol=1e-5, atol=1e-5)


def test_cross_channel_is_blind_to_order_and_adaln_is_not():
    for conditioning, blind in (("cross", True), ("dual", False)):
        cfg = DiTConfig.fake(action_conditioning=conditioning)
        pure, (latent, time, action) = build(cfg), window(cfg)
        params = randomised(pure)
        swapped = action[:, ::-1]
        same = np.allclose(run(pure, params, latent, time, action), run(pure, params, latent, time, swapped), atol=1e-4)
        assert same == blind


def test_groups_of_actions_by_hand():
    # One-dimensional actions 0..12: the anchor's is repeated, then four for each latent frame.
    grouped = group_actions(jnp.arange(13.0).reshape(1, 13, 1), 4)
    np.testing.assert_array_equal(grouped[0], [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])


def test_sinusoid_has_cosines_first():
    # dim 4: frequencies 1 and 0.01. Sines first would give (0.909, 0.02, -0.416, 0.9998).
    np.testing.assert_allclose(sinusoid(jnp.full((1, 1), 2.0), 4)[0, 0], [-0.4161, 0.9998, 0.9093, 0.0200], atol=1e-4)


@pytest.mark.parametrize("width", [4, 256])
def test_the_sinusoid_is_that_of_float64(width):
    """In float32 alone the angle at 950 is 3e-5 off, an order of magnitude more than the network is."""
    time = np.concatenate([np.linspace(0, 1000, 4001), [952.38, 882.35, 1e-3]]).astype(np.float32)[None]
    angle = time.astype(np.float64)[..., None] * 10_000.0 ** (-np.arange(width // 2) / (width // 2))
    want = np.concatenate([np.cos(angle), np.sin(angle)], -1)
    for compute in (sinusoid, jax.jit(sinusoid, static_argnums=1)):
        np.testing.assert_allclose(compute(jnp.asarray(time), width), want, rtol=0, atol=5e-7)


def test_patch_orders_differ_on_the_way_in_and_out():
    latent = jnp.arange(2 * 2 * 3).reshape(1, 1, 2, 2, 3).astype(jnp.float32)  # (row, column, c) = 6 row + 3 col + c
    np.testing.assert_array_equal(patchify(latent, 2).ravel(), [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11])
    np.testing.assert_array_equal(unpatchify(jnp.arange(12.0).reshape(1, 1, 1, 12), 2, 2, 2), latent)


def test_rematerialised_gradient_equals_the_stored_one():
    grads = []
    for remat in (False, True):
        pure = build(DiTConfig.fake(remat=remat))
        inputs = window(DiTConfig.fake())
        gradient = jax.grad(lambda p, pure=pure, inputs=inputs: jnp.square(pure(p, *inputs)).sum())
        grads.append(jax.jit(gradient)(randomised(pure)))
    for stored, recomputed in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(stored, recomputed, rtol=1e-3, atol=1e-3 * float(jnp.abs(stored).max()))


@pytest.mark.parametrize("sizes", [{}, {"dim": 66, "heads": 3, "layers": 3, "patch": 1, "channels": 5}])
@pytest.mark.parametrize("residual", ["bfloat16", "float32"])
def test_bfloat16_stays_within_two_hundredths(sizes, residual):
    """Of the largest velocity; measured 0.004 to 0.007."""
    cfg = DiTConfig.fake(**sizes)
    pure, half = build(cfg), build(dataclasses.replace(cfg, dtype="bfloat16", residual_dtype=residual))
    params, inputs = randomised(pure), window(cfg)
    exact, rounded = run(pure, params, *inputs), run(half, params, *inputs)
    assert rounded.dtype == jnp.float32
    assert relative_error(rounded, np.asarray(exact)) < 0.02


def test_refuses_what_does_not_fit():
    cfg = DiTConfig.fake()
    pure, (latent, time, action) = build(cfg), window(cfg)
    params = pure.shapes()

    def call(*args):
        return jax.eval_shape(lambda p: pure(p, *args), params)

    with pytest.raises(ValueError, match="actions: expected"):
        call(latent, time, action[:, :12])
    with pytest.raises(ValueError, match="actions: expected"):
        call(latent, time, action[..., :6])
    with pytest.raises(ValueError, match="needs actions"):
        call(latent, time)
    with pytest.raises(ValueError, match="latents: expected"):
        call(latent[..., :3], time, action)
    with pytest.raises(AssertionError, match="one level for each latent frame"):
        call(latent, time[:, :3], action)
    with pytest.raises(ValueError, match="action_conditioning"):
        DiTConfig(action_conditioning="concat")
    with pytest.raises(ValueError, match="multiple of heads"):
        DiTConfig.fake(heads=3)


# Parity with the torch originals ------------------------------------------------------------------


def torch_twin(cfg):
    """diffusers' transformer of the same sizes, randomised; its text MLP is the identity."""
    torch = pytest.importorskip("torch")
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    torch.manual_seed(0)
    twin = wan.WanTransformer3DModel(
        patch_size=(1, cfg.patch, cfg.patch),
        num_attention_heads=cfg.heads,
        attention_head_dim=cfg.head_dim,
        in_channels=cfg.channels,
        out_channels=cfg.channels,
        text_dim=cfg.dim,
        freq_dim=cfg.freq_dim,
        ffn_dim=cfg.ffn,
        num_layers=cfg.layers,
        rope_max_seq_len=32,
    )
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    twin.condition_embedder.text_embedder = torch.nn.Identity()
    return twin.eval()


def params_from(twin):
    """Our parameters (without action channels) from the torch state dict."""
    state = {name: np.asarray(value.detach()) for name, value in twin.state_dict().items()}

    def linear(name):
        return {
            "kernel": state[f"{name}.weight"].reshape(len(state[f"{name}.bias"]), -1).T,
            "bias": state[f"{name}.bias"],
        }

    def mlp(inner, outer):
        return {"inner": linear(inner), "outer": linear(outer)}

    def attention(name):
        rows = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
        norms = {f"norm_{x}": {"scale": state[f"{name}.norm_{x}.weight"]} for x in "qk"}
        return {ours: linear(f"{name}.{theirs}") for ours, theirs in rows.items()} | norms

    def block(i):
        return {
            "modulation": state[f"blocks.{i}.scale_shift_table"][0],
            "self_attn": attention(f"blocks.{i}.attn1"),
            "cross_attn": attention(f"blocks.{i}.attn2"),
            "cross_norm": {"scale": state[f"blocks.{i}.norm2.weight"], "bias": state[f"blocks.{i}.norm2.bias"]},
            "ffn": mlp(f"blocks.{i}.ffn.net.0.proj", f"blocks.{i}.ffn.net.2"),
        }

    blocks = [block(i) for i in range(len(twin.blocks))]
    time = "condition_embedder.time_embedder"
    return {
        "patch_embedding": linear("patch_embedding"),
        "time_embedding": mlp(f"{time}.linear_1", f"{time}.linear_2"),
        "time_projection": linear("condition_embedder.time_proj"),
        "blocks": jax.tree.map(lambda *layers: np.stack(layers), *blocks),
        "head_modulation": state["scale_shift_table"][0],
        "head": linear("proj_out"),
    }


def run_twin(twin, cfg, latent, time, context):
    """diffusers' forward with one noise level for each token."""
    torch = pytest.importorskip("torch")
    tokens = latent.shape[2] * latent.shape[3] // cfg.patch**2
    with torch.no_grad():
        out = twin(
            torch.tensor(np.asarray(latent)).permute(0, 4, 1, 2, 3),
            torch.tensor(np.repeat(np.asarray(time), tokens, axis=1)),
            context,
            return_dict=False,
        )[0]
    return out.permute(0, 2, 3, 4, 1).numpy()


def relative_error(got, want):
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


@pytest.mark.parametrize(
    "cfg, size",
    [
        (DiTConfig.fake(action_conditioning="cross"), (3, 8, 12)),  # heads of 20: axes of 8, 6, 6; grid of 3 x 4 x 6
        (DiTConfig.fake(action_conditioning="cross", dim=66, heads=3, layers=3, patch=1, channels=5), (4, 3, 5)),
    ],
)
def test_core_equals_diffusers(cfg, size):
    torch = pytest.importorskip("torch")
    twin, pure = torch_twin(cfg), build(cfg)
    latent, time, _ = window(cfg, size)
    vectors = jax.random.normal(jax.random.key(5), (2, 7, cfg.dim))
    params = pure.init(jax.random.key(0)) | params_from(twin)
    with jax.default_matmul_precision("highest"):
        key_value = jax.jit(lambda p: pure(p, vectors, method="key_value"))(params)
        got = run(pure, params, latent, time, context=Context(key_value, None))
    want = run_twin(twin, cfg, latent, time, torch.tensor(np.asarray(vectors)))
    assert np.abs(want).max() > 0.5
    assert relative_error(got, want) <= 1e-5


@pytest.mark.parametrize(
    "cfg, size",
    [
        (DiTConfig.fake(), (4, 4, 6)),
        (DiTConfig.fake(dim=66, heads=3, layers=1, patch=1, channels=5, action_dim=14), (3, 2, 5)),
    ],
)
def test_both_action_channels_equal_torch(cfg, size):
    torch = pytest.importorskip("torch")
    twin, pure = torch_twin(cfg), build(cfg)
    latent, time, action = window(cfg, size)
    params = randomised(pure) | params_from(twin)

    def mlp(weights, activation):
        layers = [torch.nn.Linear(*weights[name]["kernel"].shape) for name in ("inner", "outer")]
        for layer, name in zip(layers, ("inner", "outer"), strict=True):
            layer.load_state_dict(
                {
                    "weight": torch.tensor(np.asarray(weights[name]["kernel"]).T),
                    "bias": torch.tensor(np.asarray(weights[name]["bias"])),
                }
            )
        return torch.nn.Sequential(layers[0], activation, layers[1])

    a = torch.tensor(np.asarray(action))
    context = mlp(params["action_cross"], torch.nn.GELU())(a)
    padded = torch.cat([a[:, :1], a[:, :1], a[:, :1], a], dim=1)
    frame = mlp(params["action_adaln"], torch.nn.SiLU())(padded.unflatten(1, (size[0], 4)).flatten(2))
    per_token = frame.repeat_interleave(size[1] * size[2] // cfg.patch**2, dim=1)

    embedder = twin.condition_embedder.time_embedder
    embedder.register_forward_hook(lambda module, inputs, out: out + per_token)
    with jax.default_matmul_precision("highest"):
        got = run(pure, params, latent, time, action)
    assert relative_error(got, run_twin(twin, cfg, latent, time, context)) <= 1e-5


def test_a_profile_tells_the_parts_of_a_block_apart():
    pure = Pure(lambda rngs: DiT(DiTConfig.fake(), rngs=rngs))
    latent, time, action = jnp.zeros((1, 2, 4, 4, 4)), jnp.zeros((1, 2)), jnp.zeros((1, 5, 7))
    text = jax.jit(pure).lower(pure.shapes(), latent, time, action).as_text(debug_info=True)
    for part in ("embeddings", "Block", "self_attention", "cross_attention", "mlp", "head"):
        assert f"{part}/" in text, part
