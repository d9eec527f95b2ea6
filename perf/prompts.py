"""Prompts that no prefix cache can help with: made of common words, the same for the same seed on every machine.

Knows words and counts; knows no tokenizer, and so offers prompts of plain token ids as well. A common English word
with its leading space is one token in every vocabulary in use, so `num_tokens` is met within a few percent.
"""

import random

_TEXT = """
able about above across after again against almost along already also always among answer area arm art ask away
back base because become before begin behind believe best better between black blue board body book both bring
build business call carry case cause center change child city class clear close color come common company cost
country course cover create dark data daughter day decide deep development different door down draw drive early
earth east easy economy effect else empty end energy enough even event ever every example explain eye face fact
fall family far fast father feel few field fight figure final find fine fire first floor follow food force form
free friend front full future game garden general give glass good government great green ground group grow half
hand happen happy hard have head hear heart heavy help high history hold home horse hot hotel hour house hundred
idea image important industry inside interest island issue keep kind king kitchen know land language large last
late law lead learn leave left level life light line list little local long look lose love machine main make
many map mark market matter mean measure meet member method middle mind minute model moment money month moon more
morning most mother mountain move much music name nation nature near need never next night north note nothing
number ocean offer office often open order other outside over own page paper parent part party pass past pattern
peace people period person picture piece place plan plant play point poor position power present president price
"""
WORDS = tuple(_TEXT.split())


def make_prompt(index: int, num_tokens: int, seed: int = 0, shared_prefix_tokens: int = 0) -> str:
    """Prompt `index` of the family `seed`, about `num_tokens` long, its head shared by the family if asked.

    Two indices differ within their first words behind the shared part, so that not even one block of 16 tokens is
    common to them. Raises ValueError where the shared part leaves no room for that.
    """
    own = _own_words(index)
    if num_tokens < shared_prefix_tokens + len(own):
        raise ValueError(
            f"num_tokens = {num_tokens}: prompt {index} needs {len(own)} tokens of its own behind the "
            f"{shared_prefix_tokens} shared ones"
        )
    shared = random.Random(f"{seed}/shared").choices(WORDS, k=shared_prefix_tokens)
    filler = random.Random(f"{seed}/{index}").choices(WORDS, k=num_tokens - shared_prefix_tokens - len(own))
    return " ".join([*shared, *own, *filler])


def make_token_prompt(index: int, num_tokens: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Prompt `index` of the family `seed` as random token ids: its length is exact whatever the tokenizer is."""
    rng = random.Random(f"{seed}/{index}/tokens")
    return [rng.randrange(vocab_size) for _ in range(num_tokens)]


def _own_words(index: int) -> list[str]:
    """The index in base len(WORDS), lowest digit first: no two alike, and three words below 10 million."""
    digits: list[str] = []
    while index or len(digits) < 3:
        index, digit = divmod(index, len(WORDS))
        digits.append(WORDS[digit])
    return digits
