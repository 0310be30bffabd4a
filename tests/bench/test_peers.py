"""The benchmark's models, recipes, tensors and peers, and the check of peers before they are timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench_cases import CPU, TINY, TORCH_PEERS, forgets, tiny_case, workload_of
from gradfused.bench.cases import MODELS, OURS, RECIPES, RULES, Slab
from gradfused.bench.cases.workload import ALIGNMENT
from gradfused.bench.measure.check import Checker, NoiseTape, OracleNoise, crop, cropped_shapes, same_on_any_threads
from gradfused.bench.measure.steps import memory_reason
from gradfused.bench.peers import PEERS, NoiseSource, StepPeer, chosen_peers
from gradfused.bench.peers.eager import FoldedTransforms, Transforms
from gradfused.bench.timing import roof_of

# ---- data


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("small-400", 400, 211_200),
        ("resnet50", 161, 25_557_032),
        ("vit-b16", 152, 86_567_656),
        ("gpt2", 148, 124_439_808),
        ("llama-1b", 201, 1_100_048_384),
    ],
)
def test_models_have_the_published_sizes(name, tensors, elements):
    assert len(MODELS[name].shapes) == tensors
    assert MODELS[name].elements == elements


def test_gpt2_weights_are_stored_transposed():
    shapes = MODELS["gpt2"].shapes
    assert (768, 2304) in shapes
    assert (2304, 768) not in shapes


@pytest.mark.parametrize(
    ("rule", "recipe", "expected"),
    [
        ("adamw", "plain", 28),
        ("adamw", "centralize", 28),
        ("adamw", "clip", 32),
        ("adamw", "noise", 28),
        ("adamw", "full", 32),
        ("adam", "plain", 28),
        ("adamw-amsgrad", "plain", 36),
        ("sgd-momentum", "plain", 20),
        ("sgd", "plain", 12),
        ("sgd", "clip", 16),
    ],
)
def test_byte_budget_is_the_designs(rule, recipe, expected):
    assert RULES[rule].bytes_per_element(RECIPES[recipe], itemsize=4) == expected
    assert RULES[rule].bytes_per_element(RECIPES[recipe], itemsize=2) == expected // 2


@pytest.mark.parametrize(("itemsize", "expected"), [(4, 36), (2, 14 + 8)])
def test_averages_take_the_bytes_of_float32(itemsize, expected):
    assert RULES["adamw"].bytes_per_element(RECIPES["ema"], itemsize) == expected


def test_state_is_what_the_optimizer_keeps():
    kept = {name: (rule.state, rule.scalars) for name, rule in RULES.items()}
    moments = ("exp_avg", "exp_avg_sq")
    assert kept["adamw"] == (moments, {"step": 0.0})
    assert kept["adamw-amsgrad"] == ((*moments, "max_exp_avg_sq"), {"step": 0.0})
    assert kept["sgd"] == ((), {})
    assert kept["lars"] == (("momentum_buffer",), {})
    assert kept["nadam"] == (moments, {"step": 0.0, "mu_product": 1.0})
    assert set(kept["adan"][0]) == {*moments, "exp_avg_diff", "neg_pre_grad"}


@pytest.mark.parametrize(("rule", "expected"), [("lamb", 28 + 16), ("lars", 20 + 8), ("lion", 20), ("adan", 44)])
def test_trust_ratios_read_before_the_step(rule, expected):
    assert RULES[rule].bytes_per_element(RECIPES["plain"], itemsize=4) == expected


def test_clip_recipe_centralises_as_well():
    assert RECIPES["clip"].options["centralize"] is True
    assert RECIPES["clip"].options["clip_norm"] == 1.0


def test_noise_anneals():
    recipe = RECIPES["noise"]
    assert recipe.sigma(0) == pytest.approx(0.1)
    assert recipe.sigma(99) == pytest.approx(0.1 * 100**-0.275)


# ---- tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_slab_tensors_are_aligned_and_apart(dtype):
    shapes = [(3,), (5, 7), (), (0, 4), (64,)]
    slab = Slab(shapes, dtype, CPU)
    for number, tensor in enumerate(slab.tensors):
        tensor.fill_(number)
        assert (tensor.data_ptr() - slab.flat.data_ptr()) % ALIGNMENT["cpu"] == 0
    assert [tuple(tensor.shape) for tensor in slab.tensors] == shapes
    for number, tensor in enumerate(slab.tensors):
        assert (tensor == number).all()


def test_refresh_restores_what_eager_transforms_overwrite():
    workload = workload_of(tiny_case())
    before = [param.grad.clone() for param in workload.params]
    for param in workload.params:
        param.grad.mul_(-3)
    workload.refresh()
    for param, grad in zip(workload.params, before, strict=True):
        assert torch.equal(param.grad, grad)


def test_workload_is_benign():
    workload = workload_of(tiny_case())
    for slab in (workload.weights, workload.grads, *workload.state.values()):
        assert slab.flat.isfinite().all()
        assert slab.flat.abs().max() > 1e-6
    assert (workload.state["exp_avg_sq"].flat >= 0).all()


def test_variants_share_their_state():
    case = tiny_case()
    workload = workload_of(case)
    before = workload.state["exp_avg"].flat.clone()
    PEERS[OURS].build(case, workload, NoiseSource())()
    assert not torch.equal(before, workload.state["exp_avg"].flat)


@pytest.mark.parametrize("recipe", ["ema", "kahan"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_variants_share_what_rides_on_short_weights(recipe, dtype):
    """The average of 16-bit weights is float32."""
    case = tiny_case(recipe, dtype=dtype)
    workload = workload_of(case)
    (key,) = case.recipe.state
    before = workload.state[key].flat.clone()
    assert before.dtype == (torch.float32 if key == "ema" else dtype)
    for name in (OURS, *TORCH_PEERS[:1] * (key == "ema")):
        workload.state[key].flat.copy_(before)
        PEERS[name].build(case, workload, NoiseSource())()
        assert not torch.equal(before, workload.state[key].flat)


def test_roof_keeps_values_and_counts_its_streams():
    case = tiny_case()
    workload = workload_of(case)
    slabs = [workload.weights, workload.grads, *workload.state.values()]
    before, size = [slab.flat.clone() for slab in slabs], workload.grads.flat.nbytes
    roof = roof_of(case, workload)
    roof.step()
    assert roof.moved in (7 * size, 9 * size)  # ours in one sweep, or torch's three
    assert all(torch.equal(a, slab.flat) for a, slab in zip(before, slabs, strict=True))


def test_roof_of_float64_is_torchs():
    case = tiny_case(dtype=torch.float64)
    workload = workload_of(case)
    roof = roof_of(case, workload)
    roof.step()
    assert roof.moved == 9 * workload.grads.flat.nbytes


# ---- peers


def test_default_peers_leave_out_the_opt_in_ones():
    names = [peer.name for peer in chosen_peers(None)]
    assert names[0] == OURS
    assert "torch-compile" not in names
    assert "gradfused-reference" not in names


def test_chosen_peers_always_include_gradfused():
    assert [peer.name for peer in chosen_peers(["torch-loop"])] == [OURS, "torch-loop"]
    assert [peer.name for peer in chosen_peers([])] == [OURS]


def test_gradscale_peer_says_when_there_is_nothing_to_fold():
    assert "nothing to fold" in PEERS["torch-fused-gradscale"].reason_against(tiny_case("plain"))
    assert PEERS["torch-fused-gradscale"].reason_against(tiny_case("reverse")) is None


@pytest.mark.parametrize("name", ["apex", "bitsandbytes"])
def test_cuda_peers_have_a_reason_here(name):
    assert PEERS[name].reason_against(tiny_case()) is not None
    assert PEERS[name].unable(tiny_case()) == "runs on CUDA only"


def test_deepspeed_names_what_it_lacks():
    unable = PEERS["deepspeed-cpuadam"].unable
    assert unable(tiny_case(rule="sgd")) == "has no sgd"
    assert "float64" in unable(tiny_case(dtype=torch.float64))
    assert unable(replace(tiny_case(), device=torch.device("cuda"))) == "runs on CPUs only"
    assert unable(tiny_case()) is None


def test_a_peer_without_memory_has_a_reason(monkeypatch):
    monkeypatch.setattr("gradfused.bench.measure.steps.bytes_available", lambda device: 10)
    assert "GB are free" in memory_reason(PEERS["torch-foreach"], tiny_case())


@pytest.mark.parametrize("foreach", [False, True])
def test_folding_equals_transforming(foreach):
    case = tiny_case("full")

    class Fixed(NoiseSource):
        def draw(self, index, grad):
            return torch.full_like(grad, 0.5)

    eager, folded = workload_of(case), workload_of(case)
    transforms = Transforms(case.recipe, eager.params, Fixed(), foreach=foreach)
    transforms.advance()
    transforms.apply()
    folding = FoldedTransforms(case.recipe, folded.params, Fixed(), foreach=foreach)
    folding.advance()
    divisor = folding.folded()
    for ours, theirs in zip(folded.params, eager.params, strict=True):
        torch.testing.assert_close(ours.grad / divisor, theirs.grad)


# ---- the check


def test_crop_keeps_the_length_of_a_unit():
    assert crop((50257, 768), limit=1 << 14) == (21, 768)
    assert crop((2048, 5632), limit=1 << 12) == (2, 5632)
    assert crop((1, 1, 768), limit=16) == (1, 1, 768)
    assert crop((), limit=16) == ()


def test_cropped_shapes_hold_each_shape_once():
    shapes = cropped_shapes(MODELS["resnet50"])
    assert len(shapes) == len(set(MODELS["resnet50"].shapes))
    assert sum(torch.Size(shape).numel() for shape in shapes) < 2_000_000


def test_oracle_noise_is_gradfuseds_own():
    case = tiny_case("noise", dtype=torch.float64)
    source = OracleNoise(NoiseTape(TINY.shapes, case.recipe), case)
    source.advance(0)
    first = source.draw(1, None).clone()
    source.advance(1)
    assert not torch.equal(first, source.draw(1, None))
    assert abs(float(first.std()) - 1) < 0.1
    assert abs(float(first.mean())) < 0.15


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("rule", ["adamw", "adamw-amsgrad", "adam", "sgd-momentum", "sgd"])
def test_torch_peers_and_gradfused_are_right(recipe, rule):
    case = tiny_case(recipe, rule)
    checker = Checker(case)
    for name in (OURS, "gradfused-reference", *TORCH_PEERS):
        if PEERS[name].reason_against(case) is None:
            verdict = checker.verdict(PEERS[name])
            assert verdict.right, f"{name}: {verdict}"


@pytest.mark.parametrize("recipe", ["plain", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_gradfused_is_right_in_every_dtype(recipe, dtype):
    verdict = Checker(tiny_case(recipe, dtype=dtype)).verdict(PEERS[OURS])
    assert verdict.right, str(verdict)


@pytest.mark.parametrize("name", ["optimi", "pytorch_optimizer"])
def test_installed_packages_are_right(name):
    case = tiny_case("full")
    reason = PEERS[name].reason_against(case)
    if reason:
        pytest.skip(reason)
    assert Checker(case).verdict(PEERS[name]).right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["adamw", "sgd-momentum"])
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("plain", {"weight_decay": 0.0}),
        ("centralize", {"recipe": RECIPES["plain"]}),
        ("reverse", {"recipe": RECIPES["plain"]}),
        ("full", {"recipe": RECIPES["clip"]}),
    ],
)
def test_who_leaves_something_out_is_wrong(recipe, changes, rule, dtype):
    verdict = Checker(tiny_case(recipe, rule, dtype)).verdict(forgets(**changes))
    assert not verdict.right, str(verdict)


def test_forgotten_clipping_is_wrong():
    # Adam hardly feels a constant factor, so this needs float32, or SGD.
    changes = {"recipe": RECIPES["centralize"]}
    assert not Checker(tiny_case("clip")).verdict(forgets(**changes)).right
    assert not Checker(tiny_case("clip", "sgd", torch.bfloat16)).verdict(forgets(**changes)).right


def test_nan_is_wrong():
    def build(case, workload, source):
        return lambda: workload.weights.flat.fill_(float("nan"))

    verdict = Checker(tiny_case()).verdict(StepPeer("nan", "", build))
    assert not verdict.right
    assert str(verdict).startswith("wrong (err inf")


def test_threads_do_not_change_bits_and_are_restored():
    threads = torch.get_num_threads()
    assert same_on_any_threads(tiny_case("full"))
    assert torch.get_num_threads() == threads
