"""What a training run needs of memory, told from config.json alone: nothing is loaded.

The network and what is trained are made on the meta device, so parameters are counted, not guessed. The rest, in bytes:

- gradients: 4 for each trained parameter (they are float32, and so is what AdamW adds: two moments, Kingma and Ba,
  arXiv 1412.6980; other optimizers are in `STATE_BYTES`). Adafactor's second moment is a row and a column a matrix
  (Shazeer and Stern, arXiv 1804.04235).
- 4-bit weights: half a byte, and for each block of 64 one scale of a byte, itself scaled by one float32 for each 256
  blocks (QLoRA, arXiv 2305.14314, section 3): 0.516. 8-bit weights: one byte, and a float32 a row (arXiv 2208.07339).
- activations: what autograd keeps of one layer, times the layers that a gradient passes, and a working space. With T
  tokens in the batch, B rows of S tokens, P virtual tokens before them, H hidden size, A attention width (heads *
  head_dim), F width of the feed-forward part, c bytes of the dtype of computation, r those of a norm's input (GLM's
  RMSNorm computes in float32; ChatGLM-6B's LayerNorm in the dtype of its weights):

      norms          2 T H r            the input of each
      attention      2 T A c            query and output
                     2 B (S + P) A c    keys and values; grouped heads are repeated before a kernel that takes a mask
                     2 T A c            ChatGLM-6B without a prefix: values are a view of the fused q, k, v
                     B S (S + P) c      the mask, made floating-point in each layer
                     4 T heads          logarithms of the sums of the softmax (FlashAttention, arXiv 2205.14135)
      feed-forward   T F c              ChatGLM-6B: the input of GELU
                     3 T F c            GLM: gate, up, SiLU of the gate
      prefix         2 B P K D c        dropout's mask of K key-value heads of D channels (`prefix.of_layer`)

  A frozen linear layer needs no input of its own for the backward pass; where all weights are trained, it does:

      ChatGLM-6B     T (2 H + F) c      outputs of both norms, output of GELU
      GLM            2 T H r + T (2 H + A + F) c   also what both norms multiply by their weights, the context

  Adapters of peft keep, for each layer they adapt, of `in` and `out` channels: LoRA its input in float32 and dropout's
  mask, T in (4 + 4 on a CPU, 4 + 1 on a GPU); without dropout in a float32 model q, k and v share that input. DoRA
  2 T out c and the weight once more; IA3 what it scales.
- gradient checkpointing (Chen et al., arXiv 1604.06174): the input of every layer, T H values, and all of the above of
  one layer at a time.
- working space, the larger of two moments of the backward pass: at the loss, of N labelled tokens (logits exist only
  there) and V words, 12 N V: log-probabilities, their gradient, the logits' gradient, all in float32; in one layer,
  gradients of what lies inside the feed-forward part, 2 T F c in ChatGLM-6B and 6 T F c in GLM.

The peak: activations and gradients are not there in full together, since each layer's go as its gradients come, so the
larger counts; with gradient accumulation, several processes or DeepSpeed both do. DeepSpeed divides by the number of
processes (ZeRO, arXiv 1910.02054, section 5): optimizer state and a float32 copy of what is trained from stage 1 on,
gradients from stage 2 on, weights in stage 3, where one layer is whole at a time.

Not counted: generation in evaluation, the CUDA context (some 0.5 GiB), the allocator's gaps. On a CPU, Python and the
libraries are counted as they are in this process.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from chatglm_ptuning.config import RunConfig
from chatglm_ptuning.errors import UserError
from chatglm_ptuning.evaluation.metrics import segmenter
from chatglm_ptuning.memory import peak_resident
from chatglm_ptuning.models.loading import (
    build_released,
    checkpoint_directory,
    read_json,
    resolve_device,
    resolve_dtype,
    tie_head,
)
from chatglm_ptuning.models.quantization import check_bits, is_quantizable
from chatglm_ptuning.models.tokenizer_loading import load_tokenizer
from chatglm_ptuning.training.arguments import RunArguments
from chatglm_ptuning.training.run import ADAPTER, base_dtype, train_weights, training_settings
from chatglm_ptuning.tuners import PrefixTuningConfig, PromptTuningConfig, add_adapter
from chatglm_ptuning.tuners.prompt_encoder import SoftPromptConfig

# `training.optim` -> bytes of state for each trained parameter; adafactor's depends on the shapes
STATE_BYTES = {
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "adagrad": 4,
    "rmsprop": 4,
    "lion_32bit": 4,
    "lion_8bit": 1,
    "sgd": 0,
}
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # one name or the other


@dataclass(frozen=True)
class Batch:
    """What one forward pass of one device gets.

    Args:
        rows: B.
        length: S; a soft prompt is part of it.
        prefix: P, virtual tokens of P-Tuning v2.
        labelled: N.
        dtype_bytes: c.
        norm_bytes: r.
        residual_bytes: Of the stream that runs through the layers.
        is_on_gpu: Dropout then keeps its mask in one byte an entry, on a CPU in the dtype of what it drops.
    """

    rows: int
    length: int
    prefix: int
    labelled: int
    dtype_bytes: int
    norm_bytes: int
    residual_bytes: int
    is_on_gpu: bool

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows * self.length


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device.

    Args:
        weights: The base.
        adapter: What is trained beside it; 0 where the base itself is.
        gradients: Of what is trained.
        optimizer: Its state.
        activations: What a forward pass keeps for the backward pass, and the working space.
        libraries: Python and all that is imported; 0 on a GPU.
        are_together: Whether gradients and activations exist in full at the same time.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    libraries: int
    are_together: bool

    @property
    def total(self) -> int:
        """At the peak of a step."""
        passing = (self.gradients, self.activations)
        kept = self.weights + self.adapter + self.optimizer + self.libraries
        return kept + (sum(passing) if self.are_together else max(passing))

    def text(self) -> str:
        """For the terminal."""
        names = [field.name for field in fields(self) if field.name != "are_together"]
        rule = "" if self.are_together else ", of gradients and activations the larger"
        return "\n".join(
            [
                "memory of one device at the peak of a training step, estimated; nothing was loaded",
                *(f"{name:<12}{getattr(self, name) / 2**30:>9.3f} GiB" for name in names),
                f"{'total':<12}{self.total / 2**30:>9.3f} GiB{rule}",
                "not counted: generation in evaluation",
            ]
        )


def estimate(config: RunConfig) -> Estimate:
    """Estimate a run.

    Raises:
        UserError: The config or config.json is wrong, or the state of the optimizer is not known here.
    """
    defaults: dict[str, Any] = {field.name: field.default for field in fields(RunArguments)}
    settings = defaults | training_settings(config)
    device = resolve_device("cpu" if settings["use_cpu"] else config.model.device)
    libraries = 0
    if device.type == "cpu":
        segmenter()  # its dictionary is there once a run's trial generation was scored
        libraries = peak_resident()
    dtype, bits = resolve_dtype(base_dtype(config), device), config.model.quantization_bit
    check_bits(bits)
    model = base_on_meta(config.model.path, dtype)
    quantized = quantized_layers(model) if bits is not None else []
    weights = weight_bytes(model, quantized, bits)
    base = {id(parameter) for parameter in model.parameters()}
    tuner = add_trained(model, config)
    adapter = sum(p.nbytes for p in model.parameters() if id(p) not in base)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in trained)
    optimizer = optimizer_bytes(trained, settings["optim"])
    batch = make_batch(config, settings, tuner, model.config.model_type, dtype, device)
    activations = activation_bytes(model, batch, any(settings.get(n) for n in CHECKPOINTING))
    if quantized:  # one weight at a time is made whole again
        activations += max(weight.numel() for weight in quantized) * dtype.itemsize
    processes = number_of_processes()
    if settings["deepspeed"]:
        zero = read_zero(settings["deepspeed"])
        stage, optimizer = zero.get("stage", 0), optimizer + gradients  # a float32 copy to update
        if stage >= 1:
            optimizer = on_device(optimizer, processes, zero.get("offload_optimizer"))
        if stage >= 2:
            gradients = on_device(gradients, processes, None)
        if stage >= 3:
            layer = sum(p.nbytes for p in model.get_decoder().layers[0].parameters())
            weights = on_device(weights, processes, zero.get("offload_param")) + layer
    return Estimate(
        weights=weights,
        adapter=adapter,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        libraries=libraries,
        are_together=settings["gradient_accumulation_steps"] > 1
        or processes > 1
        or bool(settings["deepspeed"]),
    )


def base_on_meta(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """The network of a checkpoint directory, without weights.

    Raises:
        UserError: It is no such directory, or its config.json is wrong.
    """
    directory = checkpoint_directory(path)
    content = read_json(directory / "config.json")
    if content.get("model_type") == "chatglm":
        model = build_released(directory, content, dtype).to(dtype)
    else:
        try:
            native = AutoConfig.from_pretrained(directory, local_files_only=True)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(native, dtype=dtype)
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split()).rstrip(". ")
            raise UserError(
                f"{directory / 'config.json'} must be one that transformers can read, got an error: {reason};"
                " copy it again"
            ) from error
    tie_head(model)
    return model.train()


def quantized_layers(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights that are quantised."""
    paths = [path for path, _ in model.named_modules() if is_quantizable(model, path)]
    return [model.get_parameter(f"{path}.weight") for path in paths]


def weight_bytes(
    model: PreTrainedModel, quantized: Sequence[nn.Parameter], bits: int | None
) -> int:
    """Bytes of the base with some weights [out, in] quantised."""
    whole = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in quantized)
    if bits == 4:
        sizes = [p.numel() / 2 + p.numel() / 64 + 4 * p.numel() / (64 * 256) for p in quantized]
    else:
        sizes = [p.numel() + 4 * p.shape[0] for p in quantized]
    return whole + round(sum(sizes))


def add_trained(model: PreTrainedModel, config: RunConfig) -> Any:
    """Make trainable what the run trains.

    Returns:
        The tuner's config; None where it is the base itself.
    """
    tuner = config.adapter.tuner_config()
    if tuner is None:
        train_weights(model, config)
        return None
    if isinstance(tuner, PromptTuningConfig):  # a text to start from gives no other size
        tuner = PromptTuningConfig(tuner.num_virtual_tokens)
    text = config.adapter.init_text
    if text is not None and "num_virtual_tokens" not in config.adapter.settings:
        ids = load_tokenizer(config.model.path).encode_ordinary(text)
        tuner = replace(tuner, num_virtual_tokens=len(ids))
    with torch.device("meta"):
        add_adapter(model, tuner, ADAPTER)
    return tuner


def optimizer_bytes(trained: Sequence[nn.Parameter], name: str) -> int:
    """State of an optimizer, by its name in `training.optim`.

    Raises:
        UserError: It is not known here.
    """
    name = getattr(name, "value", name)
    if name == "adafactor":  # without momentum, as transformers makes it
        return sum(
            4 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.ndim > 1 else p.numel())
            for p in trained
        )
    if name not in STATE_BYTES:
        raise UserError(
            f"training.optim must be one of {', '.join(STATE_BYTES)}, adafactor for an estimate, got optim={name!r};"
            " estimate with adamw_torch, which keeps most"
        )
    return STATE_BYTES[name] * sum(p.numel() for p in trained)


def make_batch(
    config: RunConfig,
    settings: dict[str, Any],
    tuner: Any,
    family: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Batch:
    """The largest batch of a run: every row as long as the config allows."""
    data, rows = config.data, settings["per_device_train_batch_size"]
    limit = data.max_source_length + data.max_target_length
    length = data.packed_length if data.packing else limit
    is_autocast = bool(settings["bf16"] or settings["fp16"])
    return Batch(
        rows=rows,
        length=length + (tuner.num_virtual_tokens if isinstance(tuner, SoftPromptConfig) else 0),
        prefix=tuner.num_virtual_tokens if isinstance(tuner, PrefixTuningConfig) else 0,
        labelled=rows * length * data.max_target_length // limit,
        dtype_bytes=2 if is_autocast else dtype.itemsize,
        norm_bytes=4 if is_autocast or family != "chatglm" else dtype.itemsize,
        residual_bytes=dtype.itemsize,
        is_on_gpu=device.type == "cuda",
    )


def activation_bytes(model: PreTrainedModel, batch: Batch, is_checkpointed: bool) -> int:
    """What a forward pass keeps, and the working space of the backward pass; see the module's docstring."""
    config, layers = model.config, list(model.get_decoder().layers)
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not (batch.prefix or is_trained(words) or hasattr(model.get_decoder(), "prompt_tuning")):
        first = next(i for i, layer in enumerate(layers) if is_trained(layer))
        layers = layers[first:]  # no gradient passes the ones below
    kept = [layer_bytes(layer, config, batch) for layer in layers]
    inner = 2 if config.model_type == "chatglm" else 6
    layer_work = inner * batch.tokens * config.intermediate_size * batch.dtype_bytes
    logits = 4 * batch.labelled * config.vocab_size
    gradient = head.weight.nbytes if is_trained(head) else 0
    loss_work = max(3 * logits, logits + gradient)
    outside = batch.tokens * config.hidden_size * batch.norm_bytes  # the last norm's input
    shape: Any = PrefixTuningConfig().fit(config)
    outside += 4 * batch.prefix * 2 * len(layers) * shape.num_key_value_heads * shape.head_dim
    if is_checkpointed:
        inputs = batch.tokens * config.hidden_size * batch.residual_bytes * len(layers)
        return inputs + outside + max(loss_work, max(kept) + layer_work)
    return sum(kept) + outside + max(loss_work, layer_work)


def layer_bytes(layer: nn.Module, config: PreTrainedConfig, batch: Batch) -> int:
    """What autograd keeps of one layer."""
    tokens, bytes_, hidden = batch.tokens, batch.dtype_bytes, config.hidden_size
    heads, inner, is_chatglm = (
        config.num_attention_heads,
        config.intermediate_size,
        config.model_type == "chatglm",
    )
    shape: Any = PrefixTuningConfig().fit(config)
    attended, width = batch.rows * (batch.length + batch.prefix), heads * shape.head_dim
    kept = 2 * tokens * hidden * batch.norm_bytes
    kept += 2 * (tokens + attended) * width * bytes_ + 4 * tokens * heads
    kept += attended * batch.length * bytes_
    kept += tokens * inner * bytes_ * (1 if is_chatglm else 3)
    noise = 1 if batch.is_on_gpu else bytes_
    kept += 2 * batch.rows * batch.prefix * shape.num_key_value_heads * shape.head_dim * noise
    if is_chatglm and not batch.prefix:
        kept += 2 * tokens * width * bytes_
    if is_trained(layer.input_layernorm):
        kept += tokens * (2 * hidden + inner) * bytes_
        if not is_chatglm:
            kept += tokens * (2 * hidden * batch.residual_bytes + width * bytes_)
    return kept + peft_bytes(layer, batch)


def peft_bytes(layer: nn.Module, batch: Batch) -> int:
    """What autograd keeps of peft's modules in one layer."""
    tokens, kept, shared = batch.tokens, 0, False
    for path, module in layer.named_modules():
        if hasattr(module, "ia3_l"):
            channels = module.in_features if module.is_feedforward else module.out_features
            kept += tokens * channels * batch.dtype_bytes
        if not hasattr(module, "lora_A"):
            continue
        dropout = getattr(module.lora_dropout[ADAPTER], "p", 0.0)
        kept += 4 * tokens * module.r[ADAPTER]
        if dropout:
            kept += tokens * module.in_features * (5 if batch.is_on_gpu else 8)
        elif batch.dtype_bytes < 4 or not path.endswith(("q_proj", "k_proj", "v_proj")):
            kept += 4 * tokens * module.in_features
        elif not shared:
            kept, shared = kept + 4 * tokens * module.in_features, True
        if ADAPTER in getattr(module, "lora_magnitude_vector", ()):
            kept += 2 * tokens * module.out_features * batch.dtype_bytes
            kept += 4 * module.in_features * module.out_features
    return kept


def is_trained(module: Any) -> bool:
    """Whether anything in it is."""
    return any(parameter.requires_grad for parameter in module.parameters())


def number_of_processes() -> int:
    """Of this run as its launcher counts them, or as scripts/launch.sh is going to start them."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return int(os.environ.get("NUM_GPUS", "1")) * int(os.environ.get("NUM_HOSTS", "1"))


def read_zero(deepspeed: str | dict[str, Any]) -> dict[str, Any]:
    """The section on ZeRO in a config of DeepSpeed's, or in a file of one.

    Raises:
        UserError: The file cannot be read.
    """
    if isinstance(deepspeed, str):
        if not Path(deepspeed).is_file():
            raise UserError(
                f"training.deepspeed must be a file, got {deepspeed!r}; correct its path"
            )
        deepspeed = read_json(Path(deepspeed))
    return deepspeed.get("zero_optimization", {})


def on_device(size: int, processes: int, offload: dict[str, Any] | None) -> int:
    """One process's share of something divided among all, rounded up; 0 where it is kept off the device."""
    if offload is not None and offload.get("device", "none") != "none":
        return 0
    return -(-size // processes)
