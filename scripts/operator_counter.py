"""Count operators and floating-point operations, which do not depend on how busy a machine is."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class OperatorCounter(TorchDispatchMode):
    """
    Inside the block, counts calls by operator, and floating-point operations of matrix products and attention.

    Unlike `FlopCounterMode` of PyTorch, it also works without gradients for a module that passes on a parameter.
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
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result
