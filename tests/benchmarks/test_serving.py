"""The table of the serving benchmark. The benchmark itself needs vLLM, and is run by hand."""

from benchmarks.serving import Result, table


def test_ratios_are_within_a_concurrency():
    rows = table(
        [
            Result("stock class", 1, 2.0, 0.5, 20, 600),
            Result("stock class", 8, 4.0, 1.0, 160, 600),
            Result("FSR, 64 tokens", 8, 10.0, 0.25, 24, 88),
        ]
    ).splitlines()
    assert [row.count("|") for row in rows] == [8] * 5
    assert rows[2] == "| stock class | 1 | 600 | 2.00 | 1.00 | 0.50 | 20 |"
    assert rows[4] == "| FSR, 64 tokens | 8 | 88 | 10.00 | 2.50 | 0.25 | 24 |"
    assert table([Result("FSR, off", 1, 2.0, 0.5, 20, 600)]).splitlines()[-1].split("|")[5].strip() == "–"
