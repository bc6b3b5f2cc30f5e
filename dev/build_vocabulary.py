"""Build vocabulary.json, the seed words of the corpus, from open word lists.

Reads:   wordfreq (how common a word is in subtitles, news, the web), lemminflect (inflections),
         SCOWL (which strings are words, which are names or abbreviations), better_profanity (slurs and swear words).
Writes:  a list of lists, each of one to three forms of one headword. An epoch takes one word from each list.
Run:     apt-get install scowl && pip install wordfreq lemminflect better_profanity
         python dev/build_vocabulary.py --out vocabulary.json        # 10 s on one CPU core
"""
import argparse
import json
import sys
from importlib.resources import files
from pathlib import Path

from lemminflect import getAllInflections, getAllLemmas
from wordfreq import top_n_list, zipf_frequency

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli

N_CANDIDATES = 60_000         # how far down the frequency list headwords are looked for
MIN_FORM_ZIPF = 2.1           # an inflected form rarer than about 1 in 8 million words is no use as a seed
MAX_HEADWORD_ZIPF = 6.2       # above it are function words ("the", "that"), which every bulletin holds anyway
PROPER_TAGS = ("NNP", "NNPS")
# Words that the lists let through, but that no bulletin for sixth graders should be asked to hold.
UNWANTED = set("""
    aids anus arse beheading bimbo boob bondage bong breast brothel busty butt buttock cleavage cocaine condom crotch
    cunt damn dope drunkard erect erection erotic escort fag fetish gangbang genital gay ghetto god groin hell heroin
    hooker horny incest intercourse kinky lesbian libido lingerie masturbation mate molest molester morphine naked nazi
    negro nude nudity oriental orgasm orgy paedophile panties pedophile penetrate pimp playboy porn pornography pot
    prostitute prostitution pube queer racist rape rapist retard savage seduce semen sex sexist sexual sexuality
    sexually sexy sissy slave slavery slut smut spastic sperm strip stripper suicide suicidal terrorist thong topless
    torture tramp transsexual underwear vagina virgin weed whip whore
    amid arabic bloke celtic chap chick choir dude gal gee guy hmm huh lad lass mum okay ooh ouch oops pal papa sir ugh
    wow yeah yep yes blah bye hello hey hooray meh phew wanna gonna gotta thee thou
    some also them other others its our him his her hers she their theirs your yours they you mine ours
    myself yourself itself himself herself ourselves themselves yourselves whom whose who which these those there here
    """.split())


def scowl_words(folder: Path, category: str, max_size: int) -> set[str]:
    """Return the strings of one SCOWL category (words, upper, proper-names, abbreviations) up to a size level."""
    words: set[str] = set()
    for region in ("english", "american"):
        for path in folder.glob(f"{region}-{category}.*"):
            if int(path.suffix[1:]) <= max_size:
                words.update(path.read_text(encoding="latin-1").split())
    if not words:
        raise FileNotFoundError(f"{folder}: no SCOWL lists of {category}; apt-get install scowl")
    return words


def profanities() -> set[str]:
    text = files("better_profanity").joinpath("profanity_wordlist.txt").read_text(encoding="utf-8")
    return set(text.split("\n"))


def headword_of(word: str) -> str | None:
    """Return a word if it is its own lemma, None if it is only an inflected form of another word."""
    lemmas = {lemma for forms in getAllLemmas(word).values() for lemma in forms}
    return word if word in lemmas else None


def forms_of(headword: str, words: set[str], taken: set[str]) -> list[str]:
    """Return the headword and its usable inflections, except those that another headword has taken."""
    forms = [headword]
    for tag, inflections in getAllInflections(headword).items():
        if tag not in PROPER_TAGS:
            forms += [form for form in inflections if form not in forms]
    return [f for f in forms if f in words and f not in taken and zipf_frequency(f, "en") >= MIN_FORM_ZIPF]


def cut(forms: list[str]) -> list[list[str]]:
    """Cut the forms of a headword into lists of one to three, as even as can be.

    >>> cut(["walk", "walks", "walking", "walked"])
    [['walk', 'walks'], ['walking', 'walked']]
    """
    n_lists = -(-len(forms) // 3)
    bounds = [round(i * len(forms) / n_lists) for i in range(n_lists + 1)]
    return [forms[a:b] for a, b in zip(bounds, bounds[1:])]


def build(scowl: Path, n_forms: int) -> list[list[str]]:
    """Return the lists of seed words, most common headword first, until they hold n_forms forms."""
    words = {w for w in scowl_words(scowl, "words", 55) if w.isascii() and w.isalpha() and w.islower() and len(w) > 2}
    names = {w.lower() for category in ("upper", "proper-names", "abbreviations")
             for w in scowl_words(scowl, category, 60)}
    words -= names | profanities() | UNWANTED
    lists: list[list[str]] = []
    taken: set[str] = set()
    for candidate in top_n_list("en", N_CANDIDATES):
        if candidate not in words or candidate in taken or zipf_frequency(candidate, "en") > MAX_HEADWORD_ZIPF:
            continue
        headword = headword_of(candidate)
        if headword is None:
            continue
        forms = forms_of(headword, words, taken)
        taken.update(forms)
        lists += cut(forms)
        if len(taken) >= n_forms:
            return lists
    raise ValueError(f"--n-forms {n_forms}: the word lists hold only {len(taken)} forms under these rules")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("vocabulary.json"), help="default: %(default)s")
    parser.add_argument("--scowl", type=Path, default=Path("/usr/share/dict/scowl"), help="default: %(default)s")
    parser.add_argument("--n-forms", type=cli.at_least(int, 1), default=18_500,
                        help="stop at this many forms (default: %(default)s)")
    args = parser.parse_args(argv)

    def command() -> None:
        lists = build(args.scowl, args.n_forms)
        args.out.write_text("[\n" + ",\n".join(json.dumps(forms) for forms in lists) + "\n]\n", encoding="utf-8")
        n_headwords = len({word for forms in lists for word in forms if headword_of(word)})
        print(f"{args.out}: {n_headwords:,} headwords, {sum(map(len, lists)):,} forms, {len(lists):,} lists",
              file=sys.stderr)

    return cli.run(command)


if __name__ == "__main__":
    sys.exit(main())
