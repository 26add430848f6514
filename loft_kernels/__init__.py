"""LoFT for LoRA adapters: an AdamW step on the virtual full weight, at LoRA's memory."""

from loft_kernels._version import __version__
from loft_kernels.adapters import LoRAPair, Scaling, find_adapters, loft_param_groups
from loft_kernels.backends import BackendReport, report
from loft_kernels.clipping import clip_grad_norm_
from loft_kernels.integrations.factory import LoFTFactory
from loft_kernels.optimizer import LoFTAdamW, create_loft_optimizer
from loft_kernels.state import state_bytes

__all__ = [
    "BackendReport",
    "LoFTAdamW",
    "LoFTFactory",
    "LoRAPair",
    "Scaling",
    "__version__",
    "clip_grad_norm_",
    "create_loft_optimizer",
    "find_adapters",
    "loft_param_groups",
    "report",
    "state_bytes",
]
