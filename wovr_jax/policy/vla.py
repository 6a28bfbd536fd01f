"""OpenVLA-OFT with discrete tokens and parallel decoding: frame and instruction in, one chunk out.

The sequence of the language model, P patches of all pictures, prompt of L ids, chunk of T x A slots::

    [BOS][P patches]([state])[padding][prompt rest][T*A zero slots]([stop])
      0   1 .. P                      .. P + L - 1  P + L ..          'oft' only

Slots carry a zero embedding; they differ only by their rotary position. Logits of slot ``k`` are read one
position **earlier**, so the first is read at the last prompt token. Slot order is step-major. The fused
projector takes DINOv2's and SigLIP's features concatenated on channels, DINOv2 first. Several pictures follow one
another in the order they are given; the robot's state, where a policy has one, is one token behind them.

Two recipes differ by one token: ``oft`` appends the stop token (OFT, SimpleVLA-RL, WMPO, and the SFT
checkpoints), ``rlinf`` does not (RLinf's and WoVR's configs). Since attention is bidirectional, the stop
token changes the logits. Padding never does: padded keys are masked and positions count real tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from wovr_jax.core.config import Count, DType, Faults, Natural, checked
from wovr_jax.core.pixels import read_state, split_views
from wovr_jax.nn.functional import Pure, narrow
from wovr_jax.nn.lora import LoRAConfig
from wovr_jax.policy import actions
from wovr_jax.policy.actions import BINS, Codec
from wovr_jax.policy.backbones import Llama, LlamaConfig, Tower, TowerConfig
from wovr_jax.policy.tokenizer import Tokenizer
from wovr_jax.types import ACTION_DIM, Array, Params

Form = Literal["oft", "rlinf"]
PARTS = ("dino", "siglip", "projector", "llm")
"""Of a policy without the robot's state, as its parameters are named at the top."""

AXES = (
    ("llm/embed/embedding", ("vocab", "embed")),
    ("llm/head/kernel", ("embed", "vocab")),
    ("llm/blocks/[qkv]/kernel", ("layers", "embed", "heads")),
    ("llm/blocks/o/kernel", ("layers", "heads", "embed")),
    ("llm/blocks/gate/kernel", ("layers", "embed", "mlp")),
    ("llm/blocks/up/kernel", ("layers", "embed", "mlp")),
    ("llm/blocks/down/kernel", ("layers", "mlp", "embed")),
    ("blocks/qkv/kernel", ("layers", "embed", "heads")),
    ("blocks/proj/kernel", ("layers", "heads", "embed")),
    ("blocks/fc1/kernel", ("layers", "embed", "mlp")),
    ("blocks/fc2/kernel", ("layers", "mlp", "embed")),
    ("projector/fc1/kernel", ("embed", "mlp")),
    ("projector/fc2/kernel", ("mlp", "embed")),
    ("projector/fc3/kernel", ("embed", None)),
    ("blocks/*/lora_a", ("layers", "embed", None)),
    ("blocks/*/lora_b", ("layers", None, "embed")),
)
"""What the axes of the parameters mean (``sharding``)."""


@checked
@dataclasses.dataclass(frozen=True)
class VLAConfig:
    """The policy network.

    Attributes:
      dino, siglip: the two vision towers; equal numbers of patches.
      llm: the language model.
      vocab_size: real token ids; action ids are the last 256 of them, rows after them are padding.
      chunk, action_dim: steps T of a chunk and dimensions A of an action.
      recipe: ``"oft"`` (stop token behind the slots) or ``"rlinf"`` (none).
      pad, stop: ids of padding and of the stop token.
      images: pictures V that the policy sees at once, such as a scene and a wrist camera.
      proprio: numbers R of the robot's state, 0 where the policy does not take it.
    """

    dino: TowerConfig
    siglip: TowerConfig
    llm: LlamaConfig
    vocab_size: Count
    chunk: Count = 8
    action_dim: Count = ACTION_DIM
    recipe: Form = "rlinf"
    pad: Natural = 32000
    stop: Natural = 2
    images: Count = 1
    proprio: Natural = 0

    def faults(self) -> Faults:
        """Yields towers of different grids, and ids that the language model has no row for."""
        if self.dino.patches != self.siglip.patches:
            # Their features are joined on channels, patch by patch.
            yield "siglip", f"expected equally many patches as dino, {self.dino.patches}, got {self.siglip.patches}"
        if not BINS < self.vocab_size <= self.llm.rows:
            yield "vocab_size", f"expected above {BINS} and at most llm.rows={self.llm.rows}, got {self.vocab_size}"
        for name in ("pad", "stop"):
            if getattr(self, name) >= self.llm.rows:
                yield name, f"expected an id below llm.rows={self.llm.rows}, got {getattr(self, name)}"

    @classmethod
    def openvla_7b(cls, recipe: Form = "rlinf", dtype: DType = "bfloat16") -> VLAConfig:
        """The released size: 7,498,156,704 parameters. The release file holds 43,080,480 more that are never used."""
        towers = TowerConfig.dinov2_large(dtype), TowerConfig.siglip_so400m(dtype)
        return cls(*towers, LlamaConfig.llama2_7b(dtype), vocab_size=32000, recipe=recipe)

    @classmethod
    def tabletop(cls, recipe: Form = "rlinf") -> VLAConfig:
        """For the embedded table: 32-pixel frames, 16 patches, the words of ``Tokenizer.tabletop()``."""
        towers = TowerConfig.tabletop_dinov2(), TowerConfig.tabletop_siglip()
        return cls._from_words(Tokenizer.tabletop(), *towers, (96, 4, 4, 256), recipe)

    @classmethod
    def relay(cls, recipe: Form = "rlinf") -> VLAConfig:
        """The network of :meth:`tabletop` with the words of ``Tokenizer.relay()``."""
        towers = TowerConfig.tabletop_dinov2(), TowerConfig.tabletop_siglip()
        return cls._from_words(Tokenizer.relay(), *towers, (96, 4, 4, 256), recipe)

    @classmethod
    def libero_small(cls, recipe: Form = "rlinf") -> VLAConfig:
        """For a run on LIBERO from nothing: 64-pixel frames, 64 patches, the words of ``Tokenizer.libero()``."""
        towers = TowerConfig.libero_dinov2(), TowerConfig.libero_siglip()
        return cls._from_words(Tokenizer.libero(), *towers, (160, 5, 5, 448), recipe)

    @classmethod
    def fake(cls, recipe: Form = "rlinf") -> VLAConfig:
        """Tiny, for tests; 16-pixel frames, and the real tokenizer."""
        towers = TowerConfig.fake(5, True), TowerConfig.fake()
        return cls._from_words(Tokenizer.tabletop(), *towers, (16, 3, 2, 24), recipe)

    @classmethod
    def _from_words(
        cls, words: Tokenizer, dino: TowerConfig, siglip: TowerConfig, llm: tuple[int, int, int, int], recipe: Form
    ) -> VLAConfig:
        """A small policy of the package's own words; ``llm`` is width, depth, heads and hidden width."""
        # As in the releases, 64 rows stand behind the real ids. A short sequence wants slower rotations.
        language = LlamaConfig(words.vocab_size + 64, *llm, rope_theta=100.0)
        return cls(dino, siglip, language, words.vocab_size, recipe=recipe, pad=words.pad)

    @property
    def slots(self) -> int:
        """Action slots of a chunk, T * A."""
        return self.chunk * self.action_dim


class Projector(nnx.Module):
    """Linear layers ``fc1``, ``fc2``, ... with the erf GELU between, from one width to the next."""

    def __init__(self, *widths: int, dtype: str, rngs: nnx.Rngs):
        self.depth = len(widths) - 1
        for i, (width_in, width_out) in enumerate(zip(widths, widths[1:]), start=1):
            setattr(self, f"fc{i}", nnx.Linear(width_in, width_out, dtype=jnp.dtype(dtype), rngs=rngs))

    @jax.named_scope("projector")
    def __call__(self, x: Array) -> Array:
        """Maps the last axis from the first width to the last."""
        for i in range(1, self.depth):
            x = jax.nn.gelu(getattr(self, f"fc{i}")(x), approximate=False)
        return getattr(self, f"fc{self.depth}")(x)


def for_use(cfg: VLAConfig, islands: tuple[str, ...] = ("*norm*",)) -> Callable[[Params], Params]:
    """Makes of the policy's weights what is best held where nothing trains them; see ``nn.functional.narrow``."""
    # What joins the parts computes in the language model's dtype.
    dtypes = {"dino": cfg.dino.dtype, "siglip": cfg.siglip.dtype}
    return lambda params: {name: narrow(x, dtypes.get(name, cfg.llm.dtype), islands) for name, x in params.items()}


class VLA(nnx.Module):
    """The policy: frame and prompt to logits over the 256 action ids of every slot."""

    def __init__(self, cfg: VLAConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        # Names are paths of parameters, in checkpoints and in tables of weights: not to be changed.
        self.dino = Tower(cfg.dino, rngs=rngs)
        self.siglip = Tower(cfg.siglip, rngs=rngs)
        features, width, dtype = cfg.dino.width + cfg.siglip.width, cfg.llm.width, cfg.llm.dtype
        self.projector = Projector(features, 4 * features, width, width, dtype=dtype, rngs=rngs)
        self.llm = Llama(cfg.llm, rngs=rngs)
        # The robot's state becomes one token.
        self.proprio = Projector(cfg.proprio, width, width, dtype=dtype, rngs=rngs) if cfg.proprio else None

    def __call__(self, frame_BHWC: Array, prompt_BL: Array, state_BR: Array | None = None) -> Array:
        """Returns logits (B, T, A, 256), float32, in slice coordinates (index 0 is the largest action).

        Args:
          frame_BHWC: float32 in [-1, 1], any size; (B, V, H, W, 3) for a policy of several pictures, or a mosaic of
            them (``core.pixels``), which shows the state too.
          prompt_BL: int32, the begin id in column 0; pads anywhere after it.
          state_BR: float32 in [-1, 1] (``data.senses`` scales it), for a policy that takes it; None beside a mosaic.

        Raises:
          ValueError: inputs that are not those of the config.
          AssertionError: inputs of another dtype, or a prompt without its batch axis.
        """
        # Bytes of 0 to 255 would run, and mean nothing: frames come as floats, from ``processing.frames`` or the world.
        chex.assert_type(frame_BHWC, float, custom_message="policy: frame_BHWC, in [-1, 1]")
        images, proprio = self.cfg.images, self.cfg.proprio if state_BR is None else 0
        if frame_BHWC.ndim == 4 and (images > 1 or proprio):
            _, height, width, _ = frame_BHWC.shape
            if width < images * height or (width > images * height) != bool(proprio):
                what = f"(B, {images}, H, W, 3), or a mosaic of so many squares and the robot's {proprio} numbers"
                raise ValueError(f"policy of {images} pictures: expected frames {what}, got shape {frame_BHWC.shape}")
            state_BR = read_state(frame_BHWC, images, proprio) if proprio else state_BR
            frame_BHWC = split_views(frame_BHWC, images)
            frame_BHWC = frame_BHWC if images > 1 else frame_BHWC[:, 0]
        return self.from_features(self.features(frame_BHWC), prompt_BL, state_BR)

    def features(self, frame_BHWC: Array) -> Array:
        """Returns both towers' patch features joined on channels, (B, P, D1 + D2); constant while towers are frozen."""
        many, rank = self.cfg.images > 1, frame_BHWC.ndim
        if rank != 4 + many or (many and frame_BHWC.shape[1] != self.cfg.images):
            form = f"(B, {self.cfg.images}, H, W, 3)" if many else "(B, H, W, 3)"
            words = f"policy of {self.cfg.images} pictures: expected frames {form}"
            raise ValueError(f"{words}, got shape {frame_BHWC.shape}")
        chex.assert_axis_dimension(frame_BHWC, -1, 3, custom_message="policy: colours of frame_BHWC")
        # (B, V, H, W, 3) -> (B * V, H, W, 3): the towers see one picture at a time.
        view_BHWC = frame_BHWC.reshape(-1, *frame_BHWC.shape[-3:])
        with jax.named_scope("dino"):
            dino_BPD = self.dino(view_BHWC)
        with jax.named_scope("siglip"):
            siglip_BPD = self.siglip(view_BHWC)
        feature_BPD = jnp.concatenate([dino_BPD, siglip_BPD], axis=-1)
        # (B * V, P / V, D1 + D2) -> (B, P, D1 + D2): the pictures' patches one behind another
        return feature_BPD.reshape(frame_BHWC.shape[0], -1, feature_BPD.shape[-1])

    def from_features(self, feature_BPD: Array, prompt_BL: Array, state_BR: Array | None = None) -> Array:
        """Returns the logits of a call, from tower features."""
        chex.assert_rank([feature_BPD, prompt_BL], [3, 2], custom_message="policy: feature_BPD, prompt_BL")
        chex.assert_type(prompt_BL, int, custom_message="policy: prompt_BL")
        state = None if state_BR is None else state_BR.shape[-1]
        if state != (self.cfg.proprio or None):
            raise ValueError(f"policy: expected {self.cfg.proprio or None} numbers of the robot's state, got {state}")
        patch_BPD = self.projector(feature_BPD)
        if self.proprio is not None and state_BR is not None:
            # (B, P, D) -> (B, P + 1, D): the state is one more patch, the last.
            patch_BPD = jnp.concatenate([patch_BPD, self.proprio(state_BR)[:, None]], axis=1)
        x_BLD, mask_BL = self._sequence(patch_BPD, flush_right(prompt_BL, self.cfg.pad))
        # A slot's logits stand one position before it, as next-token prediction would have them; so the first slot is
        # read where the prompt ends.
        first = patch_BPD.shape[1] + prompt_BL.shape[1] - 1
        with jax.named_scope("llm"):
            hidden_BLD = self.llm(x_BLD, mask_BL)[:, first : first + self.cfg.slots]
            logits = self.llm.logits(hidden_BLD, self.cfg.vocab_size - BINS, BINS)
        # (B, T * A, 256) -> (B, T, A, 256): slots are step-major
        return logits.reshape(-1, self.cfg.chunk, self.cfg.action_dim, BINS)

    def _sequence(self, patch_BPD: Array, prompt_BL: Array) -> tuple[Array, Array]:
        """Returns embeddings (B, L', D) and padding mask (B, L') of the whole sequence."""
        batch, patches, width = patch_BPD.shape
        text_BLD = self.llm.embed(prompt_BL)
        # The slots say nothing: with parallel decoding no action is fed back, and only the position tells them apart.
        slot_BLD = jnp.zeros((batch, self.cfg.slots, width), text_BLD.dtype)
        # The pictures stand behind the begin id, as OpenVLA puts them, and before every word.
        parts = [text_BLD[:, :1], patch_BPD, text_BLD[:, 1:], slot_BLD]
        if self.cfg.recipe == "oft":
            parts.append(self.llm.embed(jnp.full((batch, 1), self.cfg.stop)))
        x_BLD = jnp.concatenate(parts, axis=1)
        # Patches, slots and the stop token are always seen; of the prompt what is no padding.
        real_BL = prompt_BL != self.cfg.pad
        ones = jnp.ones((batch, patches), bool)
        tail = jnp.ones((batch, x_BLD.shape[1] - patches - prompt_BL.shape[1]), bool)
        return x_BLD, jnp.concatenate([real_BL[:, :1], ones, real_BL[:, 1:], tail], axis=1)


def flush_right(prompt_BL: Array, pad: int) -> Array:
    """Moves pads to directly after column 0 and keeps the order of the rest, so slots follow the prompt."""
    rest = prompt_BL[:, 1:]
    # A stable sort by "is no pad" (False before True) moves the pads to the front and leaves the order of the others.
    order = jnp.argsort(rest != pad, axis=1, stable=True)
    return jnp.concatenate([prompt_BL[:, :1], jnp.take_along_axis(rest, order, axis=1)], axis=1)


LINEAR = ("dino/blocks/*", "siglip/blocks/*", "projector/*", "llm/blocks/*")
"""The layers of a ``VLA`` that both stacks adapt."""


class PolicyLoRA(LoRAConfig):
    """Adapters of a policy, by the names of its layers."""

    @classmethod
    def oft(cls, **changes: Any) -> PolicyLoRA:
        """Adapters as openvla-oft trains them: every linear layer but the head, and an alpha of at most 16."""
        options: dict[str, Any] = {"alpha": min(changes.get("rank", cls.rank), 16.0), "targets": LINEAR}
        return cls(**{**options, "init": "gaussian", **changes})

    @classmethod
    def rlinf(cls, **changes: Any) -> PolicyLoRA:
        """Adapters as RLinf trains them: also of the head and both patch embeddings, and a scale of 1."""
        options: dict[str, Any] = {"targets": (*LINEAR, "*/patch_embed", "llm/head")}
        return cls(**{**options, "init": "gaussian", **changes})


@functools.cache
def network(cfg: VLAConfig) -> Pure:
    """Returns the policy as a pure function of its parameters; one object a config, so its programs are reused."""
    return Pure(lambda rngs: VLA(cfg, rngs=rngs))


def policy(
    cfg: VLAConfig, params: Params, codec: Codec, temperature: float = 1.0, net: Pure | None = None
) -> Callable[..., tuple[Array, Array, Array]]:
    """Returns ``act(frame_BHWC, prompt_BL, key_B, state_BR=None) -> (token_BTA, logp_BTA, action_BTA)``.

    Tokens are sampled at ``temperature``, which the log-probabilities share; at ``temperature <= 0`` the
    likeliest token is taken and the log-probabilities are those of temperature 1. ``net`` takes ``params`` in the place
    of ``network(cfg)``, with adapters in it for example.
    """
    net = net or network(cfg)
    # The log-probability kept with a token is that of the distribution it was drawn from, or PPO's ratio is wrong.
    scale = temperature if temperature > 0.0 else 1.0

    def act(
        frame_BHWC: Array, prompt_BL: Array, key_B: Array, state_BR: Array | None = None
    ) -> tuple[Array, Array, Array]:
        chex.assert_axis_dimension(key_B, 0, len(frame_BHWC), custom_message="policy: key_B, one key a trajectory")
        logits = net(params, frame_BHWC, prompt_BL, state_BR)
        token = actions.sample(logits, key_B, scale) if temperature > 0.0 else actions.greedy(logits)
        # Sampled here, on the device: the whole rollout is one program.
        return token, actions.log_prob(logits, token, scale), codec.decode(token)

    return act
