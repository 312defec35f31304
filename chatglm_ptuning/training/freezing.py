"""Full fine-tuning of the last layers only: the lower ones keep what they know and cost no optimizer state."""

from transformers import PreTrainedModel

from chatglm_ptuning.errors import UserError


def train_last_layers(model: PreTrainedModel, count: int) -> None:
    """Train the last layers, the final norm and an output layer that is not tied to the word embeddings.

    Raises:
        UserError: The model has fewer layers.
    """
    decoder = model.get_decoder()
    if not 1 <= count <= len(decoder.layers):
        raise UserError(
            f"adapter.train_last_layers must be between 1 and the model's {len(decoder.layers)} layers, "
            f"got train_last_layers={count!r}"
        )
    words = model.get_input_embeddings()
    model.requires_grad_(False)
    above = [part for part in decoder.children() if part not in (decoder.layers, words)]
    for part in (*decoder.layers[-count:], *above, model.get_output_embeddings()):
        part.requires_grad_(True)
    words.requires_grad_(False)  # a tied output layer is these
