"""Several devices: context parallelism over positions, and DTensor sharding rules."""
