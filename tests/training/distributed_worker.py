"""One process of a distributed test, `torchrun ... distributed_worker.py RUNS.json`: makes runs one after another.

RUNS.json, written by the test, lists for each run its config file and overrides. What the optimizer holds and which
parameters have gradient memory is written beside the adapter as memory.json, by the first process.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from chatglm_ptuning.config import RunConfig
from chatglm_ptuning.training import run as workflow


class Watched(workflow.AdapterTrainer):
    """Looks at the optimizer and the gradients after the last step."""

    gradients: set[str]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.gradients = {n for n, p in self.model.named_parameters() if p.grad is not None}
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        output = super().train(*args, **kwargs)
        inner, gradient_memory = self.optimizer, None
        while hasattr(inner, "optimizer"):  # accelerate's and DeepSpeed's wrappers
            inner = inner.optimizer
            if hasattr(inner, "grad_partitions_flat_buffer"):  # ZeRO-3's
                gradient_memory = inner.grad_partitions_flat_buffer.numel()
        sizes = {n: getattr(p, "ds_numel", p.numel()) for n, p in self.model.named_parameters()}
        trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
        memory = {
            "trained": sum(sizes[name] for name in trained),
            "frozen": sum(sizes.values()) - sum(sizes[name] for name in trained),
            "optimizer_state": sum(
                value.numel()
                for state in inner.state.values()
                for value in state.values()
                if torch.is_tensor(value) and value.dim() > 0
            ),
            "gradient_memory": gradient_memory,
            "frozen_gradients": sorted(self.gradients - set(trained)),
            "is_sharded": any(hasattr(p, "ds_id") for p in self.model.parameters()),
        }
        if self.args.process_index == 0:
            (Path(self.args.output_dir) / "memory.json").write_text(json.dumps(memory))
        return output


def main() -> None:
    torch.set_num_threads(1)
    workflow.AdapterTrainer = Watched
    for config_file, overrides in json.loads(Path(sys.argv[1]).read_text()):
        AcceleratorState._reset_state()  # the run before may have used DeepSpeed, or not
        workflow.run(RunConfig.load(config_file, overrides))


if __name__ == "__main__":
    main()
