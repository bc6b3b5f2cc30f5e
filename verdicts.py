"""What a judge's answer says, however broken its JSON: the score of one bulletin, or the better of two.

An answer is a JSON object or the continuation of one that begins with PREFILLED. Sound JSON is parsed. In anything
else, the key that counts is looked for, then its value, then what ends that value: notes may hold the word, too.
"""
import json
import re
import unicodedata
from bisect import bisect_left
from typing import NamedTuple

from bulletins import ASCII_PUNCTUATION

PREFILLED = '{"notes": "'
LOWEST, HIGHEST = 1, 5        # the scale of a score
CHOICES = {"a": 1.0, "b": 0.0, "tie": 0.5}         # for the story that stands first
WORDS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}

CODE_FENCE = re.compile(r"\A\s*```\w*\s*")
# What opens and closes a model's thoughts: <think> and its like, and the marks of Magistral, Kimi and gpt-oss.
TAG = r"(?:\w+:)?(?:think(?:ing)?|thoughts?|reasoning|analysis|scratchpad)"
THOUGHTS = re.compile(rf"\A.*(?:</{TAG}>|\[/THINK\]|\u25c1/think\u25b7|<\|channel\|>final<\|message\|>)"
                      rf"|(?:<{TAG}>|\[THINK\]|\u25c1think\u25b7|<\|channel\|>analysis).*\Z", re.DOTALL | re.IGNORECASE)
BEHIND_ALL = re.compile(rf"(?<=\}})\s*(?:</{TAG}>\s*)+\Z", re.IGNORECASE)       # a tag that closes nothing
INVISIBLE = dict.fromkeys(map(ord, "\u200b\ufeff"))
DECODER = json.JSONDecoder(strict=False)      # takes line breaks inside strings
IS_WHOLE = re.compile(r"[.!?)*`]\Z")      # how an answer ends that was not cut off, as far as one can tell

# ---------------------------------------------------------------- a value: score or choice

OF_FIVE = r"(?i:\s*(?:/|(?:out\ )?of)\s*(?:5(?:\.0+)?|five\b))"
REMARK = r"(?:\s*(?:[:;(\[\#]|/[/*]|-+\s)|\s+(?:[A-Z]|(?:because|since|as|for)\b))"      # how one begins behind a value
# 4, "4/5", "4 of 5 stars", "Score: 4", "4: good", "4. The story is fine"
NUMBER = re.compile(rf"(?:(?i:evaluation|score|rating)\s*[:=]\s*)?([+-]?[0-9]+(?:\.[0-9]+)?){OF_FIVE}?"
                    rf"(?:\s*(?:stars?|points?)\b{OF_FIVE}?)?(?P<remark>(?:{REMARK}|\s*,|\.\s).*)?")
CHOICE = re.compile(rf"(?:(?i:story)\s+)?((?i:a|b|tie))(?P<remark>(?:{REMARK}|\s*,|\.\s).*)?")
# What makes a value doubtful if the remark holds it; a number that counts something ("one small fault") does not, nor
# the end of the scale.
SCALE = re.compile(rf"{OF_FIVE}\b|\b1\s?(?:-|to)\s?5\b")
OTHER_NUMBER = re.compile(r"""
    \A \W* (?: or | to ) \b
    | \b (?: [0-9]+ | one | two | three | four | five | ten ) \b
      (?! [\s-]+ (?! (?: for | points? | stars? ) \b ) [a-z] )
    """, re.IGNORECASE | re.VERBOSE)
OTHER_CHOICE = re.compile(r"\b(?:or|a|b|tie)\b", re.IGNORECASE)


class Reading(NamedTuple):
    """What an answer says: its score, or why it has none."""
    score: float | None
    problem: str | None = None


def read_answer(text: str | None) -> Reading:
    """Return the score that a judge's answer gives, or why it gives none; a score is never guessed.

    Answers are often broken: line breaks and quotes inside the notes, text around the object, a second object, an end
    in the middle. The first object that gives an evaluation counts.

    >>> read_answer('The plot is "odd", but\\nsimple.", "evaluation": "4"} Done.')
    Reading(score=4.0, problem=None)
    >>> read_answer('I would give it an evaluation: 4, if the')
    Reading(score=None, problem='cut off before the evaluation')
    """
    text = without_frame(text or "")
    if not text:
        return Reading(None, "empty")
    readings = {score_of(value) for value in values_of(text, "evaluation")}
    if readings:
        return readings.pop() if len(readings) == 1 else Reading(None, "several evaluations")
    is_whole = "}" in text or IS_WHOLE.search(text)
    return Reading(None, "no evaluation" if is_whole else "cut off before the evaluation")


def read_better(text: str | None) -> float | None:
    """Return what a judge's answer chose, as in CHOICES; None if it does not say or contradicts itself.

    >>> read_better('A is cut.", "better": "B"}'), read_better('"better": "tie"'), read_better("A, I think")
    (0.0, 0.5, None)
    """
    choices = {choice_of(value) for value in values_of(without_frame(text or ""), "better")}
    return choices.pop() if len(choices) == 1 else None


def score_of(value: object) -> Reading:
    """Return the score that a value of "evaluation" stands for: 4, "4/5", "4: good", "four". Half points are kept."""
    text = one_line(value)
    match = NUMBER.fullmatch(WORDS.get(text.lower(), text))
    if match is None or isinstance(value, bool) or OTHER_NUMBER.search(SCALE.sub("", match["remark"] or "")):
        return Reading(None, f"not a number: {value!r:.20}")
    score = float(match[1])
    return Reading(score) if LOWEST <= score <= HIGHEST else Reading(
        None, f"outside {LOWEST} to {HIGHEST}: {match[1]:.20}")


def choice_of(value: object) -> float | None:
    """Return what a value of "better" stands for: "A", "story B", "tie"; None if it may be another."""
    match = CHOICE.fullmatch(one_line(value))
    return CHOICES[match[1].lower()] if match and not OTHER_CHOICE.search(match["remark"] or "") else None


def one_line(value: object) -> str:
    return " ".join(plain(str(value)).split()).strip(" *_`<>)\"'")


# ---------------------------------------------------------------- an answer: the values of a key


def without_frame(text: str) -> str:
    """Return an answer without what a model thought before it, and without the fence that opens a block of code.

    Some servers leave out the tag that opens the thoughts.
    """
    return CODE_FENCE.sub("", THOUGHTS.sub("", BEHIND_ALL.sub("", text))).strip()


def plain(text: str) -> str:
    """Return a text with plain quotes, dashes and digits for typographic and full-width ones."""
    return unicodedata.normalize("NFKC", text.translate(ASCII_PUNCTUATION))


def values_of(text: str, name: str) -> list:
    """Return what the first object of an answer that has a key of this name gives for it: no value, one, or several."""
    values, rest = sound_values(text, name)
    if not values:
        # Line breaks spelled \n become real ones, too, only now: it would have spoiled sound JSON.
        values = broken_values(plain(rest).replace("\\n", "\n").translate(INVISIBLE).strip(), name)
    return values


def sound_values(text: str, name: str) -> tuple[list, str]:
    """Return the values of a key in the first sound JSON object of a text, and what is left to search.

    An object without any is cut out of what is left: what its notes say does not count.
    """
    before, brace, after = text.partition("{")
    for before, candidate in (("", PREFILLED + text), (before, brace + after)):
        if name in before.lower() or OPENS_INNER.search(before):
            break                                 # it may be that of a broken object, which then goes first
        try:
            parsed, end = DECODER.raw_decode(candidate)
            return members_named(name, parsed), before + candidate[end:]
        except (ValueError, RecursionError):
            continue
    return [], text


def members_named(name: str, parsed: object) -> list:
    """Return the value of a key in parsed JSON: the object's own, or else those of all objects inside it."""
    if not isinstance(parsed, dict | list):
        return []
    members = list(parsed.items()) if isinstance(parsed, dict) else [("", value) for value in parsed]
    own = [value.removesuffix(".") if isinstance(value, str) else value
           for key, value in members if key.strip().lower() == name]
    if own and isinstance(own[-1], dict):
        return members_named(name, own[-1]) or own[-1:]                       # {"evaluation": {"evaluation": 4}}
    return own[-1:] or [found for _, value in members for found in members_named(name, value)]


# ---------------------------------------------------------------- broken JSON


def key_pattern(name: str) -> re.Pattern:
    """Return what finds a key and its colon. It is in place after a closing quote or bracket, after an opening brace,
    or on a new line; without its quotes, or with them escaped, after a closing quote and a comma."""
    return re.compile(rf"""
        (?P<in_place> (?: ["'}}\]] (?: \s* , )? | [0-9] \s* , | \{{ ) \s* | \n [^\S\n]* )?
        (?<!\\) ["'] \s* (?i:{name}) \s* (?<!\\) ["'] \s* : \s*
        | (?P<bare> \\? " \s* , \s* ) (?: \\" (?i:{name}) \\" | (?i:{name}) ) \s* : \s*""", re.VERBOSE)


def label_pattern(name: str) -> re.Pattern:
    """Return what finds a value where it is hardly JSON: after a key that lost a quote or both, or has them escaped, or
    in a line such as "**Evaluation:** 4" or under a heading. It counts only as the last thing that an answer says."""
    return re.compile(rf"""
        (?: \A | \n | \{{ | ["'] \s* , ) [\ \t\\"'*_\#-]* (?: (?i: overall | final ) [\ ] )? (?i:{name})
        (?: [*_\s]* \( 1 \s* (?: - | to ) \s* 5 \) )? (?: [\s\\"'*_]* (?P<colon> : ) [\s\\"'*_]* | [*_]* \n [\s*_]* )
        (?P<value> (?: [0-9]+ (?: \.[0-9]+ )? | [A-Za-z]+ ) {OF_FIVE}? )
        [\s\\"'*_`}}\]]*+ (?(colon) \.? [\s*_]* ) \Z""", re.VERBOSE)


QUOTED = re.compile(r' " (?P<value> [^"{}\n]{1,80} ) " ', re.VERBOSE)
BARE = re.compile(rf"""["']? (?P<value> [^\s,:;{{}}()\[\]<>"']++ {OF_FIVE}? (?: \s* (?: stars? | points? ) \b )? )
                       ["']? [.;)]?""", re.VERBOSE)
# A value ends where a brace, or a comma and the next key, follows. After a key in place, the end of the line or of the
# text, the next key without its quotes, or a remark will do.
END = re.compile(r"""(?P<goes_on> \s* , \s* ["'] ) | (?: \s* , )? \s* [{}\]<]""", re.VERBOSE)
END_IN_PLACE = re.compile(rf"""
    (?: \s* , )? (?: \s* (?: ``` | \Z ) | [^\S\n]* \n (?! \s* (?: or | to ) \b ) )
    | \s*+ ,?+ \s*+ ["']? \w++ ["']? \s* :
    | (?P<remark> (?: \s* , (?= \s* (?: /[/*] | \# ) ) )? {REMARK} [^"{{}}\n]* )""", re.VERBOSE)
# An object inside another: what stands before its brace, and what behind its last value.
OPENS_INNER = re.compile(r"""["'] \s* : \s* \[? \s* \Z""", re.VERBOSE)
OPENS_NEXT_INNER = re.compile(r"\} \s* , \s* \Z", re.VERBOSE)      # in a list
CLOSES_INNER = re.compile(r"""["']? \s* \} \s* (?: , \s* ["'] [^"'\n{}]{1,40} ["'] \s* : | [\]}] )""", re.VERBOSE)
NEXT_OBJECT = re.compile(r"\} (?! \s* , ) [^{}]* \{", re.VERBOSE)


class Mention(NamedTuple):
    """A key and its value in broken JSON."""
    value: str                # with the remark behind it
    end: int                  # of the value
    is_in_place: bool         # whether it stands where a key belongs; else it may be part of the notes
    goes_on: bool             # whether another key of the object follows


def mention_at(key: re.Match) -> Mention | None:
    """Return the mention that begins with this key, None if no value follows, or none that ends."""
    text, is_in_place = key.string, key["in_place"] is not None
    for pattern in (QUOTED, BARE):
        value = pattern.match(text, key.end())
        end = value and END.match(text, value.end())
        if end:
            return Mention(value["value"], value.end("value"), is_in_place or key["bare"] is not None,
                           end["goes_on"] is not None)
        end = value and is_in_place and END_IN_PLACE.match(text, value.end())
        if end:
            return Mention(value["value"] + (end["remark"] or ""), value.end("value"), is_in_place, False)
    return None


def nesting_of(text: str) -> tuple[list[int], list[bool]]:
    """Return the places of all braces, and of each whether the object open behind it stands inside another."""
    places, are_inside, opened = [], [], []
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            before = text[max(0, brace.start() - 40):brace.start()]
            opened.append(bool(OPENS_INNER.search(before) or OPENS_NEXT_INNER.search(before)))
        elif opened:
            opened.pop()
        places.append(brace.start())
        are_inside.append(bool(opened) and opened[-1])
    return places, are_inside


def is_closed(text: str) -> bool:
    """Tell whether as many braces close as open, the one of PREFILLED included."""
    before, brace, _ = text.partition("{")
    is_continuation = not brace or OPENS_INNER.search(before) is not None
    return text.count("}") >= text.count("{") + is_continuation


def broken_values(text: str, name: str) -> list[str]:
    """Return the value of a key in the first object of broken JSON: the last one in place, else all that are not.

    If only objects inside it have the key, all of theirs are returned, but none if the answer was cut off: its own may
    have followed.
    """
    found: list[Mention] = []
    are_inner = False
    braces, are_inside = nesting_of(text)
    for key in key_pattern(name).finditer(text):
        mention = mention_at(key)
        if mention is None:
            continue
        if found and NEXT_OBJECT.search(text, found[-1].end, key.end()):
            break
        n_braces = bisect_left(braces, key.end())
        is_inner = mention.is_in_place and (CLOSES_INNER.match(text, mention.end) is not None
                                            or n_braces > 0 and are_inside[n_braces - 1])
        if is_inner and found and found[-1].is_in_place:
            if are_inner:
                found.append(mention)
        elif mention.is_in_place:
            found, are_inner = [mention], is_inner
        elif not found or not found[-1].is_in_place:
            found.append(mention)                 # behind one in place it is in a remark
        if mention.is_in_place and not mention.goes_on and not is_inner:
            break
    if are_inner and not is_closed(text):
        return []
    if not found:
        label = label_pattern(name).search(text)
        return [label["value"]] if label else []
    # A full stop may be the point of a number that was cut off there.
    return [mention.value.rstrip("" if mention.end == len(text) else ".;") for mention in found]
