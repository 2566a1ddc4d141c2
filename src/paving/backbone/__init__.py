"""Load a causal LM, find its decoder layers, render chats, fingerprint it. Everything here leaves the model frozen."""

from paving.backbone.chat import PromptBatch, checked_ids, pad_left, prompt_ids, render_batch, render_ids, render_messages
from paving.backbone.embedded import EMBEDDED, cache_dir
from paving.backbone.layers import BackboneError, ChatTemplateError, decoder_layers
from paving.backbone.load import Backbone, as_backbone, load_backbone

__all__ = [
    "EMBEDDED",
    "Backbone",
    "BackboneError",
    "ChatTemplateError",
    "PromptBatch",
    "as_backbone",
    "cache_dir",
    "checked_ids",
    "decoder_layers",
    "load_backbone",
    "pad_left",
    "prompt_ids",
    "render_batch",
    "render_ids",
    "render_messages",
]
