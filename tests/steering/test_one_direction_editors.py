"""Ablation, addition and orthogonalisation: what is left of a direction, per row, and that the model is left as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from paving.backbone import BackboneError, as_backbone, render_batch
from paving.backbone.hooks import record_residuals
from paving.backbone.weights import same_bits
from paving.backbone.writers import block_writers, stream_tensors
from paving.compare.methods import EVERYWHERE
from paving.generation import Decoding, generate
from paving.prompts.types import Bucket
from paving.steering.ablation import Ablation
from paving.steering.addition import Addition
from paving.steering.checks import SteeringError
from paving.steering.orthogonal import Orthogonal, orthogonalised
from paving.steering.routing import Global, Labelled
from paving.steering.row_edits import ablating, row_edit
from paving.steering.steered import Steered
from tiny_models import CONFIGS, HIDDEN, hooks_on, logits_of, prompt, tiny_backbone, tiny_model, tiny_tokenizer

VECTOR = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(3))
UNIT = VECTOR / VECTOR.norm()
EDITORS = {
    "ablation": Ablation(UNIT),
    "addition": Addition(VECTOR, 2),
    "addition-answer": Addition(VECTOR, 2, "answer"),
    "orthogonal": Orthogonal(UNIT),
}
every_editor = pytest.mark.parametrize("editor", EDITORS.values(), ids=EDITORS.keys())


def six():
    return [prompt(f"p{i}", range(10 * i, 10 * i + 4 + i), list(Bucket)[i % 3]) for i in range(6)]


def with_lively_biases(model):
    """Fresh models have biases of 0 and norms of 1, behind which a mistake would hide."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or ".ln_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def lively_backbone(architecture: str, *, tied: bool | None = None):
    model = tiny_model(architecture)
    if tied is not None:
        config = CONFIGS[architecture]()
        config.tie_word_embeddings = tied
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = type(model)(config)
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert (head.data_ptr() == embedding.data_ptr()) == tied
    return as_backbone(with_lively_biases(model), tiny_tokenizer(), f"tiny-{architecture}")


@pytest.fixture(scope="module")
def llama():
    return tiny_backbone()


@pytest.fixture(scope="module")
def batch(llama):
    return render_batch(llama, six())


def added_to_the_stream(backbone) -> list[nn.Module]:
    """Attention and FFN outputs, written down by hand per family."""
    inner = {"gpt2": ("attn", "mlp")}
    normed = ("post_attention_layernorm", "post_feedforward_layernorm")
    names = dict.fromkeys(("gemma2", "gemma3", "olmo2"), normed) | inner
    chosen = names.get(backbone.name.removeprefix("tiny-"), ("self_attn", "mlp"))
    return [getattr(block, name) for block in backbone.layers for name in chosen]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_an_ablated_direction_has_no_component_left_wherever_it_is_removed(architecture):
    backbone = lively_backbone(architecture)
    batch = render_batch(backbone, six())
    strength = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    seen: list[torch.Tensor] = []

    def first(output):
        return output if isinstance(output, torch.Tensor) else output[0]

    with Ablation(UNIT).editing(backbone, batch, strength):
        # Registered behind the editor's hooks, so that they see what goes on to the rest of the model.
        handles = [block.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0])) for block in backbone.layers]
        handles += [
            m.register_forward_hook(lambda _m, _i, output: seen.append(first(output))) for m in added_to_the_stream(backbone)
        ]
        handles.append(backbone.layers[-1].register_forward_hook(lambda _m, _i, output: seen.append(first(output))))
        ablated = logits_of(backbone, batch)
        for handle in handles:
            handle.remove()
    assert len(seen) == 3 * backbone.n_layers + 1
    for state in seen:
        scale = state.norm(dim=-1).max()
        assert float((state[strength > 0] @ UNIT).abs().max() / scale) < 1e-5
        assert float((state[strength == 0] @ UNIT).abs().max() / scale) > 1e-3
    assert not torch.allclose(ablated[0], logits_of(backbone, batch)[0], atol=1e-2)


def test_half_an_ablation_leaves_half_of_what_is_written(llama, batch):
    """Followed by hand through the first block: its input, then what its two parts add."""
    seen, raw = {}, {}
    block = llama.layers[0]
    with Ablation(UNIT).editing(llama, batch, torch.full((6,), 0.5)):
        handles = [
            block.register_forward_pre_hook(lambda _m, inputs: seen.update(block=inputs[0])),
            block.self_attn.register_forward_hook(lambda _m, _i, output: seen.update(attention=output[0])),
            block.mlp.register_forward_hook(lambda _m, _i, output: seen.update(ffn=output)),
            llama.layers[1].register_forward_pre_hook(lambda _m, inputs: seen.update(next=inputs[0])),
        ]
        logits_of(llama, batch)
        for handle in handles:
            handle.remove()

    def half(x):
        return x - 0.5 * (x @ UNIT)[..., None] * UNIT

    embedded = llama.model.get_input_embeddings()(batch.input_ids)
    torch.testing.assert_close(seen["block"], half(embedded))
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    handle = block.self_attn.register_forward_hook(lambda _m, _i, output: raw.update(attention=output[0]))
    llama.model(inputs_embeds=half(embedded), attention_mask=batch.attention_mask, position_ids=positions)
    handle.remove()
    torch.testing.assert_close(seen["attention"], half(raw["attention"]))
    between = seen["block"] + seen["attention"]
    torch.testing.assert_close(seen["ffn"], half(block.mlp(block.post_attention_layernorm(between))))
    torch.testing.assert_close(seen["next"], half(between + seen["ffn"]))  # what is k blocks old has lost k + 1 halves


@pytest.mark.parametrize("strength", [0.005, 0.02, 0.1, 0.4])
def test_bfloat16_takes_away_nearly_what_is_asked_from_the_smallest_scale_that_is_tried_on(strength):
    """A step of bfloat16 is 0.4 % of a coordinate: below the smallest scale tried, most of the change is rounded away."""
    g = torch.Generator().manual_seed(0)
    unit = torch.randn(576, generator=g)
    unit = unit / unit.norm()
    states = torch.randn(64, 1, 576, generator=g)
    states = (states - (states @ unit)[..., None] * unit + 0.2 * 576**0.5 * unit).to(torch.bfloat16)  # cosine of about 0.2
    batch = SimpleNamespace(width=1)
    edited = row_edit(ablating(unit), torch.full((64,), strength), batch)(states)
    share = 1 - (edited.float() @ unit).sum() / (states.float() @ unit).sum()
    if strength < min(EVERYWHERE):
        assert share.item() < 0.7 * strength
    else:
        assert share.item() == pytest.approx(strength, rel=0.15)


@pytest.mark.parametrize(("architecture", "tied"), [(a, t) for a in ("llama", "gpt2") for t in (True, False)])
def test_orthogonalised_weights_are_run_time_ablation(architecture, tied):
    backbone = lively_backbone(architecture, tied=tied)
    batch = render_batch(backbone, six())
    one = torch.ones(6)
    base = logits_of(backbone, batch)
    head = backbone.model.get_output_embeddings().weight.clone()
    with Ablation(UNIT).editing(backbone, batch, one):
        ablated = logits_of(backbone, batch)
    with Orthogonal(UNIT).editing(backbone, batch, one):
        assert torch.equal(backbone.model.get_output_embeddings().weight, head)
        orthogonal = logits_of(backbone, batch)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(orthogonal[real], ablated[real], atol=1e-4, rtol=0)
    assert float((ablated - base)[real].abs().max()) > 0.1


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "mistral", "phi3"])
def test_the_other_families_are_orthogonalised_too(architecture):
    backbone = lively_backbone(architecture)
    batch = render_batch(backbone, six())
    with Ablation(UNIT).editing(backbone, batch, torch.ones(6)):
        ablated = logits_of(backbone, batch)
    with Orthogonal(UNIT).editing(backbone, batch, torch.ones(6)):
        orthogonal = logits_of(backbone, batch)
    real = batch.attention_mask.bool()
    torch.testing.assert_close(orthogonal[real], ablated[real], atol=1e-4, rtol=0)


def test_the_formula_on_each_kind_of_weight():
    """W − r rᵀ W by plain matrix products in float64: outputs of a Linear, of a Conv1D, an embedding's rows, a bias."""
    generator = torch.Generator().manual_seed(1)
    linear, conv = torch.randn((HIDDEN, 7), generator=generator), torch.randn((7, HIDDEN), generator=generator)
    unit, projector = UNIT.double(), torch.eye(HIDDEN).double() - torch.outer(UNIT, UNIT).double()
    torch.testing.assert_close(orthogonalised(linear, UNIT, 0).double(), projector @ linear.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(orthogonalised(conv, UNIT, -1).double(), conv.double() @ projector, atol=1e-6, rtol=0)
    bias = orthogonalised(conv[0], UNIT, -1).double()
    torch.testing.assert_close(bias, conv[0].double() - (conv[0].double() @ unit) * unit, atol=1e-6, rtol=0)
    assert orthogonalised(linear.bfloat16(), UNIT, 0).dtype == torch.bfloat16


def test_everything_that_writes_to_the_stream_is_found():
    def names(backbone):
        owners = {id(m): name for name, m in backbone.model.named_modules()}
        return {f"{owners[id(t.module)]}.{t.name}" for t in stream_tensors(backbone)}

    llama, gpt2 = names(tiny_backbone()), names(tiny_backbone("gpt2"))
    block = {f"model.layers.{i}.{n}.weight" for i in range(6) for n in ("self_attn.o_proj", "mlp.down_proj")}
    assert llama == {"model.embed_tokens.weight", *block}
    block = {f"transformer.h.{i}.{n}.c_proj.{p}" for i in range(6) for n in ("attn", "mlp") for p in ("weight", "bias")}
    assert gpt2 == {"transformer.wte.weight", "transformer.wpe.weight", *block}


@every_editor
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_model_is_left_bit_for_bit_also_on_an_error(architecture, editor):
    backbone = lively_backbone(architecture)
    batch = render_batch(backbone, six())
    parameters = dict(backbone.model.named_parameters(remove_duplicate=False))
    bits = {name: p.detach().clone() for name, p in parameters.items()}
    base = logits_of(backbone, batch)
    for error in (False, True):
        try:
            with editor.editing(backbone, batch, torch.ones(6)):
                assert not torch.equal(logits_of(backbone, batch), base)
                if error:
                    raise KeyError
        except KeyError:
            assert error
        after = dict(backbone.model.named_parameters(remove_duplicate=False))
        assert list(after) == list(parameters)
        assert all(after[name] is parameters[name] and same_bits(after[name], bits[name]) for name in bits)
        assert hooks_on(backbone.model) == []
        assert torch.equal(logits_of(backbone, batch), base)


def test_an_error_half_way_through_the_weights_puts_back_those_that_were_changed(llama, batch, monkeypatch):
    before = {name: p for name, p in llama.model.named_parameters()}
    count = iter(range(100))

    def failing(*args):
        if next(count) == 5:
            raise MemoryError
        return orthogonalised(*args)

    monkeypatch.setattr("paving.steering.orthogonal.orthogonalised", failing)
    with pytest.raises(MemoryError), Orthogonal(UNIT).editing(llama, batch, torch.ones(6)):
        pass
    assert all(p is before[name] for name, p in llama.model.named_parameters())


@pytest.mark.parametrize("name", ["ablation", "addition", "addition-answer"])
def test_each_row_is_edited_at_its_own_strength_as_it_is_alone(llama, batch, name):
    strength = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.0, 0.25])
    with EDITORS[name].editing(llama, batch, strength):
        together = logits_of(llama, batch)
    base = logits_of(llama, batch)
    for row, (one, s) in enumerate(zip(six(), strength, strict=True)):
        alone = render_batch(llama, [one])
        with EDITORS[name].editing(llama, alone, s[None]):
            by_itself = logits_of(llama, alone)[0]
        torch.testing.assert_close(together[row, -alone.width :], by_itself, atol=1e-4, rtol=0)
        if s == 0:
            assert torch.equal(together[row], base[row])


@every_editor
def test_answers_of_a_batch_are_those_of_its_prompts_alone(llama, editor):
    routing = Global() if isinstance(editor, Orthogonal) else Labelled()
    steered = Steered("s", editor, routing, 1.0, llama.name, llama.fingerprint)
    short = Decoding(max_new_tokens=5)
    together = generate(llama, six(), steered, short)
    alone = [generate(llama, [p], steered, short)[0] for p in six()]
    assert [c.response for c in together] == [c.response for c in alone]


def test_addition_moves_one_blocks_output_by_the_vector(llama, batch):
    with record_residuals(llama, (2,)) as base:
        logits_of(llama, batch)
    for positions, first in (("all", 0), ("answer", batch.width - 1)):
        with (
            Addition(VECTOR, 2, positions).editing(llama, batch, torch.full((6,), 4.0)),
            record_residuals(llama, (2,)) as seen,
        ):
            logits_of(llama, batch)
        moved = seen[2] - base[2]
        torch.testing.assert_close(moved[:, first:], (4 * VECTOR).expand_as(moved[:, first:]), atol=1e-4, rtol=0)
        assert not moved[:, :first].any()


def test_strengths_that_an_editor_cannot_honour_are_refused(llama, batch):
    with pytest.raises(SteeringError, match="from 0 to 1"), Ablation(UNIT).editing(llama, batch, torch.full((6,), 2.0)):
        pass
    for strength in (torch.full((6,), 0.5), torch.tensor([1.0, 0, 1, 1, 1, 1])):
        with pytest.raises(SteeringError, match="the same for every row"), Orthogonal(UNIT).editing(llama, batch, strength):
            pass
    for editor in EDITORS.values():
        with editor.editing(llama, batch, torch.ones(6)):
            pass


@pytest.mark.parametrize("wrong", [2 * UNIT, UNIT.double(), UNIT[None], UNIT * float("nan")])
def test_a_direction_that_is_no_unit_vector_is_refused(wrong):
    for editor in (Ablation, Orthogonal):
        with pytest.raises(SteeringError, match="length 1"):
            editor(wrong)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "olmo2"])
def test_weights_behind_a_norm_are_not_orthogonalised(architecture):
    backbone = tiny_backbone(architecture)
    assert all(w.normed for w in block_writers(backbone))
    batch = render_batch(backbone, six())
    with (
        pytest.raises(BackboneError, match="Ablate it at run time"),
        Orthogonal(UNIT).editing(backbone, batch, torch.ones(6)),
    ):
        pass


def test_weights_and_blocks_of_another_kind_are_refused():
    class Quantised(nn.Linear):
        pass

    def refused(change, match):
        backbone = tiny_backbone()
        change(backbone)
        with pytest.raises(BackboneError, match=match):
            stream_tensors(backbone)

    width = {"in_features": HIDDEN, "out_features": HIDDEN, "bias": False}
    refused(lambda b: setattr(b.layers[3].self_attn, "o_proj", Quantised(**width)), "layer 3 .* is a Quantised")
    refused(lambda b: b.layers[1].mlp.down_proj.to(torch.float64), "layer 1 .*quantised")
    refused(lambda b: setattr(b.layers[2], "cross_attn", nn.Linear(2, 2)), "layer 2 .*has the parts .*cross_attn")
    refused(lambda b: delattr(b.layers[2].self_attn, "o_proj"), "cannot find the output projection")
    refused(lambda b: setattr(b.model.get_decoder(), "project_in", nn.Linear(2, 2)), "cannot tell which embeddings")
    refused(lambda b: setattr(b.layers[0], "extra_norm", nn.Identity()), "layer 0 .*has the parts .*extra_norm")
