"""The host side of a launch: tiles, arguments, recording, and proofs of the generated code."""
