"""Small models of the transformers library with random weights, as it builds them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
from any_network import seed
from late import Late
from torch import Tensor, nn
from zoo_images import images
from zoo_sequences import labels, tokens, words

from kfacore import KFAC

transformers = Late("transformers")
pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")

SMALL: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}


class T5(nn.Module):
    """Its two inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.T5Config(
            vocab_size=11, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        self.net = transformers.T5ForConditionalGeneration(config)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Any:
        return self.net(input_ids=batch[0], decoder_input_ids=batch[1])


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(vocab_size=11, num_hidden_layers=2, max_position_embeddings=16, **SMALL)
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=11, num_hidden_layers=1, max_position_embeddings=16, num_labels=4, hidden_dropout_prob=0.01, **SMALL
    )
    return transformers.BertForSequenceClassification(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_hidden_layers=1, num_labels=4, **SMALL)
    return transformers.ViTForImageClassification(config)


def translated() -> tuple[nn.Module, Any, Tensor, Any]:
    x = tokens(t=5)
    return T5(), (x, x.roll(1, 1)), x, nn.CrossEntropyLoss()


MODELS: dict[str, Any] = {
    "GPT-2": lambda: words(gpt2()),
    "Llama": lambda: words(llama()),
    "BERT": lambda: (bert(), tokens(), labels(tokens()), "categorical"),
    "T5": translated,
    "ViT": lambda: (vit(), *images(), "categorical"),
}


@pytest.mark.parametrize("name", MODELS)
def test_steps_lower_the_loss_and_every_parameter_has_its_block(name: str) -> None:
    seed()
    model, x, y, likelihood = MODELS[name]()
    optimizer = KFAC(model, likelihood=likelihood, approx="tridiag" if name in ("GPT-2", "T5") else "blockdiag")
    losses = [float(optimizer.step(x, y).loss) for _ in range(10)]
    assert losses[-1] < losses[0]
    listed = {param.partition("[")[0] for layer in optimizer.linearizer.layers for param in layer.info.params}
    assert listed == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    kinds = {layer.info.kind for layer in optimizer.linearizer.layers}
    assert "diagonal" not in kinds - ({"diagonal"} if name == "ViT" else set())  # its class token and positions
