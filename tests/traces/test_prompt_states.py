"""What a router could read of a prompt: the same figures, whichever blocks are kept."""

from __future__ import annotations

import pytest
import torch

from paving.traces.prompt_states import prompt_states
from paving.traces.store import TraceStore
from tiny_models import some_prompts, tiny_backbone


def test_blocks_that_are_kept_alone_read_as_among_all(tmp_path):
    backbone, prompts = tiny_backbone(), some_prompts()[:3]
    every = prompt_states(backbone, TraceStore(tmp_path), prompts)
    some = prompt_states(backbone, TraceStore(tmp_path), prompts, blocks=(4, 1, 4))
    for p in prompts:
        assert some[p.id].blocks == (1, 4) and len(some[p.id].last) == 2
        assert some[p.id].last.untyped_storage().nbytes() == some[p.id].last.numel() * some[p.id].last.element_size()
        for pooling in ("last", "mean", "last+mean"):
            assert torch.equal(some[p.id].features((4, 1), pooling), every[p.id].features((4, 1), pooling))
        with pytest.raises(ValueError, match="not in"):
            some[p.id].features((2,), "last")
