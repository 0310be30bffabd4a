"""What a wheel must do where torch is installed: one step on the CPU backend, equal to torch's; of CUDA, an answer."""

import torch

import gradfused
from gradfused.backends import availability


def step(optimizer_class: type, **options: object) -> torch.Tensor:
    """The weights after one AdamW step from fixed weights and gradients."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 129, generator=generator))
    weight.grad = torch.randn(64, 129, generator=generator)
    if optimizer_class is torch.optim.AdamW:
        weight.grad -= weight.grad.mean(dim=1, keepdim=True)
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
    optimizer_class([weight], lr=0.01, **options).step()
    return weight.detach()


ours = step(gradfused.AdamW, backend="cpu", centralize=True, clip_norm=1.0)
torch.testing.assert_close(ours, step(torch.optim.AdamW))

# Without a GPU, or without its kernels in the wheel, the reason.
cuda = availability()["cuda"]
assert cuda.usable or cuda.reason
