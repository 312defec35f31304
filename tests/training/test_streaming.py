"""Two processes share a streamed file."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_take_each_row_once_an_epoch(tmp_path: Path) -> None:
    rows = [{"content": f"{n}", "summary": "答" * (n % 5 + 1)} for n in range(12)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    worker = ROOT / "tests" / "training" / "streaming_worker.py"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # 2 processes x 3 rows x 4 steps are two epochs of 12 rows
    run = subprocess.run(
        [*command, str(worker), str(file), "4"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    shares = [json.loads((tmp_path / f"seen_{rank}.json").read_text()) for rank in range(2)]
    assert [len(share) for share in shares] == [12, 12]
    for epoch in (slice(0, 6), slice(6, 12)):
        counts = Counter(question for share in shares for question in share[epoch])
        assert counts == Counter(row["content"] for row in rows)
    assert shares[0][:6] != shares[0][6:]
