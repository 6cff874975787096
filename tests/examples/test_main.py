"""The one entry point: every command it lists is there, and a wrong word is answered with the list."""

from __future__ import annotations

import pytest

pytest.importorskip("ultralytics")

from examples.yolo_world import __main__ as entry


@pytest.mark.parametrize("word", entry.COMMANDS)
def test_each_command_explains_itself_under_its_own_name(word, capsys):
    with pytest.raises(SystemExit) as left:
        entry.main([word, "--help"])
    assert left.value.code == 0
    assert f"python -m examples.yolo_world {word}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("words", [[], ["trian"], ["--steps", "3"]])
def test_a_wrong_word_is_answered_with_the_list(words, capsys):
    assert entry.main(words) == 2
    said = capsys.readouterr().err
    assert all(f"  {word} " in said for word in entry.COMMANDS)
    assert not words or f"{words[0]!r} is no command" in said


def test_help_is_the_list(capsys):
    assert entry.main(["--help"]) == 0
    assert capsys.readouterr().out.strip() == entry.listing()
