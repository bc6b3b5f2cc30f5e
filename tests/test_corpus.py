"""The files of a corpus; what is published is never written again."""
import pytest

from corpus import publish


def test_a_corpus_without_held_out_bulletins_is_not_published(tmp_path):
    (tmp_path / "validation.txt").write_text("")
    (tmp_path / "train.txt").write_text("storm </h> it rained.\n")
    with pytest.raises(ValueError, match="validation.txt: no bulletin is held out yet"):
        publish(tmp_path, 2)
    assert not list(tmp_path.glob("*.xz"))


def test_a_missing_shard_does_not_lead_to_another_being_overwritten(tmp_path):
    (tmp_path / "validation.txt").write_text("sun </h> it was dry.\n")
    lines = [f"storm {i} </h> it rained.\n" for i in range(5)]
    (tmp_path / "train.txt").write_text("".join(lines))
    new = publish(tmp_path, 2)
    assert [path.name for path in new] == ["validation.txt.xz", *(f"train-00{i}.txt.xz" for i in range(3))]
    before = {path: path.read_bytes() for path in new}
    new[1].unlink()
    (tmp_path / "train.txt").write_text("".join([*lines[2:], "snow </h> it snowed.\n"]))
    with pytest.raises(ValueError, match="train-002.txt.xz: published already, but a shard before it is missing"):
        publish(tmp_path, 2)
    assert all(path.read_bytes() == before[path] for path in [new[0], *new[2:]])
