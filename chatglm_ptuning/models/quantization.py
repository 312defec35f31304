"""Quantised weights: linear layers in 4 or 8 bits through bitsandbytes, and the released int4/int8 files, read.

bitsandbytes: NF4 with double quantisation (Dettmers et al., arXiv 2305.14314) or LLM.int8 (arXiv 2208.07339), on GPU
and CPU. Embeddings and the head stay whole. The network is otherwise the same, so every tuner trains on it.

Released: `chatglm-6b-int8`, `-int4` and `chatglm2-6b-int4` hold, for every quantised `weight`, int8 numbers and a
`weight_scale` of one half-precision number a row. What is assumed of them: weight = number * scale, where the scale
was max|row| / (2^(bits - 1) - 1); in int4 one byte holds two signed 4-bit numbers, the even column in its upper half,
the odd one in its lower half, so the tensor is [out, in / 2].
"""

import logging

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from chatglm_ptuning.errors import UserError

SCALE = ".weight_scale"  # ends the name of the scales of a released quantised weight


def check_bits(quantization_bit: int | None) -> None:
    """Refuse a number of bits that bitsandbytes does not know.

    Raises:
        UserError: It is one.
    """
    if quantization_bit not in (None, 4, 8):
        raise UserError(
            f"quantization_bit must be 4, 8 or null, got quantization_bit={quantization_bit!r}"
        )


def quantize_linear(model: PreTrainedModel, path: str, bits: int, dtype: torch.dtype) -> None:
    """Put a quantised layer in the place of a linear one whose weight is there; its bias may still come.

    Args:
        model: Holds the layer.
        path: Of the layer.
        bits: 4 or 8.
        dtype: What a 4-bit layer computes in.
    """
    import bitsandbytes as bnb

    layer = model.get_submodule(path)
    size, weight = (layer.in_features, layer.out_features), layer.weight.detach()
    if bits == 4:
        new = bnb.nn.Linear4bit(
            *size, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        new.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", module=new
        ).to(weight.device)
    else:
        new = bnb.nn.Linear8bitLt(
            *size, bias=False, has_fp16_weights=False, threshold=6.0, device="meta"
        )
        new.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(
            weight.device
        )
    new.bias = layer.bias
    model.set_submodule(path, new)


def is_quantizable(model: PreTrainedModel, path: str) -> bool:
    """Whether a module is a linear layer other than the head."""
    module = model.get_submodule(path)
    return isinstance(module, nn.Linear) and module is not model.get_output_embeddings()


def finish_quantized(model: PreTrainedModel, bits: int) -> None:
    """Mark a quantised model for peft, and keep bitsandbytes from changing it in use."""
    import bitsandbytes as bnb

    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            # Else it repacks its weight in place at the first evaluation on some CPUs, and cannot train any more.
            module.support_avx512bf16_for_cpu = False
    # A line at every single product: "inputs will be cast"
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def native_quantization(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The same as `quantize_linear`, for transformers to do while it loads."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def dequantize(packed: Tensor, scale: Tensor, columns: int) -> Tensor:
    """Whole weights from a released quantised one.

    Args:
        packed: int8 [out, in], or [out, in / 2] with two numbers a byte.
        scale: [out].
        columns: in; tells the two apart.

    Returns:
        [out, in] in float32.
    """
    if packed.shape[1] * 2 == columns:
        upper, lower = packed >> 4, (packed << 4) >> 4  # both shifts keep the sign
        packed = torch.stack((upper, lower), dim=-1).flatten(1)
    return packed.float() * scale.float()[:, None]
