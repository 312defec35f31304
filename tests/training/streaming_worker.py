"""One process of two: `torchrun ... streaming_worker.py ROWS STEPS`, trains on a streamed file and says what it got."""

import json
import os
import sys
from pathlib import Path

import torch

from chatglm_ptuning.data.collator import Collator
from chatglm_ptuning.data.config import DataConfig
from chatglm_ptuning.data.splits import build_dataset
from chatglm_ptuning.data.template import TEMPLATES
from chatglm_ptuning.models.tokenization_chatglm import ChatGLMTokenizer
from chatglm_ptuning.training.arguments import make_arguments
from chatglm_ptuning.training.trainer import AdapterTrainer
from tests.checkpoints import GOLDEN, tiny_model


def main() -> None:
    torch.set_num_threads(1)
    file, steps = Path(sys.argv[1]), int(sys.argv[2])
    tokenizer = ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer_v1")
    config = DataConfig(train_file=str(file), streaming=True)
    rows, _ = build_dataset(config, "train", TEMPLATES["chatglm"], tokenizer)
    seen: list[str] = []

    class Watched(AdapterTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            for ids in inputs["input_ids"].tolist():
                seen.append(tokenizer.decode(ids[: ids.index(2001)]))
            return super().training_step(model, inputs, *args, **kwargs)

    settings = {"max_steps": steps, "per_device_train_batch_size": 3, "save_strategy": "no"}
    settings |= {"learning_rate": 0.0, "use_cpu": True}
    Watched(
        adapter_name=None,
        describe=lambda directory: None,
        model=tiny_model("chatglm").train(),
        args=make_arguments(settings, file.parent / "out"),
        train_dataset=rows,
        data_collator=Collator(tokenizer.pad_token_id),
    ).train()
    (file.parent / f"seen_{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
