"""The Mamba block, with the parameter names and initial values of mamba-ssm's ``Mamba``, so that weights go both ways.

References:
  [1] Gu & Dao 2023, arXiv:2312.00752: section 3.4 (the block), 3.6 (initial values of A and delta).

Glossary: ``A_log`` = log(-A); ``dt`` = delta, the step size; ``dt_rank`` = R, rank of the projection that makes it.
Shape letters: B samples, L steps, d width of the model, D = expand * d channels, N states a channel, K width of the convolution.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ehrmodels.scan import causal_conv1d, selective_scan

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # range of delta at the start


class MambaBlock(nn.Module):
    """out_proj(SSM(silu(conv(x))) * silu(z)) with (x, z) = in_proj(input): maps (B, L, d) to (B, L, d), causally.

    Args:
        d_model: d.
        d_state: N.
        d_conv: K.
        expand: D / d.
    """

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2):
        super().__init__()
        self.d_inner, self.d_state, self.dt_rank = expand * d_model, d_state, math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, d_state + 1, dtype=torch.float32)).repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self.A_log._no_weight_decay = self.D._no_weight_decay = True  # type: ignore[attr-defined]
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.exp(torch.rand(self.d_inner) * (math.log(DT_MAX) - math.log(DT_MIN)) + math.log(DT_MIN)).clamp(
            min=DT_FLOOR
        )
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of the bias is dt
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, L, d) to (B, L, d). Step t depends on steps up to t only, so padding on the right changes nothing before it."""
        x, z = self.in_proj(hidden.transpose(0, 1)).chunk(2, -1)  # (L, B, D): as the scan lays memory out
        x = causal_conv1d(x.permute(1, 2, 0), self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")  # (B, D, L)
        delta, B, C = self._selected(x.permute(2, 0, 1))
        y = selective_scan(
            x,
            F.linear(delta, self.dt_proj.weight).permute(1, 2, 0),
            -torch.exp(self.A_log.float()),
            B.permute(1, 2, 0),
            C.permute(1, 2, 0),
            self.D.float(),
            z.permute(1, 2, 0),
            self.dt_proj.bias.float(),
            delta_softplus=True,
        )
        return self.out_proj(y.permute(2, 0, 1)).transpose(0, 1)

    def start(self, batch: int) -> tuple[Tensor, Tensor]:
        """States before the first step: the last K inputs of the convolution (B, D, K) and the SSM's state (B, D, N)."""
        zeros = self.in_proj.weight.new_zeros
        return zeros(batch, self.d_inner, self.conv1d.kernel_size[0]), zeros(batch, self.d_inner, self.d_state).float()

    def step(self, hidden: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of streaming inference: what ``forward`` gives at that step, at a cost that does not grow with the past.

        Args:
            hidden: (B, 1, d) input of this step.
            conv_state: (B, D, K), first from ``start``.
            ssm_state: (B, D, N), first from ``start``.

        Returns:
            Output (B, 1, d) and the two states after it.
        """
        x, z = self.in_proj(hidden.squeeze(1)).chunk(2, -1)
        conv_state = torch.cat([conv_state[..., 1:], x.unsqueeze(2)], 2)
        x = F.silu((conv_state * self.conv1d.weight.squeeze(1)).sum(2) + self.conv1d.bias)
        delta, B, C = self._selected(x)
        delta = F.softplus(self.dt_proj(delta))
        decay = torch.exp(-torch.exp(self.A_log.float()) * delta.unsqueeze(2))  # (B, D, N)
        ssm_state = decay * ssm_state + (delta * x).unsqueeze(2) * B.unsqueeze(1)
        y = (ssm_state * C.unsqueeze(1)).sum(2) + self.D * x
        return self.out_proj((y * F.silu(z)).to(hidden.dtype)).unsqueeze(1), conv_state, ssm_state

    def _selected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)  # type: ignore[return-value]
