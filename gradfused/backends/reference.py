"""The step in plain PyTorch, stage by stage: the oracle of the tests, and the backend where no other can run.

It computes in float32, or in float64 for float64 parameters, on any device and layout. On float64 copies of parameters
and gradients it is exact to float64.

A step is computed for all parameters before any of it is written, so that a step which fails half way, say because a
tensor subclass lacks an operator, has changed nothing. This takes memory for a second copy of everything that the step
writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..step.memory import has_values
from .base import WIDE_SCOPES, Backend, Row, Scaling, Settings
from .rules import RULES, TRUSTED, Count

SHORT = (torch.float16, torch.bfloat16)

# ---- the weights, and stages 0 to 2 of the gradient


def compute_dtype(param: Tensor) -> torch.dtype:
    """float64 for float64 parameters, else float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def weights_of(row: Row) -> Tensor:
    """The weights before the step, with the extra digits that are kept for them: see csrc/math/rounding.h."""
    weights = row.weights
    p = weights.to(compute_dtype(row.param))
    if row.master is not None:
        p = torch.where(row.master.to(weights.dtype) == weights, row.master.to(p.dtype), p)
    if row.kahan_comp is not None:
        rest = row.kahan_comp.to(p.dtype)
        power = (p.view(torch.int32) & 0x7F800000).view(p.dtype)  # of two, below the weight
        half_unit = torch.finfo(weights.dtype).eps / 2
        p = p + torch.where(rest.isfinite() & (rest.abs() <= power * half_unit), rest, 0.0)
    return p


def unit_view(x: Tensor, row: Row) -> Tensor:
    """``x`` as (units, unit length)."""
    units = 1 if row.unit_length == x.numel() else x.shape[0]
    return x.reshape(units, -1)


def centred(x: Tensor, row: Row) -> Tensor:
    """``x`` minus its mean over the unit, or over the whole tensor. Equal elements become exact zeros.

    The mean is taken in float64, around the first element, or around 0 where that is not finite.
    """
    flat = x.reshape(1, -1) if row.whole else unit_view(x, row)
    wide = flat.double()
    first = torch.where(wide[:, :1].isfinite(), wide[:, :1], 0.0)
    mean = (first + (wide - first).mean(dim=1, keepdim=True)).to(x.dtype)
    return (flat - mean).view_as(x)


def unscaled(row: Row, settings: Settings, unscale: float) -> Tensor:
    """Stages 0 and 1."""
    g = row.grad.to(compute_dtype(row.param)) * unscale
    if settings.adaptive:  # the norm is of the gradient times the weight's reach
        g = g * reach(row, settings)
    return centred(g, row) if row.centre and settings.centralize_at == "gradient" else g


def reach(row: Row, settings: Settings) -> Tensor:
    """|w| + eta, in proportion to which ASAM lets each weight move (Kwon et al. 2021)."""
    return weights_of(row).abs() + settings.eta


def factor_of(norm: Tensor, settings: Settings) -> Tensor:
    """s(n) = clamp(a + b / (n + e), lo, hi)."""
    a, b, e, lo, hi = settings.perturb
    return torch.clamp(a + b / (norm + e), lo, hi)


def agc_factor(norm: Tensor, weight_norm: Tensor, radius: float) -> Tensor:
    """min(1, radius * max(||w||, 1e-3) / max(n, 1e-6)) (Brock et al. 2021)."""
    return torch.clamp(radius * weight_norm.clamp(min=1e-3) / norm.clamp(min=1e-6), 0.0, 1.0)


def unit_norm(x: Tensor, row: Row) -> Tensor:
    """(units, 1) norms, in float64."""
    return unit_view(x, row).double().square().sum(dim=1, keepdim=True).sqrt()


def perturbed(g: Tensor, row: Row, settings: Settings, norm: Tensor | None) -> Tensor:
    """Stage 2 and ``clip_value``, with the ``norm`` of a wide scope; None for the other scopes."""
    if settings.norm_scope == "unit":
        n = unit_norm(g, row)
        weight_norm = unit_norm(weights_of(row), row)
        s = agc_factor(n, weight_norm, settings.radius) if settings.agc else factor_of(n, settings)
        g = (unit_view(g, row) * s.to(g.dtype)).view_as(g)
    elif norm is not None:
        g = g * factor_of(norm, settings).to(device=g.device, dtype=g.dtype)
    return torch.clamp(g, -settings.clip_value, settings.clip_value) if settings.clip_value < math.inf else g


# ---- stage 3: noise

_M0, _M1, _W0, _W1, _LOW = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF


def philox(seed: int, quads: Tensor, parameter: int, step: int) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four words for each counter (low and high word of the quad, parameter, step)."""
    c0, c1 = quads & _LOW, (quads >> 32) & _LOW
    c2, c3 = torch.full_like(quads, parameter & _LOW), torch.full_like(quads, step & _LOW)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        a, b = c0 * _M0, c2 * _M1  # wraps in int64; the 64 bits are the right ones
        c0, c1, c2, c3 = ((b >> 32) & _LOW) ^ c1 ^ k0, b & _LOW, ((a >> 32) & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return [c0, c1, c2, c3]


def normal_noise(shape: torch.Size, seed: int, parameter: int, step: int, device: torch.device) -> Tensor:
    """Standard normal values in float64, a function of seed, parameter, step and row-major position alone."""
    numel = shape.numel()
    quads = torch.arange((numel + 3) // 4, dtype=torch.int64, device=device)
    u = [((x >> 9).double() + 0.5) * 2.0**-23 for x in philox(seed, quads, parameter, step)]
    pairs = []
    for a, b in ((u[0], u[1]), (u[2], u[3])):
        r, angle = torch.sqrt(-2.0 * torch.log(a)), 2.0 * math.pi * b
        pairs += [r * torch.cos(angle), r * torch.sin(angle)]
    return torch.stack(pairs, dim=1).flatten()[:numel].view(shape)


def placed_as(x: Tensor, like: Tensor) -> Tensor:
    """``x``, of which every rank holds the whole, distributed over the ranks as ``like`` is if that is a DTensor."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return x
    from torch.distributed.tensor import DTensor, Replicate

    whole = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(mesh, like.placements)  # type: ignore[attr-defined]


def gathered(x: Tensor) -> Tensor:
    """``x`` as a plain tensor: a DTensor is gathered from all ranks."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def with_noise(g: Tensor, row: Row, settings: Settings, taken: float) -> Tensor:
    """g + sigma_t xi with sigma_t^2 = noise / (1 + t)^decay (Neelakantan et al. 2015); t counts steps taken."""
    sigma = math.sqrt(settings.noise / (1.0 + taken) ** settings.noise_decay)
    xi = normal_noise(g.shape, settings.seed, row.param_number, int(taken), g.device)
    return g + placed_as(sigma * xi.to(g.dtype), g)


# ---- how weights are kept; stage 7, the rules, is in rules.py


def uniform_bits(random: Tensor, bits: int, like: Tensor) -> Tensor:
    """The upper ``bits`` of 32-bit words as numbers in [0, 1), placed as ``like``.

    They are placed after the shift, which torch 2.13 ignores for a DTensor of integers.
    """
    return placed_as((random >> (32 - bits)).float() * 2.0**-bits, like)


def stochastically_rounded(x: Tensor, dtype: torch.dtype, seed: int, parameter: int, step: int) -> Tensor:
    """``x`` rounded to one of its two neighbours in ``dtype``, the nearer the likelier, by 32 random bits an element.

    The bits are a function of seed, parameter, step and row-major position, and differ from those of the noise.
    """
    numel = x.numel()
    quads = torch.arange((numel + 3) // 4, dtype=torch.int64, device=x.device) | -(2**63)
    random = torch.stack(philox(seed, quads, parameter, step), dim=1).flatten()[:numel].view(x.shape)
    x = x.float()
    a, largest = x.abs(), torch.finfo(dtype).max
    exponent = torch.frexp(a)[1]
    if dtype == torch.bfloat16:
        ulp = torch.ldexp(torch.ones_like(a), (exponent - 8).clamp(min=-133))
        fraction = uniform_bits(random, 16, x)
    else:
        ulp = torch.ldexp(torch.ones_like(a), (exponent - 11).clamp(min=-24))
        fraction = torch.where(a < 2.0**-14, uniform_bits(random, 24, x), uniform_bits(random, 13, x))
    ratio = a.double() / ulp.double()
    rounded = (torch.floor(ratio + fraction.double()) * ulp.double()).clamp(max=largest).float()
    return torch.where(torch.isfinite(x), torch.copysign(rounded, x), x).to(dtype)


class Writes:
    """The values that a step is about to write, either all of them or none.

    Attributes:
        done: Everything was written.
    """

    def __init__(self) -> None:
        self._due: list[tuple[Tensor, Tensor]] = []
        self.done = False

    def add(self, to: Tensor, value: Tensor) -> None:
        """Have ``value`` written to the tensor ``to``."""
        self._due.append((to, value.to(to.dtype)))

    def commit(self) -> None:
        """Write everything. If this raises before the end, the tensors get back what they held."""
        begun = 0
        try:
            for i, (to, value) in enumerate(self._due):
                self._due[i] = (to, to.clone())  # replaces the value, which is no longer needed
                begun = i + 1
                to.copy_(value)
            self.done = True
        except BaseException:
            if self.done:  # an interrupt just after the last write
                raise
            for to, before in reversed(self._due[:begun]):
                to.copy_(before)
            raise

    def forget(self) -> None:
        """Let go of every tensor."""
        self._due.clear()


class ReferenceBackend(Backend):
    """The rows of one step, which is computed in plain PyTorch."""

    def __init__(self, rows: Sequence[Row], settings: Sequence[Settings]) -> None:
        super().__init__(rows, settings)
        self.rows = list(rows)
        device = rows[0].param.device if rows else torch.device("cpu")
        self._sums = torch.zeros(len(rows), dtype=torch.float64, device=device)
        self._writes = Writes()

    @property
    def sums(self) -> Tensor:
        return self._sums

    @torch.no_grad()
    def stats(self, scaling: Scaling) -> None:
        unscale = scaling.unscale
        for i, row in enumerate(self.rows):
            settings = self.settings[row.group]
            if row.param.numel() and (settings.norm_scope in WIDE_SCOPES or settings.skip_nonfinite):
                self.sums[i] = gathered(unscaled(row, settings, unscale).double().square().sum())

    def _norm(self, index: int) -> Tensor | None:
        """The norm of the scope of a row, if that is wider than a unit."""
        row, scope = self.rows[index], self.settings[self.rows[index].group].norm_scope
        if scope not in WIDE_SCOPES:
            return None
        if scope == "param":
            return self.sums[index].sqrt()
        shared = [
            i
            for i, other in enumerate(self.rows)
            if self.settings[other.group].norm_scope == scope and (scope == "global" or other.group == row.group)
        ]
        return self.sums[shared].sum().sqrt()

    def _finite(self) -> bool:
        guarded = [i for i, row in enumerate(self.rows) if self.settings[row.group].skip_nonfinite]
        return not guarded or not has_values(self.sums) or bool(torch.isfinite(self.sums[guarded]).all())

    @torch.no_grad()
    def apply(self, scaling: Scaling) -> bool:
        finite = self._finite()
        if finite:
            self._apply_rows(scaling.unscale)
        return finite

    @property
    def taken(self) -> int:
        return int(self._writes.done)

    def release(self) -> None:  # the rows serve one step only
        self.rows.clear()
        self._writes.forget()

    def _apply_rows(self, unscale: float) -> None:
        norms = [self._norm(i) for i in range(len(self.rows))]
        settings = [s if s.lr_tensor is None else replace(s, lr=float(s.lr_tensor)) for s in self.settings]
        for i, row in enumerate(self.rows):
            self._apply_row(i, row, settings[row.group], unscale, norms[i], self._writes)
        self._writes.commit()

    def _apply_row(
        self, index: int, row: Row, s: Settings, unscale: float, norm: Tensor | None, writes: Writes
    ) -> None:
        dtype = compute_dtype(row.param)
        now = Count.of(row, s)
        if row.step is not None:
            writes.add(row.step, torch.full_like(row.step, now.step))
        if row.mu_product is not None:
            writes.add(row.mu_product, torch.full_like(row.mu_product, now.mu_product))
        if row.param.numel() == 0:
            return
        p = weights_of(row)
        state = {key: value.to(dtype) for key, value in row.state.items()}

        g = unscaled(row, s, unscale)
        if s.norm_scope == "unit":
            self.sums[index] = gathered(g.double().square().sum())
        g = perturbed(g, row, s, norm)
        if s.noise > 0:
            g = with_noise(g, row, s, now.step - 1.0)
        g = g * s.sign
        if s.weight_decay != 0 and not s.decoupled:
            g = g + s.weight_decay * p
        if row.centre and s.centralize_at == "decayed":
            g = centred(g, row)

        update = RULES[row.rule](g, p, state, s, now)
        if row.centre and s.centralize_at == "update":
            update = update._replace(direction=centred(update.direction, row))
        if s.adapt and row.rule in TRUSTED:
            update = TRUSTED[row.rule](update, p, s)
        for key, value in state.items():  # before the weights, because a backup may be a view of them
            writes.add(row.state[key], value)
        self._keep(row, s, now, p * update.shrink - update.step * update.direction, writes)

    @staticmethod
    def _keep(row: Row, s: Settings, now: Count, p: Tensor, writes: Writes) -> None:
        """Have the new weights written, with their average, their copies and their gradient."""
        kept = p.to(row.param.dtype)
        if row.precision == "stochastic" and row.param.dtype in SHORT:
            kept = stochastically_rounded(p, row.param.dtype, s.seed, row.param_number, int(now.step) - 1)
        if row.ema is not None:
            average = row.ema.to(p.dtype)
            writes.add(row.ema, average.lerp(p, 1.0 - s.ema))
        writes.add(row.param, kept)
        if row.precision == "master" and row.master is not None:
            writes.add(row.master, p)
        if row.kahan_comp is not None:
            writes.add(row.kahan_comp, p - kept.to(p.dtype))
        if s.zero_grad_in_step:
            writes.add(row.grad, torch.zeros_like(row.grad))
