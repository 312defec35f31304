import json
from collections import Counter
from itertools import islice

import pytest

from chatglm_ptuning.data import cache
from chatglm_ptuning.data.dataset import DataConfig, encode_dataset, load_conversations
from chatglm_ptuning.data.packing import PackedDataset
from chatglm_ptuning.data.report import DataReport
from chatglm_ptuning.data.splits import build_dataset, read_split
from chatglm_ptuning.data.streaming import StreamingDataset
from chatglm_ptuning.data.template import TEMPLATES
from chatglm_ptuning.errors import UserError
from tests.data.chat_tokenizers import TOKENIZERS

TEMPLATE, TOKENIZER = TEMPLATES["chatglm"], TOKENIZERS["chatglm"]


def write(tmp_path, numbers, name="rows.jsonl"):
    file = tmp_path / name
    file.write_text(
        "".join(json.dumps({"content": f"{n}", "summary": f"答{n}"}) + "\n" for n in numbers)
    )
    return str(file)


def build(split="train", **settings):
    return build_dataset(DataConfig(**settings), split, TEMPLATE, TOKENIZER)


def questions(dataset):
    return [
        TOKENIZER.decode(item["input_ids"][: item["input_ids"].index(2001)]) for item in dataset
    ]


def test_a_split_is_what_its_files_hold(tmp_path):
    file = write(tmp_path, range(3))
    expected, _ = encode_dataset(
        load_conversations(file, DataConfig()), TEMPLATE, TOKENIZER, DataConfig()
    )
    for split in ("train", "validation", "test"):
        dataset, report = build(split, **{f"{split}_file": file})
        assert list(dataset) == list(expected)
        assert report.used == 3
    with pytest.raises(UserError, match=r"data\.validation_file must be given, got None"):
        build("validation", train_file=file)


def test_limits_of_rows(tmp_path):
    file = write(tmp_path, range(9))
    settings = {
        "train_file": file,
        "test_file": file,
        "max_train_samples": 2,
        "max_eval_samples": 3,
    }
    assert len(build("train", **settings)[0]) == 2
    assert len(build("test", **settings)[0]) == 3


def test_weights_say_how_often_a_files_rows_count(tmp_path):
    files = [write(tmp_path, range(100), "a.jsonl"), write(tmp_path, range(100, 300), "b.jsonl")]
    config = DataConfig(train_file=files, train_weights=[2.5, 0.25])
    report = DataReport()
    drawn = Counter(int(c.messages[0].content) for c in read_split(config, "train", report))
    assert {drawn[n] for n in range(100)} == {2, 3}
    assert 220 < sum(drawn[n] for n in range(100)) < 280
    assert {drawn[n] for n in range(100, 300)} == {0, 1}
    seldom = sum(drawn[n] for n in range(100, 300))
    assert 30 < seldom < 70
    assert report.rows == report.skipped["not drawn by data.train_weights"].rows == 200 - seldom
    again = Counter(int(c.messages[0].content) for c in read_split(config, "train", DataReport()))
    later = Counter(
        int(c.messages[0].content) for c in read_split(config, "train", DataReport(), epoch=1)
    )
    assert drawn == again != later


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train_file": ["a", "b"], "train_weights": [1.0]},
            "data.train_weights must have one number over 0 for each",
        ),
        (
            {"train_file": "a", "train_weights": [0.0]},
            "data.train_weights must have one number over 0 for each",
        ),
        (
            {"train_file": "a", "train_weights": [float("inf")]},
            "data.train_weights must have one number over 0 for each",
        ),
        (
            {"packing": True, "streaming": True},
            "data.packing must be false where data.streaming is true",
        ),
        (
            {"cache_dir": "c", "streaming": True},
            "data.cache_dir must be left out where data.streaming is true",
        ),
        ({"packing_length": 1}, "data.packing_length must be at least 8 tokens"),
        ({"shuffle_buffer_size": 0}, "data.shuffle_buffer_size must be at least 1 row"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**settings)


def test_packing_is_for_training(tmp_path):
    file = write(tmp_path, range(20))
    settings = {"train_file": file, "test_file": file, "packing": True, "packing_length": 40}
    packed, _ = build("train", **settings)
    assert isinstance(packed, PackedDataset)
    assert len(packed) < 20
    assert len(build("test", **settings)[0]) == 20


def streamed(file, epoch=0, rank=0, world_size=1, **settings):
    dataset, report = build(train_file=file, streaming=True, **settings)
    assert isinstance(dataset, StreamingDataset)
    dataset.rank, dataset.world_size = rank, world_size
    return questions(dataset.epoch(epoch)), report


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("buffer", [1, 10, 1000])
def test_ranks_share_an_epoch_without_loss_or_repetition(tmp_path, world_size, buffer):
    file = write(tmp_path, range(50))
    whole, report = streamed(file, shuffle_buffer_size=buffer)
    assert sorted(map(int, whole)) == list(range(50))
    assert (report.rows, report.used) == (50, 50)
    shares = [
        streamed(file, 0, rank, world_size, shuffle_buffer_size=buffer)[0]
        for rank in range(world_size)
    ]
    for rank, share in enumerate(shares):
        assert share == whole[rank::world_size]


def test_streamed_order_depends_on_seed_and_epoch_alone(tmp_path):
    file = write(tmp_path, range(50))
    first, _ = streamed(file)
    assert streamed(file)[0] == first
    assert first != list(map(str, range(50)))
    assert streamed(file, epoch=1)[0] != first
    assert streamed(file, seed=7)[0] != first
    endless = build(train_file=file, streaming=True)[0]
    assert questions(islice(iter(endless), 100)) == first + streamed(file, epoch=1)[0]


def test_streaming_through_loader_workers_loses_nothing(tmp_path):
    from torch.utils.data import DataLoader

    class Epoch(StreamingDataset):
        def __iter__(self):
            return self.epoch(0)

    stream = build(train_file=write(tmp_path, range(50)), streaming=True)[0]
    stream.__class__ = Epoch
    found = questions(DataLoader(stream, batch_size=None, num_workers=2))
    assert sorted(map(int, found)) == list(range(50))


def test_rows_after_the_limit_are_not_looked_at(tmp_path):
    file = write(tmp_path, range(3))
    with open(file, "a") as rows:
        rows.write("{\n")
    dataset, report = build(train_file=file, max_train_samples=3)
    assert len(dataset) == report.rows == 3


def test_a_stream_of_a_missing_file_is_refused_before_it_is_read():
    with pytest.raises(UserError, match="a data file must exist"):
        build(train_file="nowhere.json", streaming=True)


def test_a_stream_stops_at_a_broken_row(tmp_path):
    file = write(tmp_path, range(5))
    with open(file, "a") as rows:
        rows.write("{\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:6: a row must be valid JSON"):
        streamed(file)


def test_a_cache_is_used_again_and_holds_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = {"train_file": write(tmp_path, range(20)), "cache_dir": "~/cache"}
    plain, plain_report = build(train_file=settings["train_file"])
    first, first_report = build(**settings)
    monkeypatch.setattr(cache, "encode_into", lambda *args: pytest.fail("encoded again"))
    second, second_report = build(**settings)
    assert list(first) == list(second) == list(plain)
    assert first.lengths == plain.lengths
    assert first_report == second_report == plain_report
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.stat().st_mode == folder.parent.stat().st_mode  # others may read it as well


CHANGES = [
    {"max_source_length": 16},
    {"max_target_length": 16},
    {"truncation": "left"},
    {"loss_on": "last"},
    {"max_train_samples": 19},
    {"train_weights": [2.0]},
    {"seed": 1},
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_is_another_cache(tmp_path, change):
    settings = {"train_file": write(tmp_path, range(20)), "cache_dir": str(tmp_path / "cache")}
    build(**settings)
    build(**(settings | change))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_changed_data_template_or_tokenizer_is_another_cache(tmp_path):
    file = write(tmp_path, range(20))
    config = DataConfig(train_file=file)

    def key(template="chatglm2", tokenizer="chatglm3", split="train"):
        return cache.cache_key([file], TEMPLATES[template], TOKENIZERS[tokenizer], config, split)

    keys = {key(), key(template="chatglm3"), key(tokenizer="chatglm2"), key(split="test")}
    write(tmp_path, [*range(19), 99])
    keys.add(key())
    assert len(keys) == 5
    assert key() == key()


def test_a_failed_cache_leaves_nothing(tmp_path):
    file = write(tmp_path, range(5))
    with open(file, "a") as rows:
        rows.write("{\n")
    with pytest.raises(UserError, match="valid JSON"):
        build(train_file=file, cache_dir=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_made_is_one_sentence(tmp_path):
    file = write(tmp_path, range(5))
    with pytest.raises(UserError, match=r"data\.cache_dir must be a directory that can be written"):
        build(train_file=file, cache_dir=file)


def test_the_hub_is_not_cached(tmp_path):
    with pytest.raises(
        UserError, match=r"data\.cache_dir must be used with files, got 'hf:owner/name'"
    ):
        build(train_file="hf:owner/name", cache_dir=str(tmp_path))


def test_data_without_a_usable_row_is_refused_from_the_cache_too(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"content": "x", "summary": ""}')
    for _ in range(2):
        with pytest.raises(UserError, match="at least one usable row"):
            build(train_file=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))
