"""Count operators and floating-point operations, which do not depend on how busy a machine is."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# PyTorch has the formulas of attention, but does not know the operator's name on a CPU
FORMULAS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class OperatorCounter(TorchDispatchMode):
    """
    Inside the block, counts calls by operator, and floating-point operations of matrix products and attention.

    Unlike `FlopCounterMode` of PyTorch, it counts attention on a CPU, and works without gradients for a module that
    passes on a parameter.
    """

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # without gradients, composite operators arrive whole
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        self.calls[str(func)] += 1
        if (formula := FORMULAS.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result
