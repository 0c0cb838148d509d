"""The studies run at toy size; what they measure there means nothing."""

from qft_hf import kernels
from tests.scripts.commands import load


def test_every_way_of_the_study_is_tuned(run):
    quantize_gradient = kernels.quantize_gradient

    figures, text = run(
        "int8_products", "--seeds", "0", "--steps", "2", "--pretraining_steps", "1",
        "--hidden", "32", "--held_out", "8",
    )  # fmt: skip

    losses = {run["way"]: run["loss"] for run in figures["runs"]}
    assert len(losses) == 10
    # Each way computes in its own way, and all learn nearly the same in two steps.
    assert len(set(losses.values())) == 10
    assert max(losses.values()) < figures["loss_before"]
    assert "| FP32 Lion | " in text
    assert kernels.quantize_gradient is quantize_gradient  # the ablation is over


def test_the_study_of_momentum_runs_every_kind():
    script = load("momentum_bits")
    study = script.Study(script.Size(hidden=32, layers=1), pretraining_steps=2, steps=2)
    rows = [{"kind": "float", "lr": 1e-3, "seed": 0, "reduction": study.lion(0, 1e-3, None)}]
    for kind, reduction in (
        ("float SGD", study.sgd(0, 1e-3, quantize=False)),
        ("0 bits (SGD)", study.sgd(0, 1e-3, quantize=True)),
        ("8 bits", study.lion(0, 1e-3, 8)),
        ("4 bits", study.lion(0, 1e-3, 4)),
    ):
        rows.append({"kind": kind, "lr": 1e-3, "seed": 0, "reduction": reduction})
    assert len({row["reduction"] for row in rows}) == len(rows)  # each is another optimizer
    for name in ("as shipped: slope 3, groups of 64", "to nearest", "sticky scale"):
        reduction, error = study.simulated(0, 1e-3, script.VARIANTS[name])
        assert 0 < error < 1
        rows.append({"kind": name, "lr": 1e-3, "seed": 0, "reduction": reduction, "error": error})

    text = script.table(rows)

    assert "| float | 0.001 | 100.0 % |" in text
    assert all(f"| {row['kind']} |" in text for row in rows)


def test_the_study_of_adamw_runs_every_kind(run):
    figures, text = run(
        "adamw_moments", "--seeds", "0", "--steps", "2", "--pretraining_steps", "1",
        "--hidden", "32", "--layers", "1", "--learning_rate", "1e-3",
        "--adamw_learning_rate", "1e-3", "2e-3",
    )  # fmt: skip

    reductions = {(row["kind"], row["lr"]): row["reduction"] for row in figures["runs"]}
    assert len(set(reductions.values())) == len(reductions) == 2 * 3
    assert "| QFTAdamW | 0.002 | " in text


def test_the_study_of_routers_tunes_every_way(run):
    figures, text = run(
        "routers", "--seeds", "0", "--steps", "3", "--pretraining_steps", "1", "--layers", "1"
    )

    reductions = {run["way"]: run["reduction"] for run in figures["runs"]}
    assert len(set(reductions.values())) == len(reductions) == 3  # each is another model
    assert "| QFT, INT8 routers | " in text
