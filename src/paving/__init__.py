"""Selective refusal editing of open-weight language models.

import paving

model = paving.load(controller="my-run")  # on its own base; behaves as the Hugging Face model does
inputs = model.inputs_of(texts)  # or conversations; rendered as for training
output, rows = model.generate(**inputs, max_new_tokens=64, return_gates=True)
print(model.tokenizer.batch_decode(output, skip_special_tokens=True), rows[0].gate)
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("paving")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["PavedModel", "__version__", "load"]


def __getattr__(name: str):
    # torch and transformers take seconds to import; `import paving` and `paving --help` should not wait for them.
    if name == "load":
        from paving.controller.paved_model import load_paved

        return load_paved
    if name == "PavedModel":
        from paving.controller.paved_model import PavedModel

        return PavedModel
    raise AttributeError(f"module 'paving' has no attribute {name!r}")
