"""The pattern string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_lite import pattern


def test_parse_and_stages():
    assert pattern.parse("MEM*E-") == "MEM*E-"
    assert pattern.parse("ME|M*") == "MEM*"
    assert pattern.stages("ME|M*|-") == ["ME", "M*", "-"] and pattern.stages("M") == ["M"]


@pytest.mark.parametrize(
    "text,words",
    [
        ("MEX", "unknown letter 'X' at position 2 of pattern 'MEX'"),
        ("m", "unknown letter 'm' at position 0"),
        ("M E", "unknown letter ' '"),
        ("", "is empty"),
        ("|", "is empty"),
        ("M||E", "has an empty pipeline stage"),
        ("|M", "has an empty pipeline stage"),
        ("M|", "has an empty pipeline stage"),
    ],
)
def test_refusals(text, words):
    for function in (pattern.parse, pattern.stages, pattern.to_hf):
        with pytest.raises(pattern.PatternError) as caught:
            function(text)
        assert words in str(caught.value) and "\n" not in str(caught.value)


@given(st.text("ME*-", min_size=1))
def test_hugging_face_names_round_trip(text):
    assert pattern.from_hf(pattern.to_hf(text)) == text


def test_hugging_face_spellings():
    assert pattern.from_hf(["mamba", "attention", "linear_attention", "full_attention", "moe", "mlp"]) == "M*M*E-"
    with pytest.raises(pattern.PatternError, match="unknown layer type 'rwkv'"):
        pattern.from_hf(["moe", "rwkv"])
