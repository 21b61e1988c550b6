"""The inverted residual RWKV block, IR-RWKV (Jiang et al., "RWKV-UNet", 2025), as a global branch."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import LayerNorm2d
from .token_mixer import TokenMixer


def bi_wkv(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
    """Compute the bidirectional WKV of Vision-RWKV (Duan et al., 2024) per channel, in time linear in N.

    With w = ``decay`` and u = ``bonus``, the output of token t is the mean of all ``v_i``, weighted by
    ``exp(k_i − (|t − i| − 1)·w / N)`` for i ≠ t and by ``exp(k_t + u)`` for i = t.

    Half-precision inputs are computed in float32. Since w is divided by N, the decay over the whole sequence is exp(w)
    for any length, so cumulative sums can replace the recurrence over tokens. They are finite in float32 as long as w
    is between -70 and 150 and the keys of a channel differ by at most 80.

    Args:
        k (Tensor): Keys, (B, N, C).
        v (Tensor): Values, (B, N, C).
        decay (Tensor): w, (C,). Positive values favour near tokens.
        bonus (Tensor): u, (C,).

    Returns:
        Tensor: (B, N, C), in the dtype of ``v``.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    k, values, decay, bonus = (x.to(dtype) for x in (k, v, decay, bonus))
    weight = (k - k.detach().amax(1, keepdim=True)).exp()  # The common factor cancels in the quotient.
    x = torch.cat((weight * values, weight), dim=2)  # numerators and denominators, (B, N, 2C)
    step = torch.cat((decay, decay)) / k.size(1)
    x = _sum_before(x, step) + _sum_before(x.flip(1), step).flip(1) + x * torch.cat((bonus, bonus)).exp()
    numerator, denominator = x.chunk(2, dim=2)
    return (numerator / denominator).to(v.dtype)


def _sum_before(x: Tensor, step: Tensor) -> Tensor:
    """Compute ``Σ_{i<t} exp(−(t − 1 − i)·step)·x_i`` for all t of (B, N, C), with ``step`` (C,)."""
    length = x.size(1)
    # Positions count from the middle, so that exponents stay within half of the decay over the sequence.
    position = torch.arange(length, device=x.device, dtype=x.dtype) - (length - 1) / 2
    exponent = position[:, None] * step  # (N, C)
    total = (x * exponent.exp()).cumsum(1)
    return F.pad(total[:, :-1], (0, 0, 1, 0)) * (step - exponent).exp()


def q_shift(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Apply Vision-RWKV's quad-directional shift: one quarter of the channels moves by one position per direction.

    Args:
        x (Tensor): Tokens of a map in row-major order, (B, H·W, C).
        size (tuple[int, int]): H and W.

    Returns:
        Tensor: (B, H·W, C). The first quarter of the channels holds the left neighbours, the second the right, the
        third the upper, the fourth the lower ones, or zeros where there is none. Up to three left over channels stay.
    """
    maps = x.transpose(1, 2).unflatten(2, size)
    quarter = x.size(2) // 4
    left, right, upper, lower, rest = maps.split((quarter, quarter, quarter, quarter, x.size(2) - 4 * quarter), dim=1)
    shifted = torch.cat((
        F.pad(left[..., :-1], (1, 0)), F.pad(right[..., 1:], (0, 1)),
        F.pad(upper[..., :-1, :], (0, 0, 1, 0)), F.pad(lower[..., 1:, :], (0, 0, 0, 1)), rest), dim=1)
    return shifted.flatten(2).transpose(1, 2)


class SpatialMix(nn.Module):
    """Spatial mix of Vision-RWKV: ``W_O (sigmoid(r) ⊙ LayerNorm(Bi-WKV(k, v)))``.

    r, k and v are linear maps of the tokens, each first blended with its shifted neighbours by learned weights.

    Args:
        channels (int): Channels of the tokens, C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.zeros(channels))
        self.bonus = nn.Parameter(torch.zeros(channels))
        self.mix_receptance = nn.Parameter(torch.full((channels,), 0.5))
        self.mix_key = nn.Parameter(torch.full((channels,), 0.5))
        self.mix_value = nn.Parameter(torch.full((channels,), 0.5))
        self.receptance = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.output = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Map (B, H·W, C) of a map of ``size`` (H, W) to the same shape."""
        shifted = q_shift(x, size)
        r, k, v = (layer(x * share + shifted * (1 - share)) for layer, share in (
            (self.receptance, self.mix_receptance), (self.key, self.mix_key), (self.value, self.mix_value)))
        return self.output(r.sigmoid() * self.norm(bi_wkv(k, v, self.decay, self.bonus)))


class IRRWKV(TokenMixer):
    """The inverted residual RWKV block with an expansion of 1, as all branches have Cm channels.

    ``h = GELU(LayerNorm(W_1 x))``, ``h ← h + LayerNorm(SpatialMix(h))``, ``h ← h + SiLU(LayerNorm(DW-Conv5×5(h)))``,
    ``x + W_2 h``. The original has a batch norm after the depthwise convolution; here it is a LayerNorm so that, as in
    all of ConvNeur, no image depends on the others of its batch.

    Args:
        channels (int): Channels of the tokens, Cm.
        init_cfg (dict | list[dict] | None): MMEngine initialisation. Defaults to None.
    """

    def __init__(self, channels: int, init_cfg: dict | list[dict] | None = None) -> None:
        super().__init__(channels, init_cfg)
        self.pointwise1 = nn.Linear(channels, channels, bias=False)
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.spatial_mix = SpatialMix(channels)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.depthwise_conv = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False)
        self.norm3 = LayerNorm2d(channels, eps=1e-6)
        self.pointwise2 = nn.Linear(channels, channels)

    def mix(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Mix tokens, see :meth:`TokenMixer.mix`."""
        h = F.gelu(self.norm1(self.pointwise1(x)))
        h = h + self.norm2(self.spatial_mix(h, size))
        local = self.norm3(self.depthwise_conv(h.transpose(1, 2).unflatten(2, size)))
        h = h + F.silu(local).flatten(2).transpose(1, 2)
        return x + self.pointwise2(h)
