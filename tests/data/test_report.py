import json

from chatglm_ptuning.data.report import DataReport, suggested_limit


def make():
    report = DataReport(rows=5, used=3, target_tokens=9)
    report.skip("empty answer", "f:1")
    report.skip("empty answer", "f:2")
    report.change("prompt cut", "f:3", 10)
    report.source_lengths.update([3, 8, 9, 16, 17, 40])
    report.target_lengths.update({5: 99, 100: 1})
    return report


def test_one_line_a_rule():
    assert str(make()).splitlines() == [
        "3 of 5 rows used",
        "  skipped, empty answer: 2 rows (first: f:1)",
        "  prompt cut: 1 row (33.3%), 10 tokens (first: f:3)",
    ]


def test_lengths_are_shown_against_the_limits():
    assert make().lengths(16, 64).splitlines() == [
        "tokens against data.max_source_length=16: 2 of 6 rows are over it, 40 would fit 99 %",
        "       0-8              2 " + "#" * 40,
        "       9-16             2 " + "#" * 40,
        "      17-32             1 " + "#" * 20,
        "      33-64             1 " + "#" * 20,
        "tokens against data.max_target_length=64: 1 of 100 rows are over it, 8 would fit 99 %",
        "       0-8             99 " + "#" * 40,
        "       9-16             0",
        "      17-32             0",
        "      33-64             0",
        "      65-128            1 #",
    ]


def test_suggested_limit_fits_99_percent():
    report = DataReport()
    report.source_lengths.update({10: 98, 50: 1, 90: 1})
    assert suggested_limit(report.source_lengths) == 56
    report.source_lengths[50] -= 1
    report.source_lengths[90] += 1
    assert suggested_limit(report.source_lengths) == 96


def test_report_survives_json():
    report = make()
    assert DataReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_advice_names_the_limits_that_are_too_low():
    report = make()
    assert report.advice(16, 4) == (
        "99 % of the rows would fit whole into data.max_source_length=40 data.max_target_length=8"
    )
    assert report.advice(40, 4) == "99 % of the rows would fit whole into data.max_target_length=8"
    assert report.advice(40, 8) is None
    assert DataReport().advice(8, 8) is None
