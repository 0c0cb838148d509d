"""Numbers and names in sentences."""

import pytest

from qft_hf.hf.finetune.data import DataCounts
from qft_hf.hf.finetune.evaluate import Evaluation
from qft_hf.hf.wording import and_more, counted, score_text


@pytest.mark.parametrize(
    ("n", "said"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (1200, "1,200 rows")]
)
def test_one_is_not_many(n, said):
    assert counted(n, "row") == said


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (0.0, "0.0000"),
        (0.5, "0.5000"),
        (-12.34567, "-12.3457"),
        (0.000626, "0.000626"),
        (-6.4459e-6, "-6.45e-06"),
        (float("nan"), "undefined"),
        (float("inf"), "infinite"),
    ],
)
def test_a_small_score_is_not_0_and_none_is_nan(score, said):
    """A loss of 6e-6 was once shown as 0.0000."""
    assert score_text(score) == said
    line = f"loss              {said}"
    assert str(Evaluation("m", {"loss": score}, DataCounts(1, 1, 1, 0, {}))).startswith(line)


def test_a_name_alone_has_none_beside_it():
    """The text was once "a and 0 more"."""
    assert [and_more(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == [
        "a",
        "a and 1 more",
        "a and 2 more",
    ]


def test_counts_of_data_agree_with_their_nouns():
    one = DataCounts(rows=2, examples=1, tokens=1, cut_tokens=1, dropped={"empty": 1})
    assert str(one) == "2 rows, 1 example, 1 token; 1 token cut off, 1 dropped (1 empty)"
