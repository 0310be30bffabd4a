"""The options: the keywords of a recipe as users give them, and every option of a group as the numbers that kernels read.

A new option is declared here and in csrc/schema.def, whose fields ``Settings`` repeats. ``step/options.py`` checks a keyword's
values and turns them into numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from torch import Tensor


class Recipe(TypedDict, total=False):
    """What every gradfused optimizer takes after its ``torch.optim`` twin's arguments, by keyword; each may differ by group.

    A number, here and among the twin's arguments, is anything that ``numbers.Real`` or ``operator.index`` accepts, or
    an array or tensor of one element.

    Attributes:
        centralize: Subtract the gradient's mean (Gradient Centralization, Yong et al. 2020). True or ``"unit"``: over
            each slice along dim 0 of parameters with 2 or more dims; ``"conv"``: the same with 4 or more dims only;
            ``"tensor"``: over the whole of any parameter. Default False.
        centralize_at: ``"gradient"`` (default), ``"decayed"``: after coupled weight decay, or ``"update"``: the
            direction that the rule is about to apply.
        clip_norm: Clip the global norm to this; short for ``perturb="clip", radius=clip_norm, norm_scope="global"``.
        perturb: Scale by a function of the norm: ``"clip"``, ``"normalize"``, ``"amplify"``, ``"dampen"`` or ``"agc"``
            (Brock et al. 2021; needs ``norm_scope="unit"``). Default None.
        radius: The size of the perturbation, in the unit of the norm (of ``"agc"``: a ratio to the weight's norm).
            Default 1.
        norm_scope: What shares a norm: ``"global"`` (default), ``"group"``, ``"param"`` or ``"unit"``.
        clip_value: Clamp each element to [-clip_value, clip_value] after perturbing. Default None.
        noise: Variance of normal noise added at step 0 (Neelakantan et al. 2015). Default 0.
        noise_decay: The variance at step t is ``noise / (1 + t) ** noise_decay``. Default 0.55.
        seed: Key of the noise; the same seed draws the same noise on every backend. Default 0.
        reverse: Multiply the gradient by ``-reverse``: adversarial training of a whole group. Default None.
        nonfinite: ``"propagate"`` (default) or ``"skip"``: a step whose gradients hold inf or nan changes nothing.
        precision: How float16 and bfloat16 weights are kept: None (default), rounded to nearest; ``"kahan"``, with a
            second tensor for the rounding error; ``"stochastic"``, rounded at random without bias; ``"master"``, with a
            float32 copy on which the steps are taken. Other dtypes are unaffected. Weights that are written between
            steps, by loading a model say, are what the next step begins with, element by element: the copy is used
            where it rounds to the weight, and the rounding error where it is within half a unit in the last place of
            the weight. Once the option is switched off, the next step drops the extra tensor.
        state_dtype: Dtype of the optimizer's new state, ``"bfloat16"`` or ``"float32"``. Default None: float32 with
            ``precision="master"``, else the parameter's.
        ema: Decay of an exponential moving average of the weights (0.999, say), which ``swap_ema()`` swaps in. Once the
            option is switched off, the next step drops the average. Default None.
        zero_grad_in_step: Set the gradients to zero in the step. Default False.
        backend: ``"auto"`` (default), ``"cuda"``, ``"cpu"``, ``"triton"`` or ``"reference"``.
    """

    centralize: bool | str
    centralize_at: str
    clip_norm: float | None
    perturb: str | None
    radius: float
    norm_scope: str
    clip_value: float | None
    noise: float
    noise_decay: float
    seed: int
    reverse: float | None
    nonfinite: str
    precision: str | None
    state_dtype: str | None
    ema: float | None
    zero_grad_in_step: bool
    backend: str


DEFAULTS: Recipe = {
    "centralize": False,
    "centralize_at": "gradient",
    "clip_norm": None,
    "perturb": None,
    "radius": 1.0,
    "norm_scope": "global",
    "clip_value": None,
    "noise": 0.0,
    "noise_decay": 0.55,
    "seed": 0,
    "reverse": None,
    "nonfinite": "propagate",
    "precision": None,
    "state_dtype": None,
    "ema": None,
    "zero_grad_in_step": False,
    "backend": "auto",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """One parameter group's options as numbers: validated, defaults filled in, nothing left to interpret."""

    # the rule's
    lr: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    beta3: float = 0.0
    eps: float = 0.0
    lr_decay: float = 0.0
    momentum_decay: float = 0.0
    trust_coefficient: float = 0.0  # LARS's coefficient
    nesterov: bool = False
    decoupled: bool = False  # weight decay is not added to the gradient: the rule decays the weights, or nobody does
    proximal: bool = False
    adapt: bool = False  # scale by the rule's trust ratio
    # the transforms'
    centralize_at: str = "gradient"
    norm_scope: str = "none"  # what shares a norm: none, global, group, param or unit
    perturb: tuple[float, float, float, float, float] = (1.0, 0.0, 0.0, 0.0, 1.0)  # a, b, e, lo, hi of s(n)
    agc: bool = False
    radius: float = 1.0
    clip_value: float = float("inf")
    noise: float = 0.0
    noise_decay: float = 0.0
    seed: int = 0
    sign: float = 1.0  # reverse and maximize together
    skip_nonfinite: bool = False
    adaptive: bool = False  # norms are of g * (|p| + eta): adaptive SAM
    eta: float = 0.0
    # the riders'
    ema: float = 0.0
    zero_grad_in_step: bool = False
    # an lr on a GPU, which kernels read at each step; it is compared by its address
    lr_tensor: Tensor | None = field(default=None, compare=False)
    lr_address: int = 0
