import pytest

from personae.errors import ConfigError
from personae.serve.limits import Rate, Tokens


def test_a_token_says_whose_it_is(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("anna aaaaaaaaaaaaaaaa # hers\n\nben bbbbbbbbbbbbbbbb#b\n", "utf-8")
    tokens = Tokens.read(path)
    assert tokens.owner("a" * 16) == "anna" and tokens.owner("b" * 16 + "#b") == "ben"
    assert tokens.owner("a" * 15) is None and tokens.owner("") is None
    assert "aaaa" not in repr(tokens)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("anna secret\n", "line 1"),
        ("anna\n", "line 1"),
        ("# nobody\n", "holds no token"),
        (f"anna {'a' * 16}\nanna {'b' * 16}\n", "line 2"),
        (f"anna {'a' * 16}\nben {'a' * 16}\n", "line 2"),
    ],
)
def test_bad_token_files_are_refused_and_not_quoted(tmp_path, text, message):
    (tmp_path / "tokens").write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=message) as found:
        Tokens.read(tmp_path / "tokens")
    assert "secret" not in str(found.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokens.read(tmp_path / "nothing")


def test_a_bucket_empties_and_fills_again():
    now = [0.0]
    rate = Rate(60, lambda: now[0])
    assert [rate.allows("anna") for _ in range(61)] == [True] * 60 + [False]
    assert rate.allows("ben")
    now[0] = 1.0
    assert [rate.allows("anna") for _ in range(2)] == [True, False]
    now[0] = 1000.0
    assert sum(rate.allows("anna") for _ in range(100)) == 60
