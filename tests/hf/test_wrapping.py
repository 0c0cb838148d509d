"""Methods of other libraries that this package wraps take their arguments as before."""

import inspect

import pytest

from qft_hf.hf.wrapping import WRAPPERS

# transformers calls them with the module to resize by position, and both have one wrapper.
BY_POSITION = ("_get_resized_embeddings", "_get_resized_lm_head")


@pytest.mark.parametrize(
    ("owner", "name", "wrapper"), [row for row in WRAPPERS if row[1] not in BY_POSITION]
)
def test_a_wrapper_takes_arguments_by_the_names_of_the_method(owner, name, wrapper):
    """The guard of loading once did not, and transformers could load no adapters."""
    of_method = list(inspect.signature(inspect.unwrap(getattr(owner, name))).parameters)
    _method, _first, *others = inspect.signature(wrapper).parameters.values()
    named = [p.name for p in others if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert named == of_method[1 : 1 + len(named)]
