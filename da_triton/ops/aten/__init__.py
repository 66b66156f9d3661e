"""The core and the block in ATen operations."""
