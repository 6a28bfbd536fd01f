"""The classifier: sizes of the reference, the same function as its torch layout, statistics, and the scorer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.reward import classifier
from wovr_jax.reward.classifier import RewardConfig


def count(cfg, statistics=False):
    leaves = jax.tree_util.tree_flatten_with_path(classifier.network(cfg).shapes())[0]
    return sum(leaf.size for path, leaf in leaves if statistics or not classifier.is_statistic(path))


def frames(shape=(4, 8, 8, 3), seed=0):
    return jax.random.uniform(jax.random.key(seed), shape, minval=-1.0, maxval=1.0)


@pytest.fixture(scope="module")
def fake():
    cfg = RewardConfig.fake()
    pure = classifier.network(cfg)
    return cfg, jax.jit(pure), pure.init(jax.random.key(0))


def trained(cfg):
    """``mutate`` in training, jitted: (params, frame, task, key) -> (logit, params)."""
    pure = classifier.network(cfg)
    return jax.jit(lambda params, frame, task, key: pure.mutate(params, frame, task, train=True, key=key))


def test_reference_sizes():
    # torchvision's ResNet-18 without its head has 11,176,512; the biases of the convolutions add 4,800 and the
    # shortcuts lose 2 * 896 of normalisation: 11,179,520, and one output adds 513.
    # The task head instead: 10 * 64 + 576 * 256 + 256 + 257 = 148,609.
    assert count(RewardConfig()) == 11_180_033
    assert count(RewardConfig.resnet18_task()) == 11_328_129
    # in float32 with running statistics: 45.34 MB, the released file without its header
    assert 4 * count(RewardConfig.resnet18_task(), statistics=True) == 45_343_748
    assert count(RewardConfig.tabletop()) < 200_000


def test_full_size_shapes():
    """256 pixels leave 8 x 8 to the head; nothing is allocated."""
    pure = classifier.network(RewardConfig.resnet18_task())
    frame, task = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    logit = jax.eval_shape(pure, pure.shapes(), frame, task)
    assert logit.shape == (2,) and logit.dtype == jnp.float32


def test_tabletop_keeps_the_picture():
    """The stages see 16, 8 and 4 pixels; the reference stem and stages would end with a single one."""
    cfg = RewardConfig.tabletop()
    pixels = 32 // cfg.stem_stride // (2 if cfg.stem_pool else 1)
    assert [pixels // 2**stage for stage in range(len(cfg.widths))] == [16, 8, 4]


def test_task_head_reads_the_task_and_plain_head_does_not(fake):
    _, pure, params = fake
    frame = frames()
    first, second = (pure(params, frame, jnp.full(4, task, jnp.int32)) for task in (0, 1))
    assert first.shape == (4,) and not np.allclose(first, second)
    plain = classifier.network(RewardConfig.fake(head="plain"))
    assert jax.eval_shape(plain, plain.shapes(), frame).shape == (4,)


def test_frames_are_clamped(fake):
    _, pure, params = fake
    task = jnp.zeros(4, jnp.int32)
    bright = frames() * 3
    np.testing.assert_array_equal(pure(params, bright, task), pure(params, jnp.clip(bright, -1, 1), task))


def test_batch_statistics_follow_torchs_momentum(fake):
    """running = 0.9 * running + 0.1 * batch; the flax default of 0.99, or 0.1 read as flax means it, would not."""
    cfg, _, params = fake
    frame = frames()
    _, after = trained(cfg)(params, frame, jnp.zeros(4, jnp.int32), jax.random.key(1))
    kernel, dimensions = params["stem"]["kernel"], ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(frame, kernel, (1, 1), [(1, 1)] * 2, dimension_numbers=dimensions)
    out = np.asarray(out) + np.asarray(params["stem"]["bias"])
    np.testing.assert_allclose(after["stem_norm"]["mean"], 0.1 * out.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after["stem_norm"]["var"], 0.9 + 0.1 * out.var((0, 1, 2)), rtol=1e-4)
    # nothing else moved, and a call that is not training moves nothing
    moved = jax.tree_util.tree_map_with_path(
        lambda path, a, b: classifier.is_statistic(path) or np.array_equal(a, b), params, after
    )
    assert all(jax.tree.leaves(moved))
    _, still = jax.jit(classifier.network(cfg).mutate)(params, frame, jnp.zeros(4, jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, still, params)


def test_dropout_only_in_training(fake):
    cfg, pure, params = fake
    frame, task = frames(), jnp.zeros(4, jnp.int32)
    np.testing.assert_array_equal(pure(params, frame, task), pure(params, frame, task))
    wet = [trained(cfg)(params, frame, task, jax.random.key(k))[0] for k in range(4)]
    assert any(not np.allclose(wet[0], other) for other in wet[1:])


def test_bfloat16_convolutions_stay_close(fake):
    _, pure, params = fake
    half = jax.jit(classifier.network(RewardConfig.fake(dtype="bfloat16")))
    logit = half(params, frames(), jnp.zeros(4, jnp.int32))
    assert logit.dtype == jnp.float32
    np.testing.assert_allclose(logit, pure(params, frames(), jnp.zeros(4, jnp.int32)), atol=0.1)


def test_score_is_the_classifier_frame_by_frame(fake):
    cfg, pure, params = fake
    frame, task = frames((3, 2, 8, 8, 3)), jnp.array([0, 1, 2])
    prob = jax.jit(classifier.score(cfg, params))(frame, task, None)
    assert prob.shape == (3, 2)
    for b in range(3):
        # tasks tiled instead of repeated would give row 0 the tasks 0 and 1
        expected = jax.nn.sigmoid(pure(params, frame[b], jnp.full(2, task[b])))
        np.testing.assert_allclose(prob[b], expected, rtol=1e-5)


def test_unknown_head_is_refused():
    with pytest.raises(ValueError, match="head: expected one of 'plain', 'task', got 'film'"):
        RewardConfig(head="film")


def torch_twin(torch, cfg, params):
    """The reference layout in torch, with our weights."""
    nn = torch.nn

    def conv(p, stride=1):
        kernel = np.asarray(p["kernel"])
        layer = nn.Conv2d(*kernel.shape[2:], kernel.shape[0], stride=stride, padding=kernel.shape[0] // 2)
        layer.weight.data = torch.tensor(kernel.transpose(3, 2, 0, 1).copy())
        layer.bias.data = torch.tensor(np.array(p["bias"]))
        return layer

    def norm(p):
        layer = nn.BatchNorm2d(p["scale"].shape[0])
        for ours, theirs in (("scale", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("var", "running_var")):
            getattr(layer, theirs).data = torch.tensor(np.array(p[ours]))
        return layer

    def linear(p):
        layer = nn.Linear(*p["kernel"].shape)
        layer.weight.data = torch.tensor(np.array(p["kernel"]).T.copy())
        layer.bias.data = torch.tensor(np.array(p["bias"]))
        return layer

    class Residual(nn.Module):
        def __init__(self, p, stride):
            super().__init__()
            self.conv1, self.norm1 = conv(p["conv1"], stride), norm(p["norm1"])
            self.conv2, self.norm2 = conv(p["conv2"]), norm(p["norm2"])
            self.shortcut = conv(p["shortcut"], stride) if "shortcut" in p else nn.Identity()

        def forward(self, x):
            y = torch.relu(self.norm1(self.conv1(x)))
            return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))

    stem = [conv(params["stem"], cfg.stem_stride), norm(params["stem_norm"]), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks = [
        Residual(params["blocks"][f"stage{s}_block{b}"], 2 if s and not b else 1)
        for s in range(len(cfg.widths))
        for b in range(cfg.blocks)
    ]
    body = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten())
    head = nn.Sequential(linear(params["hidden"]), nn.ReLU(), linear(params["out"]))
    embedding = torch.tensor(np.array(params["task"]["embedding"]))
    return body, lambda frame, task: head(torch.cat([body(frame), embedding[task]], 1))[:, 0]


def test_equals_torch():
    """The reference stem at odd and even sizes: 'SAME' padding at stride 2 would shift the picture and miss by 0.1."""
    torch = pytest.importorskip("torch")
    cfg = RewardConfig.fake(blocks=1, stem_kernel=7, stem_stride=2, stem_pool=True)
    pure = classifier.network(cfg)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.asarray(x + 0.1 * rng.random(x.shape), np.float32), pure.init(jax.random.key(3)))
    task = np.array([0, 2, 1])
    for pixels in (32, 45):
        frame = np.array(frames((3, pixels, pixels, 3), seed=pixels))
        body, twin = torch_twin(torch, cfg, params)
        body.eval()
        with torch.no_grad():
            expected = twin(torch.tensor(frame.transpose(0, 3, 1, 2).copy()), torch.tensor(task)).numpy()
        np.testing.assert_allclose(jax.jit(pure)(params, frame, task), expected, atol=2e-5, rtol=1e-5)
    # and the running statistics of a training step: the mean exactly, the variance up to n / (n - 1)
    body.train()
    with torch.no_grad():
        body(torch.tensor(frame.transpose(0, 3, 1, 2).copy()))
    _, after = trained(cfg)(params, frame, task, jax.random.key(0))
    np.testing.assert_allclose(after["stem_norm"]["mean"], body[1].running_mean.numpy(), atol=1e-5)
    np.testing.assert_allclose(after["stem_norm"]["var"], body[1].running_var.numpy(), rtol=2e-3)


def test_bytes_and_lone_frames_are_refused_while_tracing():
    pure = classifier.network(RewardConfig.fake())
    params, frame_BHWC, task_B = pure.shapes(), jnp.zeros((2, 16, 16, 3)), jnp.zeros(2, jnp.int32)
    for frames, tasks, word in (
        (frame_BHWC.astype(jnp.uint8), task_B, r"frame_BHWC, in \[-1, 1\]"),
        (frame_BHWC[0], task_B, "frame_BHWC"),
        (frame_BHWC[..., :1], task_B, "colours of frame_BHWC"),
        (frame_BHWC, task_B[:1], "task_B"),
        (frame_BHWC, task_B.astype(jnp.float32), "task_B"),
    ):
        with pytest.raises(AssertionError, match=f"reward classifier: {word}"):
            jax.eval_shape(pure, params, frames, tasks)
