"""Streamed text in whole characters, and stop strings."""

from __future__ import annotations

import random

import pytest

from qsparse_moe.data.tokenizer import ByteTokenizer, load_tokenizer
from qsparse_moe.errors import ConfigError
from qsparse_moe.inference.stopping import StopStrings, TextStream, check_stop_strings

BYTES = ByteTokenizer()


def pieces(prompt, ids, tokenizer=BYTES):
    stream = TextStream(tokenizer, prompt)
    return [*map(stream.push, ids), stream.flush()]


def test_pieces_end_with_whole_characters_and_join_to_the_text():
    assert pieces([256], BYTES.encode("né €!")) == ["n", "", "é", " ", "", "", "€", "!", ""]


def test_an_incomplete_character_is_shown_at_the_end():
    assert pieces([256], BYTES.encode("a€")[:-1]) == ["a", "", "", "\ufffd"]


def test_bytes_that_are_no_text_are_shown_with_the_next_whole_character():
    assert pieces([256], [0xFF, 0xFE, ord("a")]) == ["", "", "\ufffd\ufffda", ""]


def test_a_character_that_begins_in_the_prompt_is_shown_whole():
    first, *rest = BYTES.encode("€")
    assert pieces([ord("x"), first], [*rest, ord("!")]) == ["", "€", "!", ""]


@pytest.mark.parametrize("before", ["", "x", "words of a prompt"])
@pytest.mark.parametrize("text", ["é", "€", "😀"])
def test_a_character_of_any_length_may_begin_anywhere_in_the_prompt(text, before):
    ids = BYTES.encode(text)
    for begun in range(1, len(ids)):
        waiting = [""] * (len(ids) - begun - 1)
        assert pieces([*before.encode(), *ids[:begun]], [*ids[begun:], ord("!")]) == [*waiting, text, "!", ""]


def test_a_prompt_of_bytes_that_are_no_text_is_not_shown_again():
    assert pieces([0xFF] * 9, BYTES.encode("ab")) == ["a", "b", ""]


def test_long_texts_are_decoded_in_short_parts():
    lengths = []

    class Recording(ByteTokenizer):
        def decode(self, ids):
            lengths.append(len(ids))
            return super().decode(ids)

    text = "größe 漢字 " * 60
    ids = BYTES.encode(text)
    assert "".join(pieces([256, *ids], ids, Recording())) == text
    assert max(lengths) <= 12


def test_words_keep_the_spaces_that_the_tokenizer_writes_between_them(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["</s>", "▁one", "▁two", "three", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    loaded = load_tokenizer(str(tmp_path))
    assert pieces([0, 1], [2, 3, 2, 1], loaded) == [" two", "three", " two", " one", ""]
    assert "".join(pieces([0], [1, 2, 3], loaded)) == loaded.decode([0, 1, 2, 3]) == "one twothree"
    assert (loaded.special_id("</s>"), loaded.special_id("▁one")) == (0, None)


def stopped(strings, parts):
    stops = StopStrings(strings)
    return [stops.push(part) for part in parts], stops.found, stops.flush()


def test_a_stop_string_in_one_piece_ends_the_text_before_it():
    assert stopped(["END"], ["abENDcd"]) == (["ab"], True, "")


def test_a_stop_string_may_come_in_pieces_and_is_held_back_until_it_is_certain():
    assert stopped(["END"], ["aE", "N", "Dz"]) == (["a", "", ""], True, "")
    assert stopped(["END"], ["aE", "N", "N"]) == (["a", "", "ENN"], False, "")
    assert stopped(["END"], ["aEN"]) == (["a"], False, "EN"), "nothing is lost where the text ends first"


def test_a_stop_string_that_begins_inside_another_one_is_not_missed():
    assert stopped(["aab"], ["aa", "ab"]) == (["", "a"], True, "")
    out, found, _ = stopped(["aab"], ["aa", "a", "b"])
    assert ("".join(out), found) == ("a", True)


def test_the_first_of_several_stop_strings_counts():
    assert stopped(["three", "two"], ["one two three"]) == (["one "], True, "")
    assert stopped(["one", "two"], ["one two three"]) == ([""], True, ""), "also at the very beginning"


def test_text_is_held_back_for_the_stop_string_that_may_have_begun_first():
    assert stopped(["xyz", "z"], ["axy", "x"]) == (["a", "xy"], False, "x")
    assert stopped(["bc", "abcd"], ["zab", "x"]) == (["z", "abx"], False, "")


def test_any_division_of_a_text_stops_at_the_same_position():
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choice("ab") for _ in range(30))
        strings = ["".join(draw.choice("ab") for _ in range(draw.randint(1, 5))) for _ in range(2)]
        cuts = sorted(draw.sample(range(31), 6))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 30], strict=True)]
        stops, shown = StopStrings(strings), ""
        for part in parts:
            shown += stops.push(part)
            if stops.found:
                break
        shown += stops.flush()
        # The slow version: grow the text part by part and search all of it.
        seen = ""
        for part in parts:
            seen += part
            places = [seen.find(string) for string in strings if string in seen]
            if places:
                assert stops.found and shown == seen[: min(places)]
                break
        else:
            assert not stops.found and shown == text


def test_an_empty_stop_string_is_refused():
    check_stop_strings(["a"])
    with pytest.raises(ConfigError, match=r"stop \(\['a', ''\]\) must hold strings of at least one character"):
        check_stop_strings(["a", ""])
