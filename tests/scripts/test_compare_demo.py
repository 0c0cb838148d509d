"""The comparison of the demo's run in four ways, at toy size."""

import json

from tests.finetune.chats import chat, tiny_tokenizer
from tests.models import tiny_llama


def test_every_way_starts_alike_and_learns(run, tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    model = tmp_path / "smollm2"
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    (tmp_path / "chitchat").mkdir()
    for name, n_rows in (("train", 8), ("eval", 3)):
        rows = [{"messages": chat(f"How are you, {n}?", "I am fine.")} for n in range(n_rows)]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (tmp_path / "chitchat" / f"{name}.jsonl").write_text(lines)

    figures, text = run(
        "compare_demo", "--data", str(tmp_path), "--max_steps=2", "--max_length=48", "--use_cpu",
        "--learning_rate=1e-3", "--adamw_learning_rate", "1e-2",
    )  # fmt: skip

    ways = figures["ways"]
    assert list(ways) == ["FP32 AdamW", "FP32 Lion", "QFT, dequantize", "QFT, int8"]
    floats, quantized = ways["FP32 Lion"], ways["QFT, dequantize"]
    assert ways["FP32 AdamW"]["before"] == floats["before"] != quantized["before"]
    assert all(way["after"] < way["before"] for way in ways.values())
    assert len({way["after"] for way in ways.values()}) == 4
    assert "| FP32 Lion | " in text
