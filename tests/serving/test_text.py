"""Decoding and stop strings: however the engine groups its tokens, the client sees the same text and no stop string."""

from hypothesis import given
from hypothesis import strategies as st
from nemo_lite_serving.protocol import Output, TokenLogprobs
from nemo_lite_serving.text import (
    LEAST_LOGPROB,
    StopStrings,
    Token,
    TokenText,
    chat_logprobs,
    completion_logprobs,
    prompt_tokens,
    token_string,
)

from nemo_lite.data.tokenizer import bytes_tokenizer, train_bpe

BYTES = bytes_tokenizer()
BPE = train_bpe(["abcabc abab cab 日本語 日本 é ß " * 50], 300)
TEXTS = st.text(st.sampled_from("abc é日"), max_size=24)
STOPS = st.lists(st.text(st.sampled_from("abc é日"), min_size=1, max_size=4), max_size=3)


def cut(text, stops, include=False):
    """What StopStrings promises, said in another way: the shortest beginning of the text that ends with a stop."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end if include else end - max(map(len, found))], True
    return text, False


def split(data, items):
    groups = []
    while items:
        count = data.draw(st.integers(1, len(items)))
        groups.append(items[:count])
        items = items[count:]
    return groups


def shown(tokenizer, groups, finish="length", **how):
    decoder, tokens = TokenText(tokenizer, **how), []
    for number, group in enumerate(groups):
        last = number == len(groups) - 1
        depths = list(range(len(group)))
        tokens += decoder.push(Output("x", list(group), depths, finish_reason=finish if last else None))
        if decoder.stopped:
            break
    return decoder, tokens


@given(TEXTS, STOPS, st.data())
def test_stop_strings_are_found_whatever_the_split(text, stops, data):
    search, position, found = StopStrings(stops), 0, None
    for piece in split(data, text):
        assert search.held <= position
        found = search.push(piece)
        if found is not None:
            found = (position + found[0], position + found[1])
            break
        position += len(piece)
    expected, stopped = cut(text, stops)
    assert (found is not None) == stopped
    if found is not None:
        assert text[: found[0]] == expected
        assert text[: found[1]] == cut(text, stops, include=True)[0]


@given(TEXTS, STOPS, st.booleans(), st.sampled_from([BYTES, BPE]), st.data())
def test_any_split_gives_the_same_text(text, stops, include, tokenizer, data):
    ids = tokenizer.encode(text, special=False)
    groups = split(data, ids) or [[]]
    decoder, tokens = shown(tokenizer, groups, stops=stops, include_stop=include)
    expected, stopped = cut(text, stops, include)
    assert "".join(token.text for token in tokens) == expected
    assert decoder.stopped == stopped
    if not stopped:
        assert [token.id for token in tokens] == ids
        assert decoder.consumed == len(ids)
    else:
        # What was counted reaches exactly to the token that completes the stop string.
        through = cut(text, stops, include=True)[0]
        assert tokenizer.decode(ids[: decoder.consumed]).startswith(through)
        assert not tokenizer.decode(ids[: decoder.consumed - 1]).startswith(through)


@given(TEXTS, STOPS, st.data())
def test_nothing_of_a_stop_string_is_shown_early(text, stops, data):
    """At every moment what was shown is a beginning of the final text."""
    decoder, so_far = TokenText(BYTES, stops=stops), ""
    final, _ = cut(text, stops)
    for group in split(data, BYTES.encode(text, special=False)):
        so_far += "".join(token.text for token in decoder.push(Output("x", group)))
        assert final.startswith(so_far)
        if decoder.stopped:
            break


@given(st.lists(st.integers(0, 259), max_size=12), st.data())
def test_any_bytes_decode_as_the_tokenizer_does(ids, data):
    groups = split(data, ids) or [[]]
    _, tokens = shown(BYTES, groups, skip_special=False)
    whole = BYTES.stream()
    assert "".join(token.text for token in tokens) == "".join(map(whole.push, ids)) + whole.flush()


def test_a_character_comes_with_its_tokens():
    decoder = TokenText(BYTES)
    first, *rest = "é".encode()
    assert decoder.push(Output("x", [first])) == []
    assert [token.text for token in decoder.push(Output("x", rest))] == ["", "é"]


def test_half_a_character_at_the_end():
    decoder, tokens = shown(BYTES, [[97], [0xC3]])
    assert "".join(token.text for token in tokens) == "a\ufffd"
    assert decoder.consumed == 2


def test_the_stop_token_is_counted_and_not_shown():
    decoder, tokens = shown(BYTES, [[97, 98], [256]], finish="stop", stop_ids=[256])
    assert [token.text for token in tokens] == ["a", "b"]
    assert decoder.consumed == 3
    _, tokens = shown(BYTES, [[97, 98]], finish="stop", stop_ids=[98])
    assert [token.text for token in tokens] == ["a"]
    _, tokens = shown(BYTES, [[97, 98]], finish="stop", stop_ids=[98], include_stop=True)
    assert [token.text for token in tokens] == ["a", "b"]


def test_special_tokens():
    ids = [[97, 259, 98, 258]]
    assert [token.text for token in shown(BYTES, ids)[1]] == ["a", "", "b", ""]
    assert [token.text for token in shown(BYTES, ids, keep=[259])[1]] == ["a", "<|im_end|>", "b", ""]
    assert [token.text for token in shown(BYTES, ids, skip_special=False)[1]] == [
        "a",
        "<|im_end|>",
        "b",
        "<|im_start|>",
    ]
    assert [token.text for token in shown(BYTES, [[97, 5000, 98]])[1]] == ["a", "", "b"], "a row without a token"


def test_no_stop_string_before_min_tokens():
    ids = list(b"axbxc")
    assert "".join(token.text for token in shown(BYTES, [ids], stops=["x"], min_tokens=3)[1]) == "axb"
    assert "".join(token.text for token in shown(BYTES, [ids], stops=["x"], min_tokens=5)[1]) == "axbxc"


def test_depths_of_what_was_consumed():
    decoder, tokens = shown(BYTES, [list(b"abc"), list(b"de")], stops=["d"])
    assert [(token.text, token.depth) for token in tokens] == [("a", 0), ("b", 1), ("c", 2)]
    assert decoder.accepted_at == [1, 1]
    assert decoder.consumed == 4


def test_token_strings():
    assert token_string(BYTES, 97) == ("a", b"a")
    assert token_string(BYTES, 0xC3) == ("bytes:\\xc3", b"\xc3")
    assert token_string(BYTES, 9999) == ("", b"")


def test_logprobs_as_openai_has_them():
    tokens = [
        Token(97, "a", 0, TokenLogprobs(-0.5, ((97, -0.5), (98, float("-inf"))))),
        Token(0xC3, "", 0, TokenLogprobs(-1.0, ((98, -0.1), (97, -0.2)))),
        Token(0xA9, "é", 0, TokenLogprobs(-2.0)),
    ]
    found = completion_logprobs(BYTES, tokens, 2, offset=7)
    assert found["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert found["text_offset"] == [7, 8, 8]
    assert found["token_logprobs"] == [-0.5, -1.0, -2.0]
    assert found["top_logprobs"][0] == {"a": -0.5, "b": LEAST_LOGPROB}
    assert found["top_logprobs"][1] == {"b": -0.1, "a": -0.2, "bytes:\\xc3": -1.0}, "the chosen one is always there"
    assert completion_logprobs(BYTES, tokens, 0)["top_logprobs"] is None
    chat = chat_logprobs(BYTES, tokens, 1)
    assert chat[0] == {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
    }
    assert chat[1]["bytes"] == [0xC3]


def test_an_echoed_prompt():
    prompt = BYTES.encode("hé")
    tokens = prompt_tokens(BYTES, prompt, [None, TokenLogprobs(-1.0), TokenLogprobs(-2.0)])
    assert "".join(token.text for token in tokens) == "hé"
    found = completion_logprobs(BYTES, tokens, 0)
    assert found["token_logprobs"] == [None, -1.0, -2.0]
    assert found["text_offset"] == [0, 1, 1]
