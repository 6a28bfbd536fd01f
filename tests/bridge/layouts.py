"""Names and shapes of the weights in use, written from their published layouts and independent of the tables."""

from __future__ import annotations

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from wovr_jax.bridge import torch_io
from wovr_jax.bridge.sources import open_source
from wovr_jax.weights.safetensors import Fact
from wovr_jax.weights.source import Source

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(jnp.bfloat16)


def dit_shapes(dim=64, layers=2, ffn=80, channels=6, freq=16, text=24, action=None, patch=2):
    """A transformer with the original names: with text, or with the two action MLPs of RLinf's fork."""
    shapes = {}

    def linear(name, width_in, width_out):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width_out, width_in), (width_out,)

    shapes |= {"patch_embedding.weight": (dim, channels, 1, patch, patch), "patch_embedding.bias": (dim,)}
    if action is None:
        linear("text_embedding.0", text, dim), linear("text_embedding.2", dim, dim)
    else:
        linear("action_mlp1.0", action, dim), linear("action_mlp1.2", dim, dim)
        linear("action_mlp2.0", 4 * action, 4 * dim), linear("action_mlp2.2", 4 * dim, dim)
    linear("time_embedding.0", freq, dim), linear("time_embedding.2", dim, dim)
    linear("time_projection.1", dim, 6 * dim)
    for i in range(layers):
        shapes[f"blocks.{i}.modulation"] = (1, 6, dim)
        for kind in ("self_attn", "cross_attn"):
            for name in "qkvo":
                linear(f"blocks.{i}.{kind}.{name}", dim, dim)
            shapes |= {f"blocks.{i}.{kind}.norm_{name}.weight": (dim,) for name in "qk"}
        shapes |= {f"blocks.{i}.norm3.{name}": (dim,) for name in ("weight", "bias")}
        linear(f"blocks.{i}.ffn.0", dim, ffn), linear(f"blocks.{i}.ffn.2", ffn, dim)
    shapes["head.modulation"] = (1, 2, dim)
    linear("head.head", dim, channels * patch**2)
    return shapes


FULL = {"dim": 3072, "layers": 30, "ffn": 14336, "channels": 48, "freq": 256, "text": 4096}


def vae_shapes(base=4, decoder=8, z=6, mult=(1, 2, 4, 4), blocks=1, halves=(False, True, True)):
    """A VAE with the original names."""
    shapes = {}

    def conv(name, width_in, width_out, *kernel):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width_out, width_in, *kernel), (width_out,)

    def residual(name, width_in, width_out):
        shapes[f"{name}.residual.0.gamma"], shapes[f"{name}.residual.3.gamma"] = (
            (width_in, 1, 1, 1),
            (width_out, 1, 1, 1),
        )
        (
            conv(f"{name}.residual.2", width_in, width_out, 3, 3, 3),
            conv(f"{name}.residual.6", width_out, width_out, 3, 3, 3),
        )
        if width_in != width_out:
            conv(f"{name}.shortcut", width_in, width_out, 1, 1, 1)

    def middle(half, width):
        residual(f"{half}.middle.0", width, width), residual(f"{half}.middle.2", width, width)
        shapes[f"{half}.middle.1.norm.gamma"] = (width, 1, 1)
        conv(f"{half}.middle.1.to_qkv", width, 3 * width, 1, 1), conv(f"{half}.middle.1.proj", width, width, 1, 1)

    def head(half, width_in, width_out):
        shapes[f"{half}.head.0.gamma"] = (width_in, 1, 1, 1)
        conv(f"{half}.head.2", width_in, width_out, 3, 3, 3)

    widths = [base, *(base * m for m in mult)]
    conv("encoder.conv1", 12, base, 3, 3, 3)
    for d, (a, b) in enumerate(zip(widths, widths[1:])):
        level = f"encoder.downsamples.{d}.downsamples"
        for r in range(blocks):
            residual(f"{level}.{r}", a if r == 0 else b, b)
        if d < len(halves):
            conv(f"{level}.{blocks}.resample.1", b, b, 3, 3)
            if halves[d]:
                conv(f"{level}.{blocks}.time_conv", b, b, 3, 1, 1)
    middle("encoder", widths[-1]), head("encoder", widths[-1], 2 * z)
    conv("conv1", 2 * z, 2 * z, 1, 1, 1), conv("conv2", z, z, 1, 1, 1)
    widths = [decoder * m for m in (mult[-1], *reversed(mult))]
    conv("decoder.conv1", z, widths[0], 3, 3, 3), middle("decoder", widths[0])
    for d, (a, b) in enumerate(zip(widths, widths[1:])):
        level = f"decoder.upsamples.{d}.upsamples"
        for r in range(blocks + 1):
            residual(f"{level}.{r}", a if r == 0 else b, b)
        if d < len(halves):
            conv(f"{level}.{blocks + 1}.resample.1", b, b, 3, 3)
            if halves[::-1][d]:
                conv(f"{level}.{blocks + 1}.time_conv", b, 2 * b, 3, 1, 1)
    head("decoder", widths[-1], 12)
    return shapes


def reward_shapes(widths=(4, 6, 8, 10), head="plain", tasks=3, embed=4, hidden=8, kernel=7):
    """A classifier with the names of RLinf's; the counts of batches are int64 scalars."""
    net, shapes = ("visual_encoder" if head == "task" else "net"), {}

    def conv(name, width_in, width_out, *window):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (width_out, width_in, *window), (width_out,)

    def norm(name, width):
        shapes.update({f"{name}.{leaf}": (width,) for leaf in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    conv(f"{net}.0.0", 3, widths[0], kernel, kernel), norm(f"{net}.0.1", widths[0])
    for stage, (a, b) in enumerate(zip((widths[0], *widths), widths)):
        for block in range(2):
            name = f"{net}.{stage + 1}.{block}"
            conv(f"{name}.conv1", b if block else a, b, 3, 3), conv(f"{name}.conv2", b, b, 3, 3)
            norm(f"{name}.bn1", b), norm(f"{name}.bn2", b)
            if stage and not block:
                conv(f"{name}.conv3", a, b, 1, 1)
    if head == "plain":
        conv("net.7", widths[-1], 1)
        return shapes
    shapes["task_embedding.weight"] = (tasks, embed)
    conv("fusion_layer.0", widths[-1] + embed, hidden), conv("fusion_layer.3", hidden, 1)
    return shapes


def facts(shapes, dtype=FLOAT32):
    return {name: Fact(shape, dtype if shape else np.dtype(np.int64)) for name, shape in shapes.items()}


def arrays(shapes, dtype=FLOAT32, seed=0):
    """Random tensors; nothing is zero or one."""
    rng = np.random.default_rng(seed)
    return {
        name: (0.3 * rng.standard_normal(shape)).astype(dtype) if shape else np.array(rng.integers(1, 10**6))
        for name, shape in shapes.items()
    }


def count(shapes):
    return sum(map(math.prod, shapes.values()))


def announced(shapes, dtype=FLOAT32):
    """A source that knows names and shapes only: full sizes cost nothing."""
    return Source("announced", facts(shapes, dtype), lambda name: pytest.fail(f"{name} was read"))


def write(path, theirs):
    """A file of the format that the path says, by the formats' own libraries."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pth":
        torch = pytest.importorskip("torch")
        torch.save({name: torch_io.from_numpy(array) for name, array in theirs.items()}, path)
    else:
        library = pytest.importorskip("safetensors.numpy")
        library.save_file(theirs, path, metadata={"format": "pt"})
    return path


def read(path):
    source = open_source(path)
    return {source.prefix + name: source.read(name) for name in source.facts}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].shape, a[name].dtype, a[name].tobytes()) == (b[name].shape, b[name].dtype, b[name].tobytes()), (
            name
        )


TINY_VLA = {"dino": (24, 3, 40), "siglip": (12, 4, 20), "llm": (32, 3, 48), "rows": 392, "patch": 4, "patches": 4}
"""Towers and language model: width, depth, hidden width of the MLP."""
FULL_VLA = {"dino": (1024, 24, 4096), "siglip": (1152, 27, 4304), "llm": (4096, 32, 11008), "rows": 32064}


def openvla_shapes(dino, siglip, llm, rows, patch=14, patches=256, registers=4):
    """An OpenVLA-OFT release; the projector's hidden width is four times its input."""
    shapes = {}

    def linear(name, width_in, width_out, bias=True):
        shapes[f"{name}.weight"] = (width_out, width_in)
        if bias:
            shapes[f"{name}.bias"] = (width_out,)

    def norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    for name, (width, depth, mlp) in (("featurizer", dino), ("fused_featurizer", siglip)):
        tower = f"vision_backbone.{name}"
        if name == "featurizer":
            shapes[f"{tower}.cls_token"], shapes[f"{tower}.reg_token"] = (1, 1, width), (1, registers, width)
        shapes[f"{tower}.pos_embed"] = (1, patches, width)
        shapes[f"{tower}.patch_embed.proj.weight"] = (width, 3, patch, patch)
        shapes[f"{tower}.patch_embed.proj.bias"] = (width,)
        for i in range(depth):
            block = f"{tower}.blocks.{i}"
            norm(f"{block}.norm1", width), norm(f"{block}.norm2", width)
            linear(f"{block}.attn.qkv", width, 3 * width), linear(f"{block}.attn.proj", width, width)
            linear(f"{block}.mlp.fc1", width, mlp), linear(f"{block}.mlp.fc2", mlp, width)
            if name == "featurizer":
                shapes[f"{block}.ls1.scale_factor"] = shapes[f"{block}.ls2.scale_factor"] = (width,)
        norm(f"{tower}.norm", width)
        if name == "fused_featurizer":
            pool = f"{tower}.attn_pool"
            shapes[f"{pool}.latent"] = (1, 1, width)
            linear(f"{pool}.q", width, width), linear(f"{pool}.kv", width, 2 * width)
            linear(f"{pool}.proj", width, width), norm(f"{pool}.norm", width)
            linear(f"{pool}.mlp.fc1", width, mlp), linear(f"{pool}.mlp.fc2", mlp, width)
    vision, (width, depth, mlp) = dino[0] + siglip[0], llm
    linear("projector.fc1", vision, 4 * vision), linear("projector.fc2", 4 * vision, width)
    linear("projector.fc3", width, width)
    shapes["language_model.model.embed_tokens.weight"] = (rows, width)
    for i in range(depth):
        layer = f"language_model.model.layers.{i}"
        for name in "qkvo":
            linear(f"{layer}.self_attn.{name}_proj", width, width, bias=False)
        linear(f"{layer}.mlp.gate_proj", width, mlp, bias=False), linear(f"{layer}.mlp.up_proj", width, mlp, bias=False)
        linear(f"{layer}.mlp.down_proj", mlp, width, bias=False)
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
    shapes["language_model.model.norm.weight"] = (width,)
    linear("language_model.lm_head", width, rows, bias=False)
    return shapes


def state_shapes(numbers, width):
    """The projector of the robot's state, under the names it has here among the weights."""
    name = "proprio_projector"
    return {
        f"{name}.fc1.weight": (width, numbers),
        f"{name}.fc1.bias": (width,),
        f"{name}.fc2.weight": (width, width),
        f"{name}.fc2.bias": (width,),
    }


def openvla_config(**text):
    """``config.json`` of a release; ``text`` is what differs from LlamaConfig's defaults."""
    return {
        "architectures": ["OpenVLAForActionPrediction"],
        "model_type": "openvla",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "image_sizes": [224, 224],
        "image_resize_strategy": "resize-naive",
        "use_fused_vision_backbone": True,
        "pad_token_id": 32000,
        "pad_to_multiple_of": 64,
        "n_action_bins": 256,
        "output_projector_states": False,
        "torch_dtype": "bfloat16",
        "text_config": {"model_type": "llama", "pad_token_id": 32000, "vocab_size": 32064} | text,
    }


def openvla_folder(folder, theirs, config, shards=1):
    """A release on disk: shards with an index, or one file, and the other files with bytes of their own."""
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    if shards == 1:
        write(folder / "model.safetensors", theirs)
    else:
        home = {name: names[i % shards] for i, name in enumerate(theirs)}
        for file in names:
            write(folder / file, {name: theirs[name] for name in theirs if home[name] == file})
        total = sum(array.nbytes for array in theirs.values())
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": home})
        )
    (folder / "config.json").write_text(json.dumps(config, indent=1) + " \r\n")
    (folder / "tokenizer.model").write_bytes(bytes(range(256)))
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (folder / "modeling_prismatic.py").write_text("raise SystemExit('never run')\n")
    (folder / "dataset_statistics.json").write_text('{"libero_goal_no_noops": {}}')
    (folder / "lora_adapter").mkdir()
    (folder / "lora_adapter" / "adapter_config.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("")
    return folder
