"""What torch.export does not need while it traces."""

from __future__ import annotations

from contextlib import AbstractContextManager


def without_dispatch_cache() -> AbstractContextManager[None]:
    """Trace without torch's cache of what an op gives for tensors without data.

    Where sizes are symbols, an entry is seldom read again and costs more to make than the op: a small decoder traces
    in two thirds of the time without it, one of thirty layers in six sevenths.
    """
    import torch._dynamo  # loaded by torch.export, too, and not before it is called

    cache: AbstractContextManager[None] = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    return cache
