"""Tiny random checkpoints of every family, in the layout of their release and as native Glm, with small tokenizers."""

import base64
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GlmForCausalLM, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from chatglm_ptuning.models.configuration_chatglm import ChatGLMConfig
from chatglm_ptuning.models.glm_checkpoint import glm_config, save_released
from chatglm_ptuning.models.loading import shard_files
from chatglm_ptuning.models.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm_ptuning.models.tokenization_glm4 import CONTROL_TOKENS
from chatglm_ptuning.tensor_files import read_tensors

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("chatglm", "chatglm2", "chatglm3", "glm4")
GLM4_IDS = {token: 256 + position for position, token in enumerate(CONTROL_TOKENS)}
SIZES = {
    "padded_vocab_size": 2016,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "add_qkv_bias": True,
    "seq_length": 512,
}


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model whose vocabulary is that of the family's small tokenizer."""
    torch.manual_seed(seed)
    if family == "chatglm":
        config = ChatGLMConfig(
            vocab_size=2352,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=4,
            max_sequence_length=512,
            bos_token_id=2004,
            eos_token_id=2005,
            mask_token_id=2000,
            gmask_token_id=2001,
            tie_word_embeddings=False,
            initializer_range=0.2,
        )
        return ChatGLMForConditionalGeneration(config).eval()
    released = dict(SIZES)
    if family == "glm4":
        end = GLM4_IDS["<|endoftext|>"]
        stops = [end, GLM4_IDS["<|user|>"], GLM4_IDS["<|observation|>"]]
        released |= {"padded_vocab_size": 280, "rope_ratio": 500, "layernorm_epsilon": 1.5625e-07}
        released |= {"eos_token_id": stops, "pad_token_id": end}
    config = glm_config(released)
    config.initializer_range = 0.2
    return GlmForCausalLM(config).eval()


def tokenizer_files(family: str, directory: Path) -> list[Path]:
    """The tokenizer of a released checkpoint; GLM-4's knows single bytes only and is written into a directory."""
    if family != "glm4":
        return sorted((GOLDEN / f"tokenizer_v{family.removeprefix('chatglm') or 1}").iterdir())
    directory.mkdir(exist_ok=True)
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    (directory / "tokenizer.model").write_text("\n".join(lines) + "\n")
    added = {str(index): {"content": token, "special": True} for token, index in GLM4_IDS.items()}
    settings = {"tokenizer_class": "ChatGLM4Tokenizer", "added_tokens_decoder": added}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return sorted(directory.iterdir())


def write_released(directory: Path, family: str, layout: str = "bin") -> Path:
    """A checkpoint as released: "bin", "sharded bin" (float16) or "sharded safetensors" (bfloat16)."""
    dtype = torch.bfloat16 if layout == "sharded safetensors" else torch.float16
    shard_bytes = 10**9 if layout == "bin" else 20_000
    files = tokenizer_files(family, directory.with_name(f"{directory.name}-tokenizer"))
    save_released(tiny_model(family).to(dtype), directory, files, shard_bytes)
    if layout == "sharded safetensors":
        as_safetensors(directory)
    return directory


def as_safetensors(directory: Path) -> None:
    """Turn the files of a sharded checkpoint into safetensors."""
    for file in shard_files(directory):
        tensors = {name: tensor.clone() for name, tensor in read_tensors(file)}
        save_file(tensors, directory / safetensors_name(file.name))
        file.unlink()
    index = directory / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {n: safetensors_name(f) for n, f in content["weight_map"].items()}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))
    index.unlink()


def safetensors_name(name: str) -> str:
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")


def write_native(directory: Path) -> Path:
    """GLM-4 as its `-hf` directories are: model_type glm, tokenizer.json and a chat template in Jinja."""
    tiny_model("glm4").half().save_pretrained(directory)
    characters = bytes_to_unicode()
    vocabulary = {characters[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL_TOKENS)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def copy_of(checkpoint: Path, directory: Path) -> Path:
    """The same files elsewhere, to be broken."""
    return Path(shutil.copytree(checkpoint, directory))
