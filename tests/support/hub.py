"""The package as a kernel of Hugging Face's hub: a directory, and what packaging adds."""

import json
from pathlib import Path

import da_triton


def publish(path):
    variant = path / "build" / "torch-universal"
    variant.mkdir(parents=True)
    (variant / "da_triton").symlink_to(Path(da_triton.__file__).parent)
    (variant / "__init__.py").write_text("from .da_triton import layers\n")
    metadata = {"id": "_da_triton_of_a_test", "name": "da-triton", "version": 1}
    metadata |= {"license": "Apache-2.0", "python-depends": [], "backend": {"type": "cpu"}}
    (variant / "metadata.json").write_text(json.dumps(metadata))
    return path
