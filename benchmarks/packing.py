"""Target tokens per second of packed rows against padded batches of the same token budget, on the demo's data.

    python benchmarks/packing.py [--rounds 6] [--rows 16] [--threads 1] [section.key=value ...]

Every batch has at most ROWS * (max_source_length + max_target_length) places for tokens, pads among them:

- packed: rows filled with whole examples (`data.packing=true`), ROWS of them unless `data.packing_length` is set;
- padded to the limits: ROWS examples, each padded to the limits, as the released ChatGLM scripts do;
- padded, shuffled: as many examples in random order as fit when each is padded to the longest of the batch;
- padded, grouped: the same, but sorted by length over some batches, as `train_sampling_strategy=group_by_length` does.

P-Tuning v2 of the configured model, forward, backward and optimizer step; the kinds take turns in one process, and a
turn of each is a round. The ratio is packed over padded in the same round; its median is printed with its range.
On a CPU seconds are those of the processor, so that what else runs there counts little.

The floor: where computing costs the same for every place, packing gains exactly what is no longer padded, the packed
rows' share of real tokens over the padded batches' share, printed beside the ratio. It is missed where attention over
longer rows costs more (rows of 768 are slower here than rows of 192), so keep `data.packing_length` near the limits.
"""

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from chatglm_ptuning.config import RunConfig
from chatglm_ptuning.data.collator import Collator
from chatglm_ptuning.data.dataset import TokenDataset
from chatglm_ptuning.data.packing import PackedDataset
from chatglm_ptuning.data.splits import build_dataset
from chatglm_ptuning.data.template import IGNORED
from chatglm_ptuning.data.template_choice import choose_template
from chatglm_ptuning.models.loading import load_base_model
from chatglm_ptuning.models.tokenizer_loading import load_tokenizer
from chatglm_ptuning.training.arguments import make_arguments
from chatglm_ptuning.training.trainer import AdapterTrainer
from chatglm_ptuning.tuners import add_adapter

PROJECT = Path(__file__).resolve().parents[1]
PACKED = "packed"
Batch = dict[str, Tensor]


@dataclass
class Kind:
    """Batches of one kind, and what they have taken.

    Args:
        batches: One turn of them.
        rates: Target tokens per second of each turn.
    """

    batches: list[Batch]
    rates: list[float]

    @property
    def real_share(self) -> float:
        """Real tokens among all places."""
        masks = [batch["attention_mask"] for batch in self.batches]
        return sum(int((m > 0).sum()) for m in masks) / sum(m.numel() for m in masks)

    @property
    def targets(self) -> int:
        """Learned tokens of a turn."""
        return sum(int((batch["labels"] != IGNORED).sum()) for batch in self.batches)


def fill(lengths: Sequence[int], order: Sequence[int], places: int) -> list[list[int]]:
    """Cut an order of examples into batches of at most so many places, each as long as its longest example."""
    batches: list[list[int]] = [[]]
    for index in order:
        longest = max(lengths[i] for i in [*batches[-1], index])
        if batches[-1] and longest * (len(batches[-1]) + 1) > places:
            batches.append([])
        batches[-1].append(index)
    return batches[:-1]  # the last one may be far from full


def make_kinds(
    rows: TokenDataset, limit: int, packed_length: int, count: int, turn: int, pad: int
) -> dict[str, Kind]:
    """The four kinds, a turn of batches each.

    Args:
        rows: The examples.
        limit: Longest example in tokens.
        packed_length: Longest packed row in tokens.
        count: Examples of a batch that is padded to the limit.
        turn: Batches of a turn.
        pad: Id of padding.
    """
    places, draw = limit * count, random.Random(0)
    order = draw.sample(range(len(rows)), len(rows))
    shuffled = fill(rows.lengths, order, places)
    window = 8 * len(shuffled[0])
    by_length = [
        index
        for start in range(0, len(order), window)
        for index in sorted(order[start : start + window], key=lambda i: -rows.lengths[i])
    ]
    grouped = fill(rows.lengths, by_length, places)
    packed = PackedDataset(rows, packed_length)
    bins = draw.sample(range(len(packed)), len(packed))

    def collate(source: TokenDataset | PackedDataset, chosen: list[list[int]], to: int) -> Kind:
        collator = Collator(pad, pad_to_multiple_of=to)
        chosen = draw.sample(chosen, min(turn, len(chosen)))
        return Kind([collator([source[i] for i in batch]) for batch in chosen], [])

    def groups(order: list[int], size: int) -> list[list[int]]:
        return [order[start : start + size] for start in range(0, len(order) - size + 1, size)]

    return {
        PACKED: collate(packed, groups(bins, places // packed_length), 1),
        "padded to the limits": collate(rows, groups(order, count), limit),
        "padded, shuffled": collate(rows, shuffled, 1),
        "padded, grouped": collate(rows, grouped, 1),
    }


def make_trainer(config: RunConfig, rows: TokenDataset, pad: int) -> AdapterTrainer:
    """The trainer of a run, of which only the steps are used."""
    model = load_base_model(config.model.path, config.model.dtype, config.model.device)
    add_adapter(model, config.adapter.tuner_config(), "default")
    return AdapterTrainer(
        adapter_name="default",
        describe=lambda directory: None,
        model=model,
        args=make_arguments({"report_to": "none"}, "outputs/benchmark"),
        train_dataset=rows,
        data_collator=Collator(pad),
    )


def step(trainer: AdapterTrainer, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Forward, backward, update."""
    device = trainer.model.device
    loss = trainer.compute_loss(trainer.model, {k: v.to(device) for k, v in batch.items()})
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=6, help="turns of each kind (default 6)")
    parser.add_argument(
        "--rows",
        type=int,
        default=16,
        help="examples of a batch that is padded to the limits (default 16)",
    )
    parser.add_argument("--batches", type=int, default=4, help="batches of a turn (default 4)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    args, overrides = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    config = RunConfig.load(PROJECT / "configs" / "ptuning_v2.yaml", overrides)
    tokenizer = load_tokenizer(config.model.path)
    template = choose_template(config.model.template, tokenizer)
    data = replace(config.data, packing=False, streaming=False)  # packed here
    rows, report = build_dataset(data, "train", template, tokenizer)
    assert isinstance(rows, TokenDataset)
    limit, pad = data.max_source_length + data.max_target_length, tokenizer.pad_token_id
    packed_length = data.packed_length
    if packed_length > args.rows * limit:
        parser.error(f"a packed row must fit in {args.rows * limit} places, got {packed_length}")
    kinds = make_kinds(rows, limit, packed_length, args.rows, args.batches, pad)
    trainer = make_trainer(config, rows, pad)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    trainer.model.train()
    seconds = time.process_time if trainer.model.device.type == "cpu" else time.perf_counter
    for number in range(args.rounds + 1):  # the first one warms up
        for kind in kinds.values():
            started = seconds()
            for batch in kind.batches:
                step(trainer, optimizer, batch)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                kind.rates.append(kind.targets / (seconds() - started))

    lengths = rows.lengths
    print(
        f"{report.used:,} examples of {min(lengths)} to {max(lengths)} tokens, {statistics.mean(lengths):.0f} on"
        f" average; budget {args.rows} x {limit} = {args.rows * limit:,} places a batch, packed rows of"
        f" {packed_length}; {trainer.model.device}, {args.threads} thread(s)"
    )
    print(f"{'':<22}{'targets/s':>10}{'real tokens':>13}{'ratio':>8}{'range':>14}{'floor':>8}")
    packed = kinds[PACKED]
    for name, kind in kinds.items():
        ratios = [p / k for p, k in zip(packed.rates, kind.rates, strict=True)]
        print(
            f"{name:<22}{statistics.median(kind.rates):>10,.0f}{kind.real_share:>13.1%}"
            f"{statistics.median(ratios):>8.2f}{f'{min(ratios):.2f}-{max(ratios):.2f}':>14}"
            f"{packed.real_share / kind.real_share:>8.2f}"
        )


if __name__ == "__main__":
    main()
