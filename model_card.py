"""The README.md of a transformers folder that export.py writes."""
from pathlib import Path

from files import read_json
from generation import NO_REPEAT, TEMPERATURE
from model import GPT

HEADLINE = "storm closes schools along the coast"


def model_card(model: GPT, folder: Path) -> str:
    """Return the model card of a model whose folder this is; every figure is read from the model or the folder.

    Of the folder: run.json of its training, loss.json and quality.json as `evaluate.py loss` and `quality` print them
    with --json, as far as they are there. Raises ValueError naming the file that is broken.
    """
    rows = []
    for name, rows_of in (("run.json", rows_of_run), ("loss.json", rows_of_loss), ("quality.json", rows_of_quality)):
        if not (folder / name).exists():
            continue
        facts = read_json(folder / name)
        try:
            rows += rows_of(facts)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / name}: not what its command writes ({error})") from None
    n_parameters, config = model.n_parameters, model.config
    told = "\n".join(["", *rows])
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [tinynews, gpt2]
---
# TinyNews {n_parameters / 1e6:.1f}M

A GPT-2 of {n_parameters:,} parameters that writes short news bulletins in simple English: `headline </h> story`, all in
lower case. The bulletins are invented. Do not take them for news.

    from transformers import pipeline
    write = pipeline("text-generation", model="PATH_OR_ID_OF_THIS_FOLDER")
    print(write("{HEADLINE} </h>")[0]["generated_text"])

With TinyNews itself:

    python export.py --model PATH_OF_THIS_FOLDER --to tinynews --out model
    python sample.py --model model --headline "{HEADLINE}"

## What to know
- Write the headline in lower case, then ` </h>`. An empty prompt, `""`, makes up its own headline.
- The tokenizer puts `<s>` in front and nothing behind. Each training text was `<s> headline </h> story </s>`: to train
  further, end yours with `</s>`. Padding is `<unk>`, which stands for characters that no bulletin holds.
- A text that spells `<s>`, `</s>` or `<unk>` is read as holding that token.
- `generation_config.json` draws at temperature {TEMPERATURE} and lets no run of {NO_REPEAT} tokens come twice, because
  small models fall into loops.
- The context is {config.context_length} tokens, headline and story together.

| | |
| --- | --- |
| layers, heads, width | {config.n_layers}, {config.n_heads}, {config.d_embedding} |
| vocabulary | {config.vocab_size:,} |{told}
"""


def rows_of_run(run: dict) -> list[str]:
    facts = [("validation loss", "val_loss", "{:.3f} nats per token"), ("trained on", "n_bulletins", "{:,} bulletins"),
             ("tokens in them", "n_tokens", "{:,}"), ("steps", "n_steps", "{:,}"), ("time", "elapsed_s", "{:,.0f} s"),
             ("hardware", "hardware", "{}"), ("precision", "precision", "{}"), ("commit", "commit", "{}")]
    return [f"| {title} | {form.format(run[key])} |" for title, key, form in facts if run.get(key) is not None]


def rows_of_loss(loss: dict) -> list[str]:
    interval = "" if loss["low"] is None else f" (95% interval {loss['low']:.3f} to {loss['high']:.3f})"
    return [f"| held-out loss | {loss['nats_per_token']:.3f} nats per token{interval}, "
            f"{loss['bits_per_byte']:.3f} bits per byte, {loss['n_bulletins']:,} bulletins |"]


def rows_of_quality(quality: dict) -> list[str]:
    return ["\n## Its bulletins beside held-out ones\n\n| measure | its own | held-out |\n| --- | --- | --- |",
            *(f"| {name} | {figure(sets['samples'])} | {figure(sets['held_out'])} |"
              for name, sets in quality["measures"].items())]


def figure(measure: dict) -> str:
    return "-" if measure["value"] is None else f"{measure['value']:.3f}"
