"""The quality measures, by hand."""
import pytest

import bulletins
import quality


def sample(story, headline="cat sleeps in the tree", is_finished=True):
    return quality.Sample(bulletins.Bulletin(headline, story), is_finished)


def measured(*samples, training=()):
    training = [words.split() for words in training]
    runs, nearest = quality.copied_runs([bulletins.words_of(s.bulletin.story) for s in samples], training)
    known, seeds = {word for words in training for word in words}, quality.seed_words([["sleep", "sleeps"], ["tr"]])
    measures = quality.per_bulletin(list(samples), runs, nearest, known, seeds, {"elba"})
    return {name: sum(totals) / sum(counts) if sum(counts) else None for name, (totals, counts) in measures.items()}


def test_copied_runs_by_hand():
    runs, nearest = quality.copied_runs(["a b c d e x".split(), "p q".split()], ["z a b c d".split(), "c d e".split()])
    assert runs == [[4, 3, 3, 0, 0, 0], [0, 0]]
    # 3-grams of the story: abc bcd cde dex; of the first training story: zab abc bcd. 2 shared of 5.
    assert nearest == [2 / 5, 0]


def test_novelty_by_hand():
    values = measured(sample("a b c d e x."), training=["z a b c d", "c d e"])
    assert values["unseen_4_grams"] == 2 / 3                     # abcd is seen; bcde, cdex are not
    assert values["unseen_5_grams"] == 1.0
    assert values["unseen_7_grams"] is None                      # no such long story
    assert (values["longest_copied_run"], values["nearest_training_story"]) == (4, 2 / 5)
    copy = measured(sample("A b c, d e f g h i j k."), training=["a b c d e f g h i j k"])
    assert (copy["unseen_10_grams"], copy["longest_copied_run"], copy["near_duplicates_of_training"]) == (0, 11, 1)


def test_seed_words_and_new_words_by_hand():
    values = measured(sample("a b zog."), sample("a Elba.", "a tree asleep"), training=["a b elba"])
    assert values["headlines_with_seed_word"] == 0.5             # of sleeps, and neither asleep nor tree
    assert values["stories_with_proper_noun"] == 0.5
    assert values["unseen_words"] == 1 / 5


def test_runs_agree_with_a_plain_search():
    examples = ["the cat sat on the mat and the cat ran".split(), "the cat ran on the mat the cat sat on".split()]
    training = ["on the mat and the cat sat on the mat".split(), "the cat ran on the cat ran on the mat".split()]
    runs, _ = quality.copied_runs(examples, training)
    for words, found in zip(examples, runs):
        for start, n in enumerate(found):
            def is_seen(length):
                return any(f" {' '.join(words[start:start + length])} " in f" {' '.join(other)} " for other in training)
            longest = max((length for length in range(3, len(words) - start + 1) if is_seen(length)), default=0)
            assert n == longest


def test_headline_ending_and_repetition():
    values = measured(sample("the cats sleep. no tree was seen."), sample("a dog runs", "sun over the hills"))
    assert values["headline_words_in_story"] == 2 / 5            # of cat, sleep, tree two; of sun, hills none
    assert values["ends_properly"] == 1 / 2
    assert measured(sample("it ends.", is_finished=False))["ends_properly"] == 0
    assert measured(sample("a big and big dog. the end and end it was."))["repeats_itself"] == 0
    assert measured(sample("the the dog ran."))["repeats_itself"] == 1


def test_empty_story_counts_as_a_story_without_words():
    values = measured(sample(""), sample("one two three."))
    assert values["words_per_story"] == 1.5 and values["ends_properly"] == 1 / 2
    assert measured(sample(""))["reading_grade"] is None


def test_reading_grade_by_hand():
    # 6 words in 2 sentences, 7 syllables: 0.39 * 3 + 11.8 * 7 / 6 - 15.59
    assert quality.reading_grade("The cat sat. It was happy.") == pytest.approx(0.39 * 3 + 11.8 * 7 / 6 - 15.59)
    assert quality.reading_grade("Investigators determined the circumstances of the unfortunate accident.") > 12


@pytest.mark.parametrize("word, n", [
    ("cat", 1), ("table", 2), ("smile", 1), ("walked", 1), ("wanted", 2), ("makes", 1), ("boxes", 2), ("happy", 2),
    ("the", 1), ("banana", 3), ("5", 1), ("three", 1), ("whole", 1), ("agree", 2)])
def test_syllables(word, n):
    assert quality.n_syllables(word) == n


def test_diversity_is_taken_at_equal_size():
    once = [sample("one two three four five six.")]
    again = [sample("one two three four five six.")] * 40
    at_equal_size = [quality.pooled(samples, 6, 28) for samples in (once, again)]
    assert at_equal_size[0] == at_equal_size[1] and at_equal_size[0]["distinct_2_grams"] == 1
    everything = quality.pooled(again, 10_000, 10_000)
    assert everything["distinct_1_grams"] == 6 / 240 and everything["distinct_2_grams"] == 5 / 200
    assert everything["compression_ratio"] > 5
