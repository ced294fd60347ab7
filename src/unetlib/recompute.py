"""Blocks whose feature maps are computed again in the backward pass, instead of being kept from the forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(block: nn.Module, *inputs: Tensor) -> Tensor:
    """Run a block and keep its inputs alone for the backward pass, which runs it once more.

    Gradients, dropout and running statistics are those of `block(*inputs)`. From Chen et al., "Training Deep Nets with
    Sublinear Memory Cost", 2016 (arXiv:1604.06174), as `torch.utils.checkpoint` does it.

    Args:
        block: a block of the network.
        inputs: what it takes.

    Returns:
        What it returns.

    Example:
        >>> import torch
        >>> convolution, x = nn.Conv2d(3, 8, 3), torch.rand(1, 3, 20, 30)
        >>> torch.equal(recomputed(convolution, x), convolution(x))
        True
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # whose graphs recompute nothing
        return block(*inputs)  # type: ignore[no-any-return]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _without_statistics(block)

    # torch.compile takes no contexts. Before Inductor, AOTAutograd sees to it that nothing that changes statistics is repeated.
    options: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": contexts}
    output: Tensor = checkpoint(block, *inputs, use_reentrant=False, **options)
    return output


@contextmanager
def _without_statistics(block: nn.Module) -> Iterator[None]:
    """Leave batch norm's running statistics as the forward pass, which has counted the batch, left them.

    It counts on a copy meanwhile: a SyncBatchNorm asks for something to count on.
    """
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, batches) in zip(norms, kept):
        norm.momentum, norm.num_batches_tracked = 0.0, None if batches is None else batches.clone()
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept):
            norm.momentum, norm.num_batches_tracked = momentum, batches
