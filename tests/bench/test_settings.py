from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from paperworks.bench import Bound, Settings, claim, load_claim, scaled
from paperworks.errors import MissingExtra, UserError


class Example(Settings):
    epochs: int = scaled(smoke=1, quick=10, full=100, ge=1, description="passes")
    lr: float = Field(0.1, gt=0)
    nesterov: bool = False
    name: str = "plain"
    kind: Literal["a", "b"] = "a"
    taus: tuple[float, ...] = (0.5, 1.0)
    limit: int | None = None


def test_defaults_go_with_the_scale():
    assert [Example.at(scale).epochs for scale in ("smoke", "quick", "full")] == [1, 10, 100]
    assert Example().epochs == 10
    assert Example.at("full", {"epochs": 7}).epochs == 7


@given(epochs=st.integers(1, 10**6), lr=st.floats(1e-9, 1e9), nesterov=st.booleans(), taus=st.lists(st.floats(-9, 9)))
def test_values_read_from_text_are_those_that_were_written(epochs, lr, nesterov, taus):
    values = {"epochs": epochs, "lr": lr, "nesterov": nesterov, "taus": tuple(taus)}
    read = Example.at("quick", {"epochs": str(epochs), "lr": repr(lr), "nesterov": str(nesterov), "taus": str(taus)})
    assert read == Example(**values)
    assert Example(**read.model_dump(mode="json")) == read


@given(name=st.text(max_size=8))
def test_text_stays_text(name):
    assert Example.at("quick", {"name": f"a{name}"}).name == f"a{name}"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"epoch": 1}, "unknown setting 'epoch'. Did you mean 'epochs'?"),
        ({"epochs": "0"}, "setting epochs='0': input should be greater than or equal to 1"),
        ({"lr": "inf"}, "setting lr='inf': input should be a finite number"),
        ({"lr": ""}, "setting lr='': input should be a valid number"),
        ({"nesterov": "perhaps"}, "setting nesterov='perhaps': input should be a valid boolean"),
        ({"kind": "c"}, "setting kind='c': input should be 'a' or 'b'"),
        ({"taus": "1,2"}, "setting taus='1,2': input should be a valid tuple"),
        ({"taus": '{"a": 1}'}, "setting taus="),
        ({"limit": "x"}, "setting limit"),
    ],
)
def test_bad_settings(overrides, words):
    with pytest.raises(UserError) as caught:
        Example.at("quick", overrides)
    assert str(caught.value).startswith(words)


def test_a_claim_is_checked_where_it_is_declared():
    expects = [Bound("m", "a", at_least=0)]
    with pytest.raises(UserError, match=r"unknown arm 'a'\. Choose from: x"):
        claim("slug", arms=["x"], expects=expects)
    for arm in ("a b", "", "a/b", "../a", "combine:a"):
        with pytest.raises(UserError, match="must consist of letters, digits"):
            claim("slug", arms=["a", arm], expects=expects)
    with pytest.raises(UserError, match="expects nothing"):
        claim("slug", arms=["a"], expects=[])

    @claim("slug", arms=["a"], expects=expects, seeds={"full": 9})
    def trial(run, arm, settings: Example): ...

    assert (trial.settings, dict(trial.seeds)) == (Example, {"smoke": 1, "quick": 5, "full": 9})


def test_what_cannot_be_combined_says_so(tiny):
    with pytest.raises(UserError, match="nudge has no training that others can join"):
        load_claim("nudge").check_host()

    @claim("slug", arms=["a"], expects=[Bound("m", "a", at_least=0)])
    def trial(run, arm, settings: Example): ...

    with pytest.raises(UserError, match="slug is not an intervention"):
        trial.check_joins()
    tiny.check_host()
    tiny.check_joins()


def test_a_claim_that_needs_an_extra_names_it():
    with pytest.raises(
        MissingExtra, match=r"heavy needs a_package_that_nobody_has: pip install 'paperworks\[graphs\]'"
    ):
        load_claim("heavy")
    with pytest.raises(UserError, match=r"unknown method 'tinny'\. Did you mean 'tiny'"):
        load_claim("tinny")
