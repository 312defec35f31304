import pytest

from chatglm_ptuning.errors import UserError
from chatglm_ptuning.training.freezing import train_last_layers
from tests.training.conftest import MODELS


@pytest.mark.parametrize("family", MODELS)
def test_last_layer_norm_and_head_are_trained(family: str) -> None:
    model = MODELS[family]()
    train_last_layers(model, 1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    norm = "transformer.final_layernorm" if family == "chatglm" else "model.norm"
    layer = "transformer.layers.1." if family == "chatglm" else "model.layers.1."
    expected = {
        name
        for name, _ in model.named_parameters()
        if name.startswith((layer, norm))
        or (name == "lm_head.weight" and not model.config.tie_word_embeddings)
    }
    assert trained == expected
    assert len(trained) > 5


def test_tied_word_embeddings_stay_frozen() -> None:
    model = MODELS["glm"]()
    model.lm_head.weight = model.model.embed_tokens.weight
    train_last_layers(model, 2)
    assert not model.lm_head.weight.requires_grad
    assert all(p.requires_grad for p in model.model.layers.parameters())


@pytest.mark.parametrize("count", [0, 3])
def test_as_many_layers_as_there_are(count: int) -> None:
    with pytest.raises(
        UserError, match=r"between 1 and the model's 2 layers, got train_last_layers="
    ):
        train_last_layers(MODELS["glm"](), count)
