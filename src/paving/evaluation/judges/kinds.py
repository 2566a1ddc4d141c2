"""The kinds of judge that a model is loaded for: what may stand behind `hf:` in a judge's line."""

KINDS = ("rubric", "classifier", "wildguard", "llama-guard", "tiered")
