"""Each published format, from a few lines of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from aptserve.workload import Lengths, Trace, TraceFormatError, read_workload

Write = Callable[[str, str], Path]


def read_trace(path: Path) -> Trace:
    trace = read_workload(path)
    assert isinstance(trace, Trace)
    return trace


def test_lengths_with_arrivals(write: Write) -> None:
    text = "arrival_s,input_tokens,output_tokens\n5.5,10,2\n\n6.0,20,3\n"
    trace = read_trace(write("some.csv", text))
    assert trace.name == "some"
    assert trace.arrival_seconds.tolist() == [0.0, 0.5]
    assert trace.num_prompt_tokens.tolist() == [10, 20]
    assert trace.num_output_tokens.tolist() == [2, 3]
    assert trace.tenants == ("", "")
    assert trace.priorities.tolist() == [0, 0]
    assert trace.note == ""


def test_lengths_without_arrivals_in_any_order_of_columns(write: Write) -> None:
    lengths = read_workload(write("some.csv", "output_tokens,input_tokens,x\n2,10,a\n3,20,b\n"))
    assert isinstance(lengths, Lengths)
    assert lengths.num_prompt_tokens.tolist() == [10, 20]
    assert lengths.num_output_tokens.tolist() == [2, 3]


def test_azure_2023_has_seven_digits_of_a_second(write: Write) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        "2023-11-16 23:59:59.9805900,374,44\r\n"
        "2023-11-17 00:00:00.1305909,396,109\r\n"
    )
    trace = read_trace(write("azure.csv", text))
    assert trace.arrival_seconds.tolist() == pytest.approx([0.0, 0.15], abs=2e-6)
    assert trace.num_prompt_tokens.tolist() == [374, 396]


def test_azure_2024_has_a_time_zone_and_sometimes_no_fraction(write: Write) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,2162,5\n"
        "2024-05-10 00:00:01+00:00,2399,6\n"
    )
    trace = read_trace(write("azure.csv", text))
    assert trace.arrival_seconds.tolist() == pytest.approx([0.0, 0.99007], abs=2e-6)


def test_burstgpt_leaves_out_failures_and_says_so(write: Write) -> None:
    text = (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n"
        "45,ChatGPT,1087,0,1087,Conversation log\n"
        "118,GPT-4,417,276,693,API log\n"
    )
    trace = read_trace(write("burst.csv", text))
    assert trace.arrival_seconds.tolist() == [0.0, 113.0]
    assert trace.num_output_tokens.tolist() == [18, 276]
    assert trace.note == "1 rows without prompt or output tokens left out"


@pytest.mark.parametrize("key", ["timestamp", "timestamp_ms"])
def test_mooncake_spreads_the_requests_of_a_tick(write: Write, key: str) -> None:
    stamps = [0, 0, 3000, 3000, 3000, 12000, 15000, 15000]
    lines = [
        json.dumps({key: stamp, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]})
        for stamp in stamps
    ]
    trace = read_trace(write("mooncake.jsonl", "\n".join(lines)))
    # A tick is 3 s: the median distance, though the third is followed by a longer pause.
    expected = [0.0, 1.5, 3.0, 4.0, 5.0, 12.0, 15.0, 16.5]
    assert trace.arrival_seconds.tolist() == pytest.approx(expected)
    assert trace.note == "arrivals spread evenly over 4 ticks"


def test_bailian_counts_seconds(write: Write) -> None:
    record = {"chat_id": 1, "parent_chat_id": -1, "input_length": 30, "output_length": 4}
    more = {"type": "text", "turn": 1, "hash_ids": [7]}
    lines = [json.dumps(record | {"timestamp": stamp} | more) for stamp in (61.114, 61.114, 63.0)]
    trace = read_trace(write("qwen.jsonl", "\n".join(lines)))
    assert trace.arrival_seconds.tolist() == pytest.approx([0.0, 0.0, 1.886])


def test_stamps_that_are_mostly_equal_are_ticks_in_any_format(write: Write) -> None:
    rows = "".join(f"{stamp},10,2\n" for stamp in (0, 0, 0, 2, 2))
    trace = read_trace(write("some.csv", "arrival_s,input_tokens,output_tokens\n" + rows))
    assert trace.arrival_seconds.tolist() == pytest.approx([0, 2 / 3, 4 / 3, 2, 3])


def test_rows_are_put_in_order_of_arrival(write: Write) -> None:
    text = "arrival_s,input_tokens,output_tokens\n3,10,1\n1,20,2\n2,30,3\n"
    trace = read_trace(write("some.csv", text))
    assert trace.arrival_seconds.tolist() == [0.0, 1.0, 2.0]
    assert trace.num_prompt_tokens.tolist() == [20, 30, 10]
    assert trace.note == "rows put in order of arrival"


def test_a_byte_order_mark_does_no_harm(write: Write) -> None:
    path = write("some.csv", "\ufeffinput_tokens,output_tokens\n1,2\n")
    assert len(read_workload(path)) == 1


CSV = "arrival_s,input_tokens,output_tokens\n0,1,1\n"
MOONCAKE = '{"timestamp": 0, "input_length": 1, "output_length": 1}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": is empty"),
        ("a,b\n1,2\n", ": has a,b, none of the known formats: .*Azure"),
        (CSV + "1,2\n", ", line 3: has 2 columns where the header has 3"),
        (CSV + "1,x,2\n", ", line 3, column input_tokens: 'x' is not a number of tokens"),
        (CSV + "\n1,1,-2\n", ", line 4, column output_tokens: -2 is not"),
        (CSV + "nan,1,2\n", ", line 3, column arrival_s: 'nan' is not a number"),
        (CSV.replace(",1,1", ",0,0"), ": has no row with both"),
        (CSV.partition("\n")[0], ": has no row with both"),
        (CSV + "1," + "9" * 200_000 + ",1\n", ", line 3: field larger than"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,1\n",
            ", line 2, column TIMESTAMP: 'noon' is not a date and time",
        ),
        (MOONCAKE + "\n{\n", ", line 3: is not JSON"),
        (MOONCAKE + "3\n", ", line 2: is not a JSON object"),
        (MOONCAKE + '{"timestamp": 1}\n', ", line 2, column input_length: is missing"),
        (
            MOONCAKE.replace("1}", "true}"),
            ", line 1, column output_length: True is not a number of tokens",
        ),
        ('{"a": 1, "b": 2}\n', ": has a,b, none of the known formats: .*Mooncake"),
    ],
)
def test_an_error_is_one_line_with_file_line_and_column(
    write: Write, text: str, message: str
) -> None:
    path = write("bad", text)
    with pytest.raises(TraceFormatError, match=f"bad{message}") as caught:
        read_workload(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_bytes_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(TraceFormatError, match=r"bad\.csv: is not UTF-8 text"):
        read_workload(path)
