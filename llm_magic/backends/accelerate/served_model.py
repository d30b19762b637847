"""The modules of a model that the CPU computes by kernels of ours."""

from __future__ import annotations

from typing import Any

from llm_magic.backends.accelerate.experts.plain_experts import is_module_of_experts, serve_plain_experts
from llm_magic.backends.accelerate.experts.plain_routers import serve_plain_router
from llm_magic.backends.accelerate.kernels import cpu_products
from llm_magic.backends.accelerate.served.cpu_linear import serve_linear
from llm_magic.backends.accelerate.served.recurrent_steps import serve_recurrent_steps


def serve_plain_modules(model: Any) -> None:
    """Let what is in 16 bits, and routers, compute by our kernels with as many tokens as they are quicker with than torch."""
    import torch

    for module in model.modules():
        if type(module) is torch.nn.Linear:
            if cpu_products.few_plain_tokens(module.weight.dtype):
                serve_linear(module)
        elif is_module_of_experts(module):
            serve_plain_experts(module)
        elif any(map(is_module_of_experts, module.children())):
            for child in module.children():
                if not isinstance(child, (torch.nn.Linear, torch.nn.Embedding)):
                    serve_plain_router(child)
        else:
            serve_recurrent_steps(module)
