"""One process of a distributed test run: torchrun ... distributed_worker.py SETTINGS.json, written by the test.

Trains the tiny ChatGLM of conftest and writes the trainer's log and the trained weights.
"""

import json
import sys
from pathlib import Path

import torch

from chatglm_ptuning.data.collator import Collator
from chatglm_ptuning.training.arguments import make_arguments
from chatglm_ptuning.training.trainer import AdapterTrainer
from tests.training.conftest import MODELS, PAD, make_rows

settings = json.loads(Path(sys.argv[1]).read_text())
out = Path(settings["output_dir"])
arguments = make_arguments(settings["training"], out)
torch.set_num_threads(1)
trainer = AdapterTrainer(
    adapter_name=None,
    describe=lambda directory: None,
    model=MODELS["chatglm"](),
    args=arguments,
    train_dataset=make_rows(24),
    eval_dataset=make_rows(6, seed=1),
    data_collator=Collator(PAD),
)
trainer.train(resume_from_checkpoint=settings.get("resume"))
trainer.save_model(str(out / "final"))
if arguments.process_index == 0:
    (out / "log.json").write_text(json.dumps(trainer.state.log_history))
