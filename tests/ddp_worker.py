"""One process of a data-parallel run, started by torchrun: do the replicas stay bitwise equal?

Every rank sees other data and starts from other adapters, which DDP overwrites with rank 0's. Every
few steps all parameters and all optimizer state are compared across the ranks. Rank 0 prints one
line of JSON; differing replicas end the process with an error.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import loft_kernels as lk

SIZES = {"cpu": ((24, 20, 3), (16, 24, 4)), "cuda": ((320, 256, 8), (192, 320, 16), (96, 192, 3))}
OVERFLOW_AT = 7


class LoRALinear(nn.Module):
    """A frozen weight and an adapter."""

    def __init__(self, m: int, n: int, r: int) -> None:
        super().__init__()
        self.scaling = 2.0
        self.base = nn.Parameter(torch.randn(m, n) / n**0.5, requires_grad=False)
        self.lora_B = nn.Parameter(torch.randn(m, r) / r)
        self.lora_A = nn.Parameter(torch.randn(r, n) / n**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.base.T + self.scaling * (x @ self.lora_A.T) @ self.lora_B.T


class Net(nn.Module):
    """Adapted layers with a norm between them, which plain AdamW serves."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LoRALinear(*size) for size in SIZES[device])
        self.norm = nn.LayerNorm(SIZES[device][0][1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def digest(net: nn.Module, opt: torch.optim.Optimizer) -> dict[str, str]:
    """Hash every parameter and every state tensor."""
    seen = {}
    for name, p in net.named_parameters():
        if not p.requires_grad:
            continue
        seen[name] = p.detach()
        seen |= {f"{name}.{key}": value for key, value in opt.state.get(p, {}).items()}
    seen["nonfinite_steps"] = opt.nonfinite_steps
    return {
        name: hashlib.sha256(
            tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in seen.items()
    }


def compare(net: nn.Module, opt: torch.optim.Optimizer, step: int) -> int:
    """Return how many tensors are equal on all ranks; end the run at the first that differs."""
    gathered: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, digest(net, opt))
    differing = [
        k for k in gathered[0] if any(other.get(k) != gathered[0][k] for other in gathered)
    ]
    if differing:
        raise SystemExit(f"after step {step} the replicas differ in {differing[:4]}")
    return len(gathered[0])


def wrapped(net: Net, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """Wrap in DDP; or shard the frozen base alone with FSDP2, adapters as rank 0 has them."""
    if not args.fsdp:
        return DistributedDataParallel(
            net,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=args.bucket_views,
        )
    adapters = {p for p in net.parameters() if p.requires_grad}
    for p in net.parameters():
        dist.broadcast(p.data, 0)
    return fully_shard(net, ignored_params=adapters)


def average_gradients(module: nn.Module) -> None:
    """Do for adapters outside FSDP2 what DDP does."""
    for p in module.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def train(args: argparse.Namespace, device: torch.device) -> dict:
    """Train and compare; return what was seen."""
    rank, dtype = dist.get_rank(), getattr(torch, args.dtype)
    torch.manual_seed(rank)
    net = Net(args.device).to(device)
    for layer in net.layers:
        for factor in (layer.lora_A, layer.lora_B):
            factor.data = factor.data.to(dtype)
        layer.base.data = layer.base.data.to(dtype)
    net.norm.to(dtype)
    ddp = wrapped(net, args, device)
    opt = lk.LoFTAdamW(ddp, lr=1e-2, weight_decay=0.01, max_grad_norm=0.05)
    checks = tensors = 0
    for step in range(1, args.steps + 1):
        x = torch.randn(8, SIZES[args.device][0][1], device=device, dtype=dtype)
        if step == OVERFLOW_AT and rank == 0:
            x = x * float("inf")  # one rank overflows, all have to skip
        with contextlib.nullcontext() if args.fsdp else ddp.no_sync():
            ddp(x).float().square().mean().backward()
        (ddp(x.flip(1)).float() - 0.1).square().mean().backward()
        if args.fsdp:
            average_gradients(ddp)
        opt.step()
        opt.zero_grad()
        if step == args.drift_at and rank == 1:
            state = opt.state[net.layers[0].lora_B]
            state["exp_avg"].view(torch.int32)[0, 0] ^= 1
        if step % args.every == 0:
            tensors = compare(net, opt, step)
            checks += 1
    return {
        "steps": args.steps,
        "checks": checks,
        "tensors": tensors,
        "skipped": int(opt.nonfinite_steps),
        "moved": int(next(iter(opt.state.values()))["step"]),
        "finite": all(bool(p.isfinite().all()) for p in opt.state),
        "first": opt.param_groups[0]["param_names"][0],
        "base": type(net.layers[0].base).__name__,
        "communication": dist.get_backend(),
        "gpus": count_devices(device),
    }


def count_devices(device: torch.device) -> int:
    """Count the devices that the processes train on."""
    gathered: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(gathered, str(device))
    return len(set(gathered))


def join(args: argparse.Namespace) -> torch.device:
    """Join the process group; return where this process trains."""
    if args.device == "cpu":
        dist.init_process_group("gloo")
        return torch.device("cpu")
    rank = int(os.environ["LOCAL_RANK"])
    if args.share_gpu:
        # NCCL refuses two processes of one host on one GPU. What it takes for other hosts it
        # reaches by sockets, and here that is this machine itself.
        os.environ["NCCL_HOSTID"] = f"host of rank {rank}"
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    device = torch.device("cuda", 0 if args.share_gpu else rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def finish(seen: dict) -> None:
    """Let rank 0 report, and end all processes together.

    They end without Python's own shutdown, which gloo's threads abort now and then (torch 2.13 with
    FSDP2: once in thirty runs).
    """
    if dist.get_rank() == 0:
        print(json.dumps(seen), flush=True)  # noqa: T201
    dist.barrier()
    os._exit(0)


def main() -> None:
    """Join the process group, train, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--drift-at", type=int, default=0, help="spoil rank 1's state here")
    parser.add_argument("--bucket-views", action="store_true", help="gradients share a buffer")
    parser.add_argument("--fsdp", action="store_true", help="shard the base, not the adapters")
    parser.add_argument("--share-gpu", action="store_true", help="all processes on one GPU")
    args = parser.parse_args()
    device = join(args)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = train(args, device)
    fell_back = any("reference path" in str(w.message) for w in caught)
    on_gpu = args.device == "cuda" and not fell_back and lk.report().chosen == "triton"
    finish({**seen, "backend": "triton" if on_gpu else "reference"})


if __name__ == "__main__":
    main()
