"""Several devices: context parallelism over positions, and DTensor sharding rules."""

from .context_parallel import wire_bytes
from .dtensor import register_dtensor

__all__ = ["register_dtensor", "wire_bytes"]
