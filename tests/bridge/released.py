"""OpenVLA-OFT as a torch module with the release's own names, small: what PEFT wraps, and a second reference."""

from __future__ import annotations

import pytest

from tests.bridge.openvla_reference import HEADS, LLM_HEADS, SIZES, STATISTICS, VOCAB

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
nn, functional = torch.nn, torch.nn.functional


def empty(*shape):
    return nn.Parameter(torch.empty(shape))


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(functional.gelu(self.fc1(x)))


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale_factor = empty(width)

    def forward(self, x):
        return x * self.scale_factor


class Block(nn.Module):
    def __init__(self, width, hidden, scaled):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attn, self.mlp = Attention(width), Mlp(width, hidden)
        self.ls1, self.ls2 = (Scale(width), Scale(width)) if scaled else (nn.Identity(), nn.Identity())

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Pool(nn.Module):
    """Never run."""

    def __init__(self, width, hidden):
        super().__init__()
        self.latent, self.q, self.kv = empty(1, 1, width), nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj, self.norm, self.mlp = nn.Linear(width, width), nn.LayerNorm(width), Mlp(width, hidden)


class Tower(nn.Module):
    def __init__(self, width, depth, hidden, is_dino):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, SIZES["patch"], SIZES["patch"])
        self.pos_embed = empty(1, SIZES["patches"], width)
        if is_dino:
            self.cls_token, self.reg_token = empty(1, 1, width), empty(1, 4, width)
        else:
            self.attn_pool = Pool(width, hidden)
        self.blocks = nn.ModuleList(Block(width, hidden, is_dino) for _ in range(depth))
        self.norm, self.prefix = nn.LayerNorm(width, 1e-6), 5 if is_dino else 0

    def forward(self, pixels):
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2) + self.pos_embed
        if self.prefix:
            x = torch.cat([self.cls_token, self.reg_token, x], 1)
        for block in self.blocks[:-1]:
            x = block(x)
        return x[:, self.prefix :]


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision_backbone = nn.Module()
        self.vision_backbone.featurizer = Tower(*SIZES["dino"], True)
        self.vision_backbone.fused_featurizer = Tower(*SIZES["siglip"], False)
        vision, (width, depth, hidden) = SIZES["dino"][0] + SIZES["siglip"][0], SIZES["llm"]
        self.projector = nn.Module()
        self.projector.fc1, self.projector.fc2 = nn.Linear(vision, 4 * vision), nn.Linear(4 * vision, width)
        self.projector.fc3 = nn.Linear(width, width)
        config = transformers.LlamaConfig(
            vocab_size=SIZES["rows"],
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=depth,
            num_attention_heads=LLM_HEADS,
            rms_norm_eps=1e-6,
        )
        config.is_causal = False
        self.language_model = transformers.LlamaForCausalLM(config)

    def forward(self, frame, ids):
        pixels = [torch.tensor((frame + 1) / 2 - mean) / torch.tensor(std) for mean, std in STATISTICS.values()]
        dino, siglip = (x.permute(0, 3, 1, 2).float() for x in pixels)
        eye, project = self.vision_backbone, self.projector
        x = torch.cat([eye.featurizer(dino), eye.fused_featurizer(siglip)], -1)
        x = project.fc3(functional.gelu(project.fc2(functional.gelu(project.fc1(x)))))
        text = self.language_model.model.embed_tokens(torch.tensor([ids]))
        x = torch.cat([text[:, :1], x, text[:, 1:], torch.zeros(1, 56, x.shape[-1])], 1)
        first = SIZES["patches"] + len(ids) - 1
        logits = self.language_model(inputs_embeds=x).logits
        return logits[0, first : first + 56, VOCAB - 256 : VOCAB]


def build(release):
    """The module with the tensors of ``release``, every name matched; ``module(frame, ids)`` gives (56, 256) logits.

    ``frame`` is (1, 16, 16, 3) in [-1, 1]; the recipe is ``rlinf``.
    """
    module = Policy().eval()
    module.load_state_dict({name: torch.tensor(array) for name, array in release.items()}, strict=True)
    return module


def slots(module, frame, ids):
    """Its logits as an array."""
    with torch.no_grad():
        return module(frame, ids).numpy()
