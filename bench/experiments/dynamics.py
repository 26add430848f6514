"""The paper's Figure 5: how fast a vision transformer learns, on scikit-learn's digits.

The model is pretrained on the digits 0 to 4 and adapted to 5 to 9.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import peft
import torch
import transformers
from comparison import state_bytes
from corpus import batches
from finetune import warm_up_and_decay
from torch import Tensor, nn
from torch.nn import functional

from bench.experiments.methods import DORA, FULL, LOFT, LORA, METHODS, make_optimizer
from bench.experiments.record import Document, Request, document
from bench.experiments.study import Run, study

COMPARED = (FULL, LORA, DORA, LOFT)
CLASSES = 5
PRETRAIN_LR, BATCH = 1e-3, 32
SHAPE = {"width": 64, "layers": 2, "heads": 4}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "shape": {"width": 16, "layers": 1, "heads": 2},
        "pretrain_steps": 10,
        "steps": 6,
        "every": 2,
        "rank": 2,
        "grid": [2e-3, 8e-3],
        "seeds": 2,
        "extensions": 0,
    },
    "small": {
        "shape": SHAPE,
        "pretrain_steps": 300,
        "steps": 60,
        "every": 4,
        "rank": 4,
        "grid": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2],
        "seeds": 3,
        "extensions": 3,
    },
    "full": {
        "shape": {"width": 192, "layers": 6, "heads": 6},
        "pretrain_steps": 600,
        "steps": 150,
        "every": 5,
        "rank": 8,
        "grid": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3],
        "seeds": 5,
        "extensions": 3,
    },
}


def digits(path: Path | None) -> tuple[Tensor, Tensor]:
    """Read images [1797, 1, 8, 8] from 0 to 1 and their classes.

    Args:
        path: an .npz file; read where it is, written where only scikit-learn is.

    Raises:
        SystemExit: neither is here.
    """
    if path is not None and path.exists():
        with numpy.load(path) as file:
            images, classes = file["images"], file["classes"]
    else:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise SystemExit(
                "dynamics: scikit-learn brings the digits and is not installed. Where it is, run "
                "this experiment with --data FILE.npz at any size, bring that file here, and name "
                "it by --data"
            ) from None
        found = load_digits()
        images, classes = found.images.astype("uint8"), found.target.astype("uint8")
        if path is not None:
            numpy.savez_compressed(path, images=images, classes=classes)
    return torch.from_numpy(images).float()[:, None] / 16, torch.from_numpy(classes).long()


def halves(images: Tensor, classes: Tensor) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Split by class into two tasks, and each into three parts: 60, 20 and 20 %."""
    rng = torch.Generator().manual_seed(0)
    tasks = {}
    for name, chosen in (("pretraining", classes < CLASSES), ("adaptation", classes >= CLASSES)):
        order = chosen.nonzero().flatten()
        order = order[torch.randperm(len(order), generator=rng)]
        ends = [round(len(order) * share) for share in (0.6, 0.8)]
        cut = order.tensor_split(ends)
        tasks[name] = {
            part: (images[which], classes[which] % CLASSES)
            for part, which in zip(("train", "validation", "test"), cut, strict=True)
        }
    return tasks


def vit(width: int, layers: int, heads: int) -> nn.Module:
    """Make a small vision transformer with random weights: 16 patches of 2 x 2."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_labels=CLASSES,
    )
    return transformers.ViTForImageClassification(config)


def loss_of(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Return the mean loss of a batch."""
    return functional.cross_entropy(model(pixel_values=images).logits, classes)


@torch.no_grad()
def looked_at(model: nn.Module, part: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return loss and accuracy over a part of the data."""
    model.eval()
    logits = model(pixel_values=part[0]).logits
    model.train()
    right = (logits.argmax(-1) == part[1]).float().mean()
    return functional.cross_entropy(logits, part[1]).item(), right.item()


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    part: tuple[Tensor, Tensor],
    steps: int,
    seed: int,
    every: int,
) -> list[tuple[int, float]]:
    """Train, and return the loss over all of the part at step 0, at the end and between."""
    schedule = warm_up_and_decay(optimizer, steps)
    curve = [(0, looked_at(model, part)[0])]
    order = batches(torch.arange(len(part[1])), BATCH, steps, seed)
    for step, chosen in enumerate(order, start=1):
        loss_of(model, *(x[chosen.to(x.device)] for x in part)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % every == 0 or step == steps:
            curve.append((step, looked_at(model, part)[0]))
    return curve


def start(settings: Mapping[str, Any], request: Request, folder: str) -> Path:
    """Pretrain on the first half of the classes and leave model and data in a file."""
    tasks = halves(*digits(request.data))
    model = vit(**settings["shape"]).to(request.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LR, weight_decay=0.0)
    known = {k: tuple(x.to(request.device) for x in v) for k, v in tasks["pretraining"].items()}
    steps = settings["pretrain_steps"]
    fit(model, optimizer, known["train"], steps, seed=0, every=steps)
    loss, accuracy = looked_at(model, known["test"])
    print(f"pretrained on half of the classes: test loss {loss:.3f}, accuracy {accuracy:.3f}")
    path = Path(folder) / "start.pt"
    torch.save({"model": model.cpu(), "parts": tasks["adaptation"]}, path)
    return path


@functools.lru_cache(maxsize=1)
def loaded(path: Path, device: str) -> dict[str, Any]:
    """Read the file of :func:`start` once per process."""
    return torch.load(path, map_location=device, weights_only=False)


def prepare(base: nn.Module, method: str, rank: int, seed: int) -> nn.Module:
    """Copy the base model, give it a new head, and adapters on every other linear layer."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    head = model.classifier
    with torch.device("cpu"):  # drawn there, so that every device starts alike
        fresh = nn.Linear(head.in_features, head.out_features)
    head.load_state_dict(fresh.state_dict())
    adapter = METHODS[method].adapter
    if adapter is None:
        return model
    inner = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=inner,
        modules_to_save=["classifier"],
        use_dora=adapter == "dora",
    )
    return peft.get_peft_model(model, config)


def train(settings: Mapping[str, Any], path: Path, run: Run) -> dict[str, Any]:
    """Adapt the model once; the seed is that of head, adapter and order of the batches."""
    begun = loaded(path, settings["device"])
    parts = begun["parts"]
    model = prepare(begun["model"], run.method, settings["rank"], run.seed)
    optimizer = make_optimizer(run.method, model, run.lr, settings["backend"])
    curve = fit(model, optimizer, parts["train"], settings["steps"], run.seed, settings["every"])
    test, accuracy = looked_at(model, parts["test"])
    return {
        "steps": [step for step, _ in curve],
        "curve": [loss for _, loss in curve],
        "validation": looked_at(model, parts["validation"])[0],
        "test": test,
        "accuracy": accuracy,
        "state_bytes": state_bytes(optimizer),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def measure(request: Request) -> Document:
    """Compare the methods on one base model."""
    settings = SIZES[request.size]
    asked = settings | {"device": request.device, "backend": request.backend}
    with tempfile.TemporaryDirectory() as folder:
        path = start(settings, request, folder)
        found = study(partial(train, asked, path), COMPARED, settings, request.workers, "dynamics")
    return document("dynamics", request, settings, studies={"digits": found})
