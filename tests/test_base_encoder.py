"""Encoders as bases of classifiers: what each layer gives is the encoder's own, rows leave, language models are refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, RobertaConfig
from transformers.models.bert import BertForPreTraining
from typer.testing import CliRunner

from modeling_anee import AneeForCausalLM, AneeForSequenceClassification
from modeling_anee.classifier_heads import pooled
from modeling_anee.cli.main import app
from modeling_anee.modeling_anee import AneeModel

from .test_fit_classifier import lines, write
from .tiny import LAYERS, SHAPE, VOCABULARY
from .workshop import tiny_tokenizer


SIZES = {**SHAPE, "vocab_size": VOCABULARY, "max_position_embeddings": 24, "type_vocab_size": 2}
KINDS = {"bert": BertConfig, "roberta": RobertaConfig}
PADDING = {"bert": 0, "roberta": 1}
LENGTHS = (12, 5, 9)


def encoder(kind, attn_implementation="sdpa", **fields):
    torch.manual_seed(0)
    config = KINDS[kind](**SIZES, pad_token_id=PADDING[kind], **fields)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return base


def classifier(base, **fields):
    model = AneeForSequenceClassification.from_base(base, labels=3, base_model_name_or_path="tiny/base", **fields)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def padded(kind):
    """Ids, mask and token types int64 [3, 12]."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    types = (torch.arange(max(LENGTHS)) > 3).long().expand_as(ids) * mask
    return ids * mask + PADDING[kind] * (1 - mask), mask, types


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_heads_read_what_the_encoder_computes_of_pairs_and_padded_rows(kind, attention):
    base = encoder(kind, attention)
    model = classifier(base)
    ids, mask, types = padded(kind)
    states = getattr(base, kind)(ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True).hidden_states
    expected = torch.stack([pooled(state, mask.bool(), "mean") for state in states[1:]], dim=1)
    hidden, step = model._entered(ids, mask, token_type_ids=types)
    found = torch.stack(model._features(hidden, step), dim=1)[..., : SHAPE["hidden_size"]]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(model(ids, mask).logits, model(ids, mask, token_type_ids=types).logits)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_row_that_leaves_in_a_batch_is_the_row_alone(kind):
    model = classifier(encoder(kind))
    ids, mask, types = padded(kind)
    sure = model(ids, mask, token_type_ids=types, energy_budget=0.0, exit_rule="fixed").logits.softmax(dim=-1).amax(dim=-1)
    threshold = float(sure.median()) - 1e-3  # of the first head
    together = model(ids, mask, token_type_ids=types, confidence_threshold=threshold)
    assert len(together.exits.unique()) > 1
    for row, length in enumerate(LENGTHS):
        single = model(
            ids[row : row + 1, :length], token_type_ids=types[row : row + 1, :length], confidence_threshold=threshold
        )
        torch.testing.assert_close(single.logits[0], together.logits[row], atol=1e-4, rtol=1e-4)
        assert single.exits == together.exits[row]


@torch.no_grad()
def test_the_first_token_sees_all_others():
    model = classifier(encoder("bert"), pooling="first")
    ids, mask, _ = padded("bert")
    other = ids.clone()
    other[0, -1] = 3 + (ids[0, -1] - 2) % (VOCABULARY - 3)
    before, after = model.features(ids, mask), model.features(other, mask)
    assert not torch.allclose(before[0], after[0]) and torch.allclose(before[1:], after[1:])


def test_layers_may_run_in_8_bits():
    base = encoder("roberta")
    ids, mask, _ = padded("roberta")
    full, rounded = classifier(base)(ids, mask).logits, classifier(base, precision="int8")(ids, mask).logits
    assert not torch.equal(full, rounded)
    torch.testing.assert_close(full, rounded, atol=0.1, rtol=0.1)


def test_an_encoder_is_no_language_model_and_a_decoder_no_encoder():
    for kind in (AneeForCausalLM, AneeModel):
        with pytest.raises(ValueError, match="is an encoder, not a language model"):
            kind.from_base(encoder("bert"))
    with pytest.raises(ValueError, match="is_decoder=True"):
        classifier(encoder("bert", is_decoder=True))


def test_bad_calls_are_named():
    model = classifier(encoder("bert"))
    with pytest.raises(ValueError, match="ready masks are not allowed"):
        model(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 1, 3, 3))
    with pytest.raises(ValueError, match="learned only 24 positions"):
        model(torch.ones(1, 25, dtype=torch.long))


def test_a_checkpoint_of_pretraining_is_fitted_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    BertForPreTraining(BertConfig(**SIZES, pad_token_id=0)).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    data = write(tmp_path / "train.tsv", lines(200, 1))
    call = ["fit-classifier", tmp_path / "base", "--data", data, "--output", tmp_path / "run", "--pooling", "first"]
    done = CliRunner().invoke(app, list(map(str, call)))
    assert done.exit_code == 0, done.output
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "artifact")
    output = loaded(torch.tensor([[5, 6, 7]]), energy_budget=0.5)
    assert output.exits.item() <= LAYERS and output.logits.shape == (1, 2)
