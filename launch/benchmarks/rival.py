"""Wan's transformer and VAE as diffusers has them, compiled by torch, on the shapes of a recipe.

What the world model's parts are held against in the same sitting: random weights in the same dtype, the same tokens,
as many context tokens as a window has actions, a noise level for each token. diffusers makes keys and values of the
context in every step, which the sampler here makes once.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

from wovr_jax.world.model import WorldConfig


def find_missing(dry: bool) -> str:
    """Returns what is not there for this, empty where nothing is missing."""
    lacking = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    if lacking:
        return f"{' and '.join(lacking)} cannot be imported"
    import torch  # pyright: ignore[reportMissingImports]

    return "" if dry or torch.cuda.is_available() else "torch sees no CUDA device"


def measure(
    cfg: WorldConfig, side: int, batch: int, *, repeats: int, seconds: float, left: Callable[[], float], dry: bool
) -> Iterator[dict[str, Any]]:
    """Yields a row for the transformer's step and the VAE's encode and decode, each as soon as it is measured.

    Args:
      cfg: sizes.
      side: pixels of a frame's side.
      batch: rows at once.
      repeats, seconds: see ``timing.repeat``.
      left: seconds that are left; what would begin without any is left out.
      dry: on a CPU, and traced without the compiler's minutes.
    """
    import torch  # pyright: ignore[reportMissingImports]

    device = "cpu" if dry else "cuda"
    torch.manual_seed(0)
    for name, dtype, build in (
        ("step", cfg.dit.dtype, _build_step),
        ("encode", cfg.vae.dtype, _build_encode),
        ("decode", cfg.vae.dtype, _build_decode),
    ):
        row: dict[str, Any] = {"part": f"diffusers {name}", "batch": batch}
        try:
            if left() <= 0:
                raise TimeoutError("no time was left")
            with torch.no_grad():
                call = build(cfg, side, batch, device, getattr(torch, dtype))
                compiled = torch.compile(call, backend="eager" if dry else "inductor")
                row |= {"compiled": not dry, "dtype": dtype} | _time(compiled, device, repeats, seconds)
        except Exception as error:  # whatever the compiler raises
            row["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        yield row
        if not dry:
            torch.cuda.empty_cache()


def _time(call: Callable[[], Any], device: str, repeats: int, seconds: float) -> dict[str, Any]:
    """Returns compile time, and median, low and high of the seconds of a call."""
    import torch  # pyright: ignore[reportMissingImports]

    from launch.benchmarks.timing import spread

    def once() -> float:
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()  # torch returns before the work is done
        return time.perf_counter() - begin

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    compile_s, _ = once(), once()
    times = [once()]
    while len(times) < repeats and sum(times) < seconds:
        times.append(once())
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {"compile_s": compile_s, "seconds": spread(times), "repeats": len(times), "bytes": peak}


def _build_step(cfg: WorldConfig, side: int, batch: int, device: str, dtype: Any) -> Callable[[], Any]:
    """Returns one call of the transformer on a window of latents."""
    import torch  # pyright: ignore[reportMissingImports]
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel  # pyright: ignore[reportMissingImports]

    dit = cfg.dit
    sizes: dict[str, Any] = {
        "patch_size": (1, dit.patch, dit.patch),
        "num_attention_heads": dit.heads,
        "attention_head_dim": dit.head_dim,
        "in_channels": dit.channels,
        "out_channels": dit.channels,
        "text_dim": dit.dim,
        "freq_dim": dit.freq_dim,
        "ffn_dim": dit.ffn,
        "num_layers": dit.layers,
        "rope_max_seq_len": 64,
    }
    net = _make(lambda: WanTransformer3DModel(**sizes), device, dtype)
    # Actions come as vectors of the network's width; there is no text to be read.
    net.condition_embedder.text_embedder = torch.nn.Identity()
    small, frames = side // cfg.vae.space, cfg.latents
    latent = torch.randn(batch, dit.channels, frames, small, small, device=device, dtype=dtype)
    level = torch.full((batch, frames * (small // dit.patch) ** 2), 500.0, device=device)
    context = torch.randn(batch, cfg.frames, dit.dim, device=device, dtype=dtype)
    return lambda: net(latent, level, context, return_dict=False)[0]


def _build_encode(cfg: WorldConfig, side: int, batch: int, device: str, dtype: Any) -> Callable[[], Any]:
    """Returns one encoding of anchor and memory."""
    import torch  # pyright: ignore[reportMissingImports]

    vae = _build_vae(cfg, device, dtype)
    frames = torch.rand(batch, 3, 1 + cfg.slots, side, side, device=device, dtype=dtype) * 2 - 1
    return lambda: vae.encode(frames).latent_dist.mean


def _build_decode(cfg: WorldConfig, side: int, batch: int, device: str, dtype: Any) -> Callable[[], Any]:
    """Returns one decoding of the latents of a window."""
    import torch  # pyright: ignore[reportMissingImports]

    vae, small = _build_vae(cfg, device, dtype), side // cfg.vae.space
    latent = torch.randn(batch, cfg.vae.z_dim, cfg.latents, small, small, device=device, dtype=dtype)
    return lambda: vae.decode(latent).sample


def _build_vae(cfg: WorldConfig, device: str, dtype: Any) -> Any:
    from diffusers import AutoencoderKLWan  # pyright: ignore[reportMissingImports]

    vae = cfg.vae
    sizes: dict[str, Any] = {
        "base_dim": vae.encoder_dim,
        "decoder_base_dim": vae.decoder_dim,
        "z_dim": vae.z_dim,
        "dim_mult": list(vae.dim_mult),
        "num_res_blocks": vae.res_blocks,
        "attn_scales": [],
        "temperal_downsample": list(vae.temporal_down),  # as diffusers spells it
        "is_residual": True,
        "in_channels": 3 * vae.patch**2,
        "out_channels": 3 * vae.patch**2,
        "patch_size": vae.patch,
        "latents_mean": [0.0] * vae.z_dim,
        "latents_std": [1.0] * vae.z_dim,
    }
    return _make(lambda: AutoencoderKLWan(**sizes), device, dtype)


def _make(build: Callable[[], Any], device: str, dtype: Any) -> Any:
    """Returns a network with random weights, made where and as it is used: five billion of them on a host take long."""
    import torch  # pyright: ignore[reportMissingImports]

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            net = build()
    finally:
        torch.set_default_dtype(before)
    # What diffusers keeps in float32 when it reads weights: norms, times and tables of modulation.
    kept = getattr(net, "_keep_in_fp32_modules", None) or ()
    for name, parameter in net.named_parameters():
        if any(part in name for part in kept):
            parameter.data = parameter.data.float()
    return net.eval()
