"""Keys of a parameter group: the user's own are accepted, as in torch; what looks like a misspelt option is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from declared import OPTIMIZERS
from torch import nn

from gradfused.step.spelling import distance

# Keys that trainers, schedulers and the recipes of models write into groups.
REAL = """
name group_name layer_name module names tag tags id idx layer_id layer group_id param_group_id param_idx param_name names_all
initial_lr lr_scale lr_mult lr_multiplier lr_factor lr_ratio max_lr min_lr swa_lr base_lr peak_lr warmup_lr start_lr last_lr
default_lr is_decoupled_lr scheduled_lr lr_max step_lr decay_mult wd wd_mult wd_multiplier wd_scale weight_decay_mult
weight_decay_scale weight_decay_multiplier no_weight_decay apply_decay use_decay no_decay do_decay fixed_lr freeze frozen
base_momentum max_momentum min_momentum max_beta1 initial_momentum is_moe moe is_expert is_expert_parallel expert_parallel
is_last_layer is_bias is_norm is_embedding rank world_size fsdp zero_stage cpu_offload bucket_size grad_acc warmup warmup_steps
total_steps step_count last_epoch T_max n_averaged num_updates update_freq d k r d0 d_max d_numerator train_mode weight_sum
rho sigma delta tau gamma beta_1 theta use_muon rank_ratio proj_type update_proj_gap scale scale_parameter relative_step
lars_exclude layer_adaptation nesterov_momentum cautious rectify grad_averaging trust_clip always_adapt max_grad_norm grad_clip
max_norm norm_type clip_grad clip_threshold xyz f_dc f_rest opacity scaling rotation Lr LR wd2 lrs l2 sgd ema_decay
"""


def group_of(optimizer: str, **more: object) -> object:
    return OPTIMIZERS[optimizer]([{"params": [nn.Parameter(torch.ones(2))], **more}])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_keys_of_the_users_own_pass(optimizer):
    own = dict.fromkeys(REAL.split(), "mine")
    opt = group_of(optimizer, **own)
    assert {key: opt.param_groups[0][key] for key in own} == own
    opt.step()
    assert {key: opt.state_dict()["param_groups"][0][key] for key in own} == own


def slips(name: str) -> Iterator[str]:
    """``name`` with a letter left out, doubled, replaced or swapped with the next."""
    for i, letter in enumerate(name):
        yield name[:i] + name[i + 1 :]
        yield name[:i] + letter + name[i:]
        yield name[:i] + "q" + name[i + 1 :]
        if name[i + 1 : i + 2] not in ("", letter):
            yield name[:i] + name[i + 1] + letter + name[i + 2 :]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_slip_of_every_option_is_refused(optimizer):
    known = list(group_of(optimizer).defaults)
    for name in (name for name in known if len(name) >= 4):
        for slip in slips(name):
            with pytest.raises(TypeError, match=f"unknown option '{slip}'; did you mean '{name}'\\?"):
                group_of(optimizer, **{slip: 1.0})


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("weight_deacy", "weight_decay"),
        ("wieght_decay", "weight_decay"),
        ("weightdecay", "weight_decay"),
        ("weight_decy", "weight_decay"),
        ("clipnorm", "clip_norm"),
        ("clip_val", "clip_value"),
        ("centralise", "centralize"),
        ("centralise_at", "centralize_at"),
        ("Centralize", "centralize"),
        ("norm_scop", "norm_scope"),
        ("nosie", "noise"),
        ("noise_deacy", "noise_decay"),
        ("raduis", "radius"),
        ("revers", "reverse"),
        ("non_finite", "nonfinite"),
        ("presision", "precision"),
        ("state_type", "state_dtype"),
        ("zero_grad_instep", "zero_grad_in_step"),
        ("beta", "betas"),
        ("maximise", "maximize"),
        ("amsgard", "amsgrad"),
    ],
)
def test_real_slips_are_refused(given, meant):
    with pytest.raises(TypeError, match=f"parameter group has an unknown option '{given}'; did you mean '{meant}'\\?"):
        group_of("AdamW", **{given: 0.1})


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("noise", "noise", 0),
        ("nosie", "noise", 1),
        ("noises", "noise", 1),
        ("nois", "noise", 1),
        ("poise", "noise", 1),
        ("clip_val", "clip_value", 2),
        ("weight_decay", "no_weight_decay", 3),
        ("ab", "ba", 1),
        ("abc", "cba", 2),
        ("", "lr", 2),
    ],
)
def test_distance_of_two_names(a, b, expected):
    assert distance(a, b) == distance(b, a) == expected
