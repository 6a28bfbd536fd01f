"""OpenVLA-OFT in torch, small, put together from transformers' own towers and Llama; and its wrong answers.

The weights come in under the release's names. A mistake is one of the names in ``MISTAKES``: the same network
with that one thing done as somebody might, each of which loads and runs without an error.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.bridge.layouts import openvla_config, openvla_shapes, state_shapes

SIZES = {"dino": (32, 3, 64), "siglip": (24, 4, 36), "llm": (40, 3, 56), "rows": 392, "patch": 4, "patches": 16}
HEADS, LLM_HEADS, VOCAB, PAD, STOP = 2, 5, 328, 327, 2
CONFIG = openvla_config(num_attention_heads=LLM_HEADS, vocab_size=392, pad_token_id=PAD) | {"pad_token_id": PAD}
STATISTICS = {"dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "siglip": ((0.5,) * 3, (0.5,) * 3)}
MISTAKES = (
    "causal mask",
    "tanh GELU in the towers",
    "tanh GELU in the projector",
    "final norm applied",
    "last block's features",
    "prefix tokens kept for patches",
    "towers swapped",
    "normalisations swapped",
    "slice one late",
    "slice one early",
    "rms eps 1e-5",
    "rope theta 1e4 times larger",
    "stop token",
    "placeholders not zeroed",
    "qkv rows interleaved by head",
)
MIXED_UP = (
    "pictures in the other order",
    "pictures interleaved",
    "state before the patches",
    "state behind the prompt",
    "state left out",
    "slice of one picture",
)
"""Mistakes with several pictures and the robot's state."""


def weights(seed=0, dtype=np.float32, state=0):
    """A release's tensors, nothing zero or one; embeddings are small, as they are in Llama, so that eps matters."""
    rng = np.random.default_rng(seed)

    def draw(name, shape):
        if "embed_tokens" in name:
            return 0.02 * rng.standard_normal(shape)
        if len(shape) == 1:
            middle = 1.0 if "norm" in name and name.endswith("weight") else 0.5 if "scale_factor" in name else 0.0
            return middle + 0.2 * rng.standard_normal(shape)
        if len(shape) == 3:
            return 0.5 * rng.standard_normal(shape)
        gain = 1.5 if "mlp.fc1" in name else 2.0 if "mlp.fc2" in name else 1.0  # the two GELUs are far apart there
        return gain * rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))

    shapes = openvla_shapes(**SIZES) | (state_shapes(state, SIZES["llm"][0]) if state else {})
    return {name: draw(name, shape).astype(dtype) for name, shape in shapes.items()}


class Reference:
    """The policy of ``SIZES`` in torch."""

    def __init__(self, release, mistake=None):
        self.torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        self.mistake = mistake
        state = {name: self.torch.tensor(np.asarray(array, np.float32)) for name, array in release.items()}
        act = "gelu_pytorch_tanh" if mistake == "tanh GELU in the towers" else "gelu"
        self.dino = self._dino(transformers, act, _below(state, "vision_backbone.featurizer."))
        self.siglip = self._siglip(transformers, act, _below(state, "vision_backbone.fused_featurizer."))
        self.fc = [(state[f"projector.fc{k}.weight"], state[f"projector.fc{k}.bias"]) for k in (1, 2, 3)]
        self.llm = self._llama(transformers, _below(state, "language_model."))
        self.state_fc = _below(state, "proprio_projector.")

    def _dino(self, transformers, act, state):
        width, depth, mlp = SIZES["dino"]
        config = transformers.Dinov2WithRegistersConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=HEADS,
            mlp_ratio=mlp // width,
            hidden_act=act,
            layer_norm_eps=1e-6,
            image_size=16,
            patch_size=4,
            num_register_tokens=4,
        )
        model = transformers.Dinov2WithRegistersModel(config).eval()
        zero = self.torch.zeros(1, 1, width)
        found = {
            "embeddings.cls_token": state["cls_token"],
            "embeddings.register_tokens": state["reg_token"],
            "embeddings.mask_token": zero[0],
            "embeddings.position_embeddings": self.torch.cat([zero, state["pos_embed"]], 1),  # patches only
            **_linear(state, "patch_embed.proj", "embeddings.patch_embeddings.projection"),
            **_linear(state, "norm", "layernorm"),
        }
        for i in range(depth):
            ours, block = f"encoder.layer.{i}", f"blocks.{i}"
            found |= self._attention(state, f"{block}.attn", f"{ours}.attention", "o_proj")
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found |= _linear(state, f"{block}.{name}", f"{ours}.{name}")
            for k in (1, 2):
                found[f"{ours}.layer_scale{k}.lambda1"] = state[f"{block}.ls{k}.scale_factor"]
        model.load_state_dict(found, strict=True)
        return model

    def _siglip(self, transformers, act, state):
        width, depth, mlp = SIZES["siglip"]
        config = transformers.SiglipVisionConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=HEADS,
            intermediate_size=mlp,
            hidden_act=act,
            layer_norm_eps=1e-6,
            image_size=16,
            patch_size=4,
            vision_use_head=False,
        )
        model = transformers.SiglipVisionModel(config).eval()
        found = {
            "embeddings.position_embedding.weight": state["pos_embed"][0],
            **_linear(state, "patch_embed.proj", "embeddings.patch_embedding"),
            **_linear(state, "norm", "post_layernorm"),
        }
        for i in range(depth):
            ours, block = f"encoder.layers.{i}", f"blocks.{i}"
            found |= self._attention(state, f"{block}.attn", f"{ours}.self_attn", "out_proj")
            for name, theirs in (("norm1", "layer_norm1"), ("norm2", "layer_norm2")):
                found |= _linear(state, f"{block}.{name}", f"{ours}.{theirs}")
            for name in ("mlp.fc1", "mlp.fc2"):
                found |= _linear(state, f"{block}.{name}", f"{ours}.{name}")
        model.load_state_dict(found, strict=True)
        return model

    def _attention(self, state, name, ours, out):
        found = _linear(state, f"{name}.proj", f"{ours}.{out}")
        for kind in ("weight", "bias"):
            fused = state[f"{name}.qkv.{kind}"]
            if self.mistake == "qkv rows interleaved by head":
                parts = fused.reshape(HEADS, 3, -1, *fused.shape[1:]).transpose(0, 1).flatten(1, 2)
            else:
                parts = fused.reshape(3, -1, *fused.shape[1:])
            found |= {f"{ours}.{part}_proj.{kind}": parts[i].contiguous() for i, part in enumerate("qkv")}
        return found

    def _llama(self, transformers, state):
        width, depth, mlp = SIZES["llm"]
        theta = 1e8 if self.mistake == "rope theta 1e4 times larger" else 1e4
        config = transformers.LlamaConfig(
            vocab_size=SIZES["rows"],
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=depth,
            num_attention_heads=LLM_HEADS,
            rms_norm_eps=1e-5 if self.mistake == "rms eps 1e-5" else 1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
        )
        config.is_causal = self.mistake == "causal mask"
        model = transformers.LlamaForCausalLM(config).eval()
        model.load_state_dict(state, strict=True)
        return model

    def tower(self, name, frame):
        """Features of one tower, (B, 16, width), from a frame in [-1, 1]."""
        other = {"dino": "siglip", "siglip": "dino"}[name]
        mean, std = STATISTICS[other if self.mistake == "normalisations swapped" else name]
        pixels = ((np.asarray(frame, np.float64) + 1) / 2 - mean) / std
        pixels = self.torch.tensor(pixels.astype(np.float32)).permute(0, 3, 1, 2)
        model, prefix = getattr(self, name), 5 if name == "dino" else 0
        with self.torch.no_grad():
            hidden = model(pixels, output_hidden_states=True).hidden_states
            out = hidden[-1] if self.mistake == "last block's features" else hidden[-2]
            if self.mistake == "final norm applied":
                out = (model.layernorm if name == "dino" else model.post_layernorm)(out)
        return out[:, :16] if self.mistake == "prefix tokens kept for patches" else out[:, prefix:]

    def features(self, frame):
        names = ("siglip", "dino") if self.mistake == "towers swapped" else ("dino", "siglip")
        return self.torch.cat([self.tower(name, frame) for name in names], -1)

    def project(self, feature):
        functional = self.torch.nn.functional
        form = "tanh" if self.mistake == "tanh GELU in the projector" else "none"
        for k, (weight, bias) in enumerate(self.fc):
            feature = functional.linear(functional.gelu(feature, approximate=form) if k else feature, weight, bias)
        return feature

    def see(self, frame):
        """Tokens (1, 16 V, width) of the V pictures (V, 16, 16, 3) that the policy sees at once."""
        order = slice(None, None, -1) if self.mistake == "pictures in the other order" else slice(None)
        token = self.project(self.features(frame[order]))
        if self.mistake == "pictures interleaved":
            token = token.transpose(0, 1)
        return token.reshape(1, -1, token.shape[-1])

    def tell(self, state):
        """Token (1, 1, width) of the state (R,)."""
        functional, fc = self.torch.nn.functional, self.state_fc
        hidden = functional.linear(self.torch.tensor(state), fc["fc1.weight"], fc["fc1.bias"])
        hidden = functional.gelu(hidden, approximate="tanh" if self.mistake == "tanh GELU for the state" else "none")
        return functional.linear(hidden, fc["fc2.weight"], fc["fc2.bias"]).reshape(1, 1, -1)

    def slots(self, frame, ids, recipe="rlinf", state=None):
        """Logits (56, 256) of pictures (V, 16, 16, 3), a prompt without padding, and the robot's state or None."""
        torch, embed = self.torch, self.llm.model.embed_tokens
        with torch.no_grad():
            text, patches = embed(torch.tensor([ids])), self.see(frame)
            told = [] if state is None or self.mistake == "state left out" else [self.tell(state)]
            empty = torch.zeros(1, 56, text.shape[-1])
            if self.mistake == "placeholders not zeroed":
                empty = embed(torch.ones(1, 56, dtype=torch.long))
            parts = [text[:, :1], patches, *told, text[:, 1:], empty]
            if self.mistake == "state before the patches":
                parts[1:3] = [*told, patches]
            if self.mistake == "state behind the prompt":
                parts[2:4] = [text[:, 1:], *told]
            if (recipe == "oft") != (self.mistake == "stop token"):
                parts.append(embed(torch.tensor([[STOP]])))
            logits = self.llm(inputs_embeds=torch.cat(parts, 1)).logits[0]
        seen = 16 if self.mistake == "slice of one picture" else patches.shape[1]
        first = seen + len(told) + len(ids) - 1 + {"slice one late": 1, "slice one early": -1}.get(self.mistake, 0)
        return logits[first : first + 56, VOCAB - 256 : VOCAB].numpy()


def _below(state, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _linear(state, theirs, ours):
    return {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
