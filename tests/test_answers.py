"""Raw answers on disk: whole lines only, one writer, nothing asked twice."""
import json
import lzma
import os
import resource
import subprocess
import sys

import pytest

import answers


def answer(key: str, words=("cat",), text: str = "<h1>A</h1><p>B</p>") -> dict:
    return {"key": key, "seed_words": list(words), "text": text}


def keys_in(folder) -> list[str]:
    return [each["key"] for each in answers.read_answers(folder)]


def test_what_is_appended_is_read_again(tmp_path):
    with answers.AnswerFile(tmp_path / "a.jsonl") as file:
        file.append(answer("0/0", ["Zoë", "two"]))
        assert keys_in(tmp_path) == ["0/0"]                # before the file is closed
    earlier = []
    with answers.AnswerFile(tmp_path / "b.jsonl", on_earlier=earlier.append) as file:
        assert earlier == [answer("0/0", ["Zoë", "two"])]
        assert file.is_answered("0/0", ["Zoë", "two"]) and not file.is_answered("0/1", ["x"])
        with pytest.raises(ValueError, match="another --seed"):
            file.is_answered("0/0", ["other", "words"])


def test_files_keep_their_order_when_they_are_compressed_and_put_away(tmp_path):
    def names_after(rename: dict[str, str]) -> list[str]:
        for old, new in rename.items():
            (tmp_path / new).write_bytes(lzma.compress((tmp_path / old).read_bytes()))
            (tmp_path / old).unlink()
        return [path.name for path in answers.answer_files(tmp_path)]

    for name in ("offline-000", "offline", "generated", "zoo"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(answer(name)) + "\n")
    assert names_after({}) == ["generated.jsonl", "offline-000.jsonl", "offline.jsonl", "zoo.jsonl"]
    order = keys_in(tmp_path)
    assert names_after({"offline.jsonl": "offline-001.jsonl.xz", "zoo.jsonl": "zoo.jsonl.xz"}) == [
        "generated.jsonl", "offline-000.jsonl", "offline-001.jsonl.xz", "zoo.jsonl.xz"]
    (tmp_path / "offline.jsonl").write_text(json.dumps(answer("begun anew")) + "\n")
    assert keys_in(tmp_path) == [*order[:3], "begun anew", order[3]]


@pytest.mark.parametrize("torn", [b'{"key": "0/1", "seed_wor', b"{", b"\xc3", b"x" * 200_000])
def test_a_torn_last_line_is_dropped_and_nothing_else(tmp_path, torn):
    path = tmp_path / "a.jsonl"
    whole = json.dumps(answer("0/0")).encode() + b"\n"
    path.write_bytes(whole + torn)
    assert keys_in(tmp_path) == ["0/0"]                    # a reader passes over it
    with answers.AnswerFile(path) as file:
        assert path.read_bytes() == whole
        file.append(answer("0/1"))
    assert keys_in(tmp_path) == ["0/0", "0/1"]


@pytest.mark.parametrize("line", [b"not json\n", b"[]\n", b'{"key": "0/0"}\n',
                                  b'{"key": 1, "seed_words": [], "text": ""}\n'])
def test_a_broken_line_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(answer("0/0")).encode() + b"\n" + line)
    with pytest.raises(ValueError, match="a.jsonl:2"):
        list(answers.read_answers(tmp_path))
    with pytest.raises(ValueError, match="a.jsonl:2"), answers.AnswerFile(tmp_path / "a.jsonl"):
        pass
    (tmp_path / "a.jsonl").write_bytes(b"")
    with answers.AnswerFile(tmp_path / "a.jsonl"):         # the lock was given back
        pass


def test_a_file_that_is_not_whole_xz_is_named(tmp_path):
    packed = lzma.compress(json.dumps(answer("0/0")).encode() + b"\n")
    for broken in (packed[:-10], b"no xz\n"):
        (tmp_path / "a.jsonl.xz").write_bytes(broken)
        with pytest.raises(ValueError, match="a.jsonl.xz: not a whole xz file"):
            list(answers.read_answers(tmp_path))


@pytest.mark.parametrize("examples, complaint", [
    ([], "seed words"), ({}, "seed words"), ({"cat": "Cat found. It sat."}, '"cat": expected "<h1>'),
    ({"dog": None}, '"dog"')])
def test_examples_of_another_form_are_named(tmp_path, examples, complaint):
    path = tmp_path / "examples.json"
    path.write_text(json.dumps(examples))
    with pytest.raises(ValueError, match=f"examples.json: .*{complaint}"):
        answers.read_examples(path)


def test_a_second_writer_is_refused(tmp_path):
    code = "import sys, answers\nwith answers.AnswerFile(__import__('pathlib').Path(sys.argv[1]) / 'b.jsonl'): pass"
    with answers.AnswerFile(tmp_path / "a.jsonl"):
        second = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert "another process is writing" in second.stderr
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0


def test_a_full_disk_leaves_whole_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = len(json.dumps(answer("0/0"))) + 1
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with answers.AnswerFile(path) as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * whole + 10, limits[1]))     # the third line does not fit
        try:
            file.append(answer("0/0"))
            file.append(answer("0/1"))
            with pytest.raises(OSError):
                file.append(answer("0/2"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.stat().st_size == 2 * whole
        assert not file.is_answered("0/2", ["cat"])
        file.append(answer("0/2"))                         # room again
    assert keys_in(tmp_path) == ["0/0", "0/1", "0/2"]


def test_an_epoch_takes_one_word_of_each_list_and_is_always_the_same():
    vocabulary = [[f"a{n}", f"b{n}"] for n in range(25)]
    epoch = list(answers.requests_of_epoch(vocabulary, 0, seed=1, n_words=10))
    assert [key for key, _ in epoch] == ["0/0", "0/1", "0/2"]
    assert sorted(int(word[1:]) for _, words in epoch for word in words) == list(range(25))
    assert epoch == list(answers.requests_of_epoch(vocabulary, 0, seed=1, n_words=10))
    assert epoch[0][1] != next(answers.requests_of_epoch(vocabulary, 1, seed=1, n_words=10))[1]
    assert epoch[0][1] != next(answers.requests_of_epoch(vocabulary, 0, seed=2, n_words=10))[1]


def test_lost_costs_add_up_over_torn_lines(tmp_path):
    path = tmp_path / "lost.log"
    assert answers.read_lost(path) == 0
    answers.note_lost(path, 0.5, "in flight")
    with path.open("ab") as file:
        file.write(b'\n{"usd": 0.2, "ca')                 # killed while it wrote
    answers.note_lost(path, 0.25, "timeout")
    answers.note_lost(path, -0.5, "all arrived")
    assert answers.read_lost(path) == pytest.approx(0.25)
    assert os.listdir(tmp_path) == ["lost.log"] and list(answers.read_answers(tmp_path)) == []
