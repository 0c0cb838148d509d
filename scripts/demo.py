"""Tune all 134.5 M parameters of a chat model on human dialogues in INT8, from download to export.

    python scripts/demo.py                       # minutes on 2 CPU cores
    python scripts/demo.py --max_steps 100       # any flag of qft-hf finetune

Fetches SmolLM2-135M-Instruct and the dialogues, runs the config `demo` (overwriting an earlier run)
and shows the model's answers and loss before and after, and its memory. At the end a process
without qft_hf loads the exported checkpoint and has to find the same loss.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from fetch_demo import DEMO_ASSETS, fetch

from qft_hf.hf.finetune import Run, parse_arguments, prepare, train

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("Hi! How are you doing today?", "Did you see any good movies lately?")
BF16_STEP = 2**-8  # relative distance between neighboring bf16 numbers


def main() -> None:
    """Fetch, tune, compare, export, check."""
    if {"-h", "--help"} & {*sys.argv[1:]}:
        print(__doc__, end="")
        sys.exit(0)
    started = time.monotonic()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(ROOT)  # paths in the config are relative to it
    flags = ["demo", "--overwrite_output", "--export_dtype=bfloat16", *sys.argv[1:]]
    arguments = parse_arguments(flags)
    for asset in DEMO_ASSETS:
        fetch(asset, ROOT / "data")
    run = prepare(arguments)
    answers_before = answers(run)
    summary = train(run)
    answers_after = answers(run)

    for prompt, before, after in zip(PROMPTS, answers_before, answers_after, strict=True):
        print(f"\nuser:   {prompt}\nbefore: {before}\nafter:  {after}")
    print(f"\n{run.trainer.ledger}\n\n{summary}")

    loss = summary.after["loss"]
    plain_loss = loss_without_qft_hf(run)
    print(f"{'exported, plain transformers':<30}loss {plain_loss:.4f}, live INT8 model {loss:.4f}")
    if abs(plain_loss - loss) > BF16_STEP * loss:
        raise RuntimeError(
            f"the exported checkpoint has loss {plain_loss} and the live model {loss}: they differ "
            "by more than rounding the weights to bf16 explains."
        )
    print(f"{'written to':<30}{run.arguments.output_dir}: checkpoint, loss_curve.png, summary.json")
    print(f"{'whole demo':<30}{(time.monotonic() - started) / 60:.1f} minutes")


def answers(run: Run) -> list[str]:
    """Return the model's most likely answer to each prompt."""
    model, tokenizer = run.trainer.model.eval(), run.trainer.processing_class
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        answer = output[0, inputs["input_ids"].shape[1] :]
        texts.append(" / ".join(tokenizer.decode(answer, skip_special_tokens=True).splitlines()))
    return texts


def loss_without_qft_hf(run: Run) -> float:
    """Return the loss of the exported checkpoint on the same examples, from another process."""
    output_dir = run.arguments.output_dir
    examples = output_dir / "eval_examples.jsonl"
    run.data.evaluation.dataset.to_json(examples)
    program = [sys.executable, "scripts/evaluate_plain.py"]
    finished = subprocess.run(
        [*program, str(output_dir / "bfloat16"), str(examples)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(finished.stdout)


if __name__ == "__main__":
    main()
